"""Attention written out in blocks is torch's, forward and backward, for any length and grouping of heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallax.models.blocked_attention import blocked_attention, suits
from parallax.models.costs import unit_activations
from tests.cases import GPT2, make_batch, start


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 256, 511])
def test_it_is_attention(heads: int, groups: int, length: int):
    generator = torch.Generator().manual_seed(length)
    fused = torch.randn(2, length, heads + 2 * groups, 12, dtype=torch.float64, generator=generator)
    grad = torch.randn(2, heads, length, 12, dtype=torch.float64, generator=generator)
    found = []
    for attention in (
        blocked_attention,
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ):
        q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in fused.split([heads, groups, groups], dim=2))
        y = attention(q, k, v)
        y.backward(grad)
        found.append((y.detach(), q.grad, k.grad, v.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_where_it_is_used():
    def q(length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(1, 2, length, 8, dtype=dtype)

    assert suits(q(256)) and suits(q(512, torch.float64))
    assert not suits(q(64)) and not suits(q(513)) and not suits(q(256, torch.bfloat16))
    assert not suits(q(256).to("meta"))


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
