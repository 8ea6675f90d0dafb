"""GELU without a tanh is torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallax.models.gelu import gelu

NEAR = {torch.float64: 5e-14, torch.float32: 3e-6, torch.bfloat16: 8e-3}  # torch itself is 3e-6 off in float32


@pytest.mark.parametrize("dtype", NEAR)
def test_it_is_torchs(dtype: torch.dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, 3e38, -3e38])]).to(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, wanted = gelu(x), F.gelu(exact, approximate="tanh")
    y.backward(grad)
    wanted.backward(grad.double())
    assert y.dtype == dtype and x.grad is not None and exact.grad is not None
    usual = slice(0, -4)  # the rest is so large that only signs and zeros are of interest
    for mine, theirs in ((y, wanted), (x.grad, exact.grad)):
        apart = (mine.detach().double() - theirs.detach()).abs()[usual] / theirs.detach().abs()[usual].clamp(min=1)
        assert apart.max() <= NEAR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_large_stays_finite(dtype: torch.dtype):
    x = torch.tensor([1e4, -1e4, 1e18, -1e18], dtype=dtype, requires_grad=True)
    y = gelu(x)
    y.backward(torch.ones_like(y))
    assert y.tolist() == [x[0], 0, x[2], 0] and x.grad is not None and x.grad.tolist() == [1, 0, 1, 0]
