"""Attention written out in blocks is torch's, forward and backward, for any length and grouping of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from parallax.models import blocked_attention as blocks
from parallax.models import costs
from parallax.models.attention import apply_rotary, rotary_table
from parallax.models.blocked_attention import blocked_attention, suits
from parallax.models.costs import unit_activations
from parallax.processor import Processor
from parallax.tensor import products
from tests.cases import GPT2, make_batch, start


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("length", [1, 65, 127, 128, 129, 200, 256, 511, 700])  # of 700 probabilities are not kept
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


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("problems", [1, 2, 3, 7, 12])
def test_together_or_some_after_others(monkeypatch: pytest.MonkeyPatch, problems: int, keeps: bool):
    """All five samples of three key heads at a time, against single heads, two and then one, a sample, two, four."""
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(5, 140, 12, 8, generator=generator, requires_grad=True)
    grad = torch.randn(5, 140, 6, 8, generator=generator)
    monkeypatch.setattr(blocks, "_keeps", lambda qkv: keeps)
    found, sizes = [], []
    for together in (15, problems):
        monkeypatch.setattr(blocks, "AT_ONCE", together * 2 * costs.BLOCK * 140)
        fused.grad = None
        with Products() as seen:
            y = blocked_attention(fused, 6)
            y.backward(grad)
        sizes.append(seen.sizes)
        found.append((y, fused.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert sizes[0] == {15} and max(sizes[1]) == {7: 6}.get(problems, problems)


class Products(TorchDispatchMode):
    """How many matrices each batched product has."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.sizes.add(args[0].shape[0])
        return func(*args, **(kwargs or {}))


def test_probabilities_that_are_not_kept_are_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    """And then nothing of their size is held."""
    fused = torch.randn(1, 300, 6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, held = [], []
    for keeps in (True, False):
        monkeypatch.setattr(blocks, "_keeps", lambda qkv, keeps=keeps: keeps)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            y = blocked_attention(fused, 2)
        held.append(sum(sizes))
        found.append((y, *torch.autograd.grad(y.square().sum(), fused)))
    assert all(a.equal(b) for a, b in zip(*found, strict=True))
    assert held == [6 * 300 * 8 + 2 * (128 * 128 + 128 * 256 + 44 * 300), 6 * 300 * 8]


def test_no_samples_at_all():
    x = torch.randn(0, 140, 10, 8, requires_grad=True)
    y = blocked_attention(x, 6)
    y.sum().backward()
    assert y.shape == (0, 140, 6, 8) and x.grad is not None and x.grad.shape == x.shape


def test_memory_of_any_layout():
    """A part of a larger tensor, tokens before samples, gradients that are one number or turned round."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(150, 3, 14, 10, generator=generator)
    inside = whole.transpose(0, 1)[1:, 5:145, 3:13, 2:].requires_grad_()
    copy = inside.detach().clone().contiguous().requires_grad_()
    for grad in (
        torch.ones(()).expand(2, 140, 6, 8),
        torch.randn(6, 2, 8, 140, generator=generator).permute(1, 3, 0, 2),
    ):
        y, wanted = blocked_attention(inside, 6), blocked_attention(copy, 6)
        assert y.equal(wanted)
        (found,) = torch.autograd.grad(y, inside, grad)
        assert found.equal(*torch.autograd.grad(wanted, copy, grad.contiguous()))


def test_two_backwards_of_one_forward():
    """The probabilities that are kept stay what they are."""
    x = torch.randn(1, 140, 6, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = blocked_attention(x, 2)
    first, second = (torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keeps", [True, False])
def test_bytes_that_are_kept(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, keeps: bool):
    """Queries, keys and values in the input's dtype, and the probabilities; memory of no other size behind them."""
    monkeypatch.setattr(blocks, "_keeps", lambda qkv: keeps)
    fused = torch.randn(2, 200, 10, 8).to(dtype).requires_grad_()
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        blocked_attention(fused, 6)
    numbers = 2 * (200 * 10 * 8 + keeps * 6 * (128 * 128 + 72 * 200))
    assert sum(storages.values()) == numbers * dtype.itemsize


@pytest.mark.parametrize(("all_heads", "heads"), [(9, 5), (7, 4), (4, 4), (9, 4)])
def test_heads_that_are_no_groups_are_refused(all_heads: int, heads: int):
    with pytest.raises(ValueError, match=f"{all_heads} heads in all are not {heads} query heads"):
        blocked_attention(torch.randn(1, 70, all_heads, 4), heads)


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
    def used(length: int, dtype: torch.dtype = torch.float32, device: str = "cpu", groups: int = 2) -> bool:
        return suits(torch.empty(1, length, 64 + 2 * groups, 8, dtype=dtype, device=device), 64)

    for faster in (True, False):
        monkeypatch.setattr(products, "onednn_is_faster", lambda faster=faster: faster)
        assert used(256) and used(512, torch.float64)
        assert not used(64) and not used(256, torch.float16) and not used(256, device="meta")
        assert used(513) is used(1024) is faster
        assert not used(513, torch.float64) and not used(513, torch.bfloat16)
        assert used(1024, groups=1) is faster and not used(1025, groups=1)  # whose blocks would take 32 MB
    for flags, expected in ((frozenset({"avx512f"}), True), (frozenset({"avx512f", "amx_bf16"}), False)):
        monkeypatch.setattr(costs, "processor", lambda flags=flags: Processor("", flags))
        assert used(256, torch.bfloat16) is expected


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
