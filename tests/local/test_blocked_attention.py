"""Attention written out in blocks is torch's, forward and backward, for any length and grouping of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallax.models import blocked_attention as blocks
from parallax.models import costs
from parallax.models.attention import apply_rotary, rotary_table
from parallax.models.blocked_attention import blocked_attention, suits
from parallax.models.costs import unit_activations
from parallax.processor import Processor
from tests.cases import GPT2, make_batch, start


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 256, 511])
def test_it_is_attention(heads: int, groups: int, length: int):
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(2, length, heads + 2 * groups, 12, dtype=torch.float64, generator=generator)
    grad = torch.randn(2, length, heads, 12, dtype=torch.float64, generator=generator)
    mine, theirs = fused.clone().requires_grad_(), fused.clone().requires_grad_()
    y = blocked_attention(mine, heads)
    q, k, v = (x.transpose(1, 2) for x in theirs.split([heads, groups, groups], dim=2))
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    y.backward(grad)
    wanted.backward(grad)
    for found, right in ((y, wanted), (mine.grad, theirs.grad)):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples", [1, 2, 4])
def test_samples_together_or_some_after_others(monkeypatch: pytest.MonkeyPatch, samples: int):
    """Five at a time, against one, two (and then one), four (and then one)."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(5, 80, 10, 8, generator=generator, requires_grad=True)
    grad = torch.randn(5, 80, 6, 8, generator=generator)
    found = []
    for together in (5, samples):
        monkeypatch.setattr(blocks, "AT_ONCE", together * 6 * costs.BLOCK * 80)
        fused.grad = None
        y = blocked_attention(fused, 6)
        y.backward(grad)
        found.append((y, fused.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_second_derivative_is_refused():
    x = torch.randn(1, 70, 6, 4, requires_grad=True)
    (first,) = torch.autograd.grad(blocked_attention(x * x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_rotary_positions_are_a_rotation_by_complex_numbers():
    """Of queries and keys alone; the gradient is the rotation back."""
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    table = rotary_table(5, 6, 100.0, torch.device("cpu"), torch.float64)
    y = apply_rotary(x, table, 3)
    angle = torch.arange(5.0, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    wanted = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(y[:, :, :3], wanted[:, :, :3], rtol=1e-14, atol=1e-14)
    assert y[:, :, 3].equal(x[:, :, 3])
    assert torch.autograd.gradcheck(lambda x: apply_rotary(x, table, 3), (x,))


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch):
    def qkv(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, length, 6, 8, dtype=dtype)

    assert suits(qkv(256)) and suits(qkv(512, torch.float64))
    assert not suits(qkv(64)) and not suits(qkv(513)) and not suits(qkv(256, torch.float16))
    assert not suits(qkv(256).to("meta"))
    for flags, expected in ((frozenset({"avx512f"}), True), (frozenset({"avx512f", "amx_bf16"}), False)):
        monkeypatch.setattr(costs, "processor", lambda flags=flags: Processor("", flags))
        assert suits(qkv(256, torch.bfloat16)) is expected


def test_bfloat16_is_as_near_as_its_own_rounding():
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(2, 200, 10, 16, generator=generator).bfloat16()
    grad = torch.randn(2, 200, 6, 16, generator=generator).bfloat16()
    narrow, exact = fused.clone().requires_grad_(), fused.double().requires_grad_()
    y, wanted = blocked_attention(narrow, 6), blocked_attention(exact, 6)
    y.backward(grad)
    wanted.backward(grad.double())
    assert y.dtype == narrow.grad.dtype == torch.bfloat16
    assert (y - wanted).abs().max() < 2**-8 * wanted.abs().max()
    assert (narrow.grad - exact.grad).abs().max() < 2**-7 * exact.grad.abs().max()


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_it_keeps_is_in_the_prediction(recompute: str):
    """Bytes that autograd holds between forward and backward, of a model that attends over 192 tokens."""
    changes = {"corpus.sequence_length": 192, "recompute": recompute, "dtype": "float32", "model.layers": 3}
    run, _ = start("1x1x1", **GPT2 | changes)
    (model,) = run.stages.values()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype.is_floating_point:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    microbatch = make_batch(run.config, run.mesh, 0).split(4)[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(None, microbatch, 1.0)
    each = unit_activations(run.config.model, recompute=recompute, kept_length=192)
    assert sum(kept.values()) == pytest.approx(4 * sum(each) * microbatch.tokens_BT.numel(), rel=0.1)
