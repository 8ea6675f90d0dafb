"""The products of a linear layer are the same whichever library computes them."""

from __future__ import annotations

import pytest
import torch

from parallax.processor import Processor
from parallax.tensor import products

WIDE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


@pytest.fixture(params=["by the rule", "onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no oneDNN")
    if request.param != "by the rule":
        monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    return request.param


def near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape and found.is_contiguous()
    apart = (found.double() - exact).abs().max() / exact.abs().max()
    assert apart < WIDE[dtype], f"{apart} apart"


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("rows", "hidden", "width"), [(1, 1, 1), (7, 5, 3), (64, 33, 130), (512, 256, 768)])
def test_products(library: str, dtype: torch.dtype, rows: int, hidden: int, width: int):
    generator = torch.Generator().manual_seed(rows)
    x, w, b, g, before = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(rows, hidden), (width, hidden), (width,), (rows, width), (width, hidden)]
    )
    x64, w64, b64, g64, before64 = (t.double() for t in (x, w, b, g, before))
    near(products.linear(x, w, None), x64 @ w64.T, dtype)
    near(products.linear(x, w, b), x64 @ w64.T + b64, dtype)
    near(products.input_grad(g, w), g64 @ w64, dtype)
    near(products.product(g, w), g64 @ w64, dtype)
    out = before.clone()
    products.accumulate_weight_grad(g, x, out)
    near(out, before64 + g64.T @ x64, dtype)
    wide = before.float() if dtype == torch.bfloat16 else before.clone()  # gradients are summed in float32
    products.accumulate_weight_grad(g, x, wide)
    near(wide, before64 + g64.T @ x64, dtype)


def test_views_and_nothing(library: str):
    """What layers give: slices of a fused buffer, transposed views, a microbatch without tokens of one's own."""
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x, w = whole[:, 1:5], whole[:3, 2:6]
    near(products.linear(x, w, None), x.double() @ w.double().T, torch.float32)
    near(products.product(x.t(), whole), x.double().T @ whole.double(), torch.float32)
    empty, out = torch.empty(0, 4), torch.ones(3, 4)
    assert products.linear(empty, w, torch.ones(3)).shape == (0, 3)
    assert products.input_grad(torch.empty(0, 3), w).shape == (0, 4)
    products.accumulate_weight_grad(torch.empty(0, 3), empty, out)
    assert out.equal(torch.ones(3, 4))


def test_the_same_bits_every_time(library: str):
    x, w = torch.randn(512, 256), torch.randn(768, 256)
    first = products.linear(x, w, None)
    assert all(products.linear(x, w, None).equal(first) for _ in range(5))


def test_which_library_follows_from_the_processor_alone(monkeypatch: pytest.MonkeyPatch):
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    for vendor, expected in (("AuthenticAMD", wide), ("GenuineIntel", False), ("", False)):
        monkeypatch.setattr(products, "processor", lambda vendor=vendor: Processor(vendor))
        assert products.onednn_is_faster.__wrapped__() is expected
    assert not any(products.suits_onednn(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16))
