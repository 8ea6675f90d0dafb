"""Causal attention of short sequences on a CPU, written out in blocks of queries.

torch's fused kernel computes the probabilities again in the backward, and its products are no faster than a library's.
For up to 512 tokens the probabilities are small enough to keep: half of T x T a head, beside the 2 K T of its keys and
values. Blocks of queries leave out what lies in their future. Longer sequences, other dtypes and GPUs have the kernel.

Heads are copied side by side first: those of a few samples are then one batch of a product, in memory of its own. A
product into strided memory torch does matrix by matrix. In bfloat16 the numbers between are float32; what is kept is
bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallax.models.costs import BLOCK, keeps_probabilities
from parallax.tensor.norms import wide_of
from parallax.tensor.products import by_faster_library

__all__ = ["blocked_attention", "suits"]

AT_ONCE = 1 << 19
"""Probabilities of a block, over all heads and samples that are worked on together."""


def suits(qkv_BTJK: Tensor) -> bool:
    """Whether this way is the faster one."""
    dtype = str(qkv_BTJK.dtype).removeprefix("torch.")
    return keeps_probabilities(qkv_BTJK.shape[1], qkv_BTJK.device.type == "cpu", dtype)


def blocked_attention(qkv_BTJK: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over what is not in the future: [B, T, H, K].

    qkv_BTJK: H query heads, then G key heads, then G value heads, J = H + 2G, each row of K contiguous; key/value head
    i serves query heads i*H/G and on.
    """
    return _Blocked.apply(qkv_BTJK, heads)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Queries [start, stop), the last block first: it meets all keys, and later ones fit into memory that it left."""
    return [(start, min(start + BLOCK, length)) for start in reversed(range(0, length, BLOCK))]


def _parts(qkv_BTJK: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, G, r, T, K], keys and values [B, G, T, K], in place."""
    q_BTHK, k_BTGK, v_BTGK = qkv_BTJK.split([heads, *2 * [(qkv_BTJK.shape[2] - heads) // 2]], dim=2)
    return _grouped(q_BTHK, k_BTGK.shape[2]), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)


def _grouped(x_BTHK: Tensor, groups: int) -> Tensor:
    """[B, G, r, T, K], in place."""
    return x_BTHK.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)


class _Blocked(torch.autograd.Function):
    """As many samples at a time as fit into the cache."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.heads = heads
        ctx.at_once = max(1, AT_ONCE // (heads * BLOCK * qkv.shape[1]))
        out = qkv.new_empty(*qkv.shape[:2], heads, qkv.shape[3])
        kept = []
        for part, out_part in zip(qkv.split(ctx.at_once), out.split(ctx.at_once), strict=True):
            kept += _attend(part, heads, out_part)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kept = ctx.saved_tensors  # asked for once: a hook may compute them
        each = 3 + len(_blocks(grad.shape[1]))
        result = grad.new_empty(*grad.shape[:2], ctx.heads + 2 * kept[1].shape[1], grad.shape[3])
        parts = zip(grad.split(ctx.at_once), result.split(ctx.at_once), strict=True)
        for index, (grad_part, result_part) in enumerate(parts):
            _gradient(kept[index * each : (index + 1) * each], grad_part, ctx.heads, result_part)
        return result, None


def _attend(qkv: Tensor, heads: int, out: Tensor) -> list[Tensor]:
    """Attention of some samples, into `out`: B*G problems, in which r = H/G query heads of n queries each share their
    keys, so that one product serves them all. Returns what the backward needs.
    """
    length, scale = qkv.shape[1], qkv.shape[3] ** -0.5
    copies = [part.contiguous() for part in _parts(qkv, heads)]
    q, k, v = map(wide_of, copies)
    k_PTK, v_PTK = k.flatten(0, 1), v.flatten(0, 1)
    future = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype).triu_(1)
    kept = []
    rows = zip(_blocks(length), _rows(q), _cut(_grouped(out, k.shape[1])), strict=True)
    with by_faster_library(q):
        for (start, stop), q_rows, place in rows:
            size = stop - start
            scores = _multiply(q_rows, k_PTK.narrow(1, 0, stop).transpose(1, 2), scale)
            own = scores.view(-1, q.shape[2], size, stop).narrow(3, start, size)
            own.add_(future if size == BLOCK else future[:size, :size])
            p = torch.softmax(scores, -1, out=scores)
            place.copy_(torch.bmm(p, v_PTK.narrow(1, 0, stop)).view_as(place))
            kept.append(p.to(qkv.dtype))
    return copies + kept


def _gradient(kept: Sequence[Tensor], grad: Tensor, heads: int, result: Tensor) -> None:
    """The gradient by the samples' queries, keys and values, into `result`."""
    q, k, v = map(wide_of, kept[:3])
    k_PTK, v_PTK = k.flatten(0, 1), v.flatten(0, 1)
    scale = k.shape[3] ** -0.5
    dq, dk, dv = _parts(result, heads)
    g = wide_of(_grouped(grad, k.shape[1]).contiguous())
    sum_k: Tensor | None = None
    sum_v: Tensor | None = None
    rows = zip(_blocks(k.shape[2]), _rows(q), _rows(g), map(wide_of, kept[3:]), _cut(dq), strict=True)
    with by_faster_library(q):
        for (_, stop), q_rows, g_rows, p, place in rows:
            sum_v = _add(sum_v, torch.bmm(p.transpose(1, 2), g_rows))
            dp = torch.bmm(g_rows, v_PTK.narrow(1, 0, stop).transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            place.copy_(_multiply(ds, k_PTK.narrow(1, 0, stop), scale).view_as(place))
            sum_k = _add(sum_k, _multiply(ds.transpose(1, 2), q_rows, scale))
    assert sum_k is not None and sum_v is not None
    dk.copy_(sum_k.view(dk.shape))
    dv.copy_(sum_v.view(dv.shape))


def _cut(x_BGrTK: Tensor) -> tuple[Tensor, ...]:
    """The rows of each block, the last block first, in place."""
    return x_BGrTK.split(BLOCK, 3)[::-1]


def _rows(x_BGrTK: Tensor) -> Iterator[Tensor]:
    """As `_cut`, those of all r heads one under the other: [B*G, r*n, K]; in place where r is 1."""
    num_groups = x_BGrTK.shape[0] * x_BGrTK.shape[1]
    return (part.reshape(num_groups, -1, part.shape[4]) for part in _cut(x_BGrTK))


def _multiply(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor a b, without a pass for the factor."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return out.baddbmm_(a, b, beta=0, alpha=factor)


def _add(total: Tensor | None, part_PtK: Tensor) -> Tensor:
    """The sum, in the memory of the first part, which must be the longest."""
    if total is None:
        return part_PtK
    total.narrow(1, 0, part_PtK.shape[1]).add_(part_PtK)
    return total
