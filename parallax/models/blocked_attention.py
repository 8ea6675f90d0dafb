"""Causal attention on a CPU, written out in blocks of queries, which leave out what lies in their future.

Up to 512 tokens the probabilities are small enough to keep: half of T x T a head, beside the 2 K T of its keys and
values. torch's fused kernel computes them again in the backward, and its products are no faster than a library's. In
float32, on a processor where torch's kernel has the slower library (tensor/products.py), longer sequences go this way
too: there a block's probabilities are computed again. Other lengths and dtypes, and GPUs, have the kernel.

Heads are copied side by side first: some of them, or those of a few samples, are then one batch of a product, in memory
of its own. A product into strided memory torch does matrix by matrix. In bfloat16 the numbers between are float32; what
is kept is bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallax.models.costs import BLOCK, LONGEST, keeps_probabilities
from parallax.tensor.norms import wide_of
from parallax.tensor.products import by_faster_library, suits_onednn

__all__ = ["blocked_attention", "suits"]

AT_ONCE = 1 << 19
"""Probabilities of a block, over all heads and samples that are worked on together."""
MOST = 1 << 23
"""Probabilities of a block of the query heads of one key head: with more of them, torch's kernel needs less memory."""


def suits(qkv_BTJK: Tensor, heads: int) -> bool:
    """Whether this way is the faster one."""
    length, each = qkv_BTJK.shape[1], 2 * heads // (qkv_BTJK.shape[2] - heads)
    return _keeps(qkv_BTJK) or length > LONGEST and each * BLOCK * length <= MOST and suits_onednn(qkv_BTJK)


def _keeps(qkv_BTJK: Tensor) -> bool:
    """Whether the probabilities are kept for the backward."""
    return keeps_probabilities(qkv_BTJK.shape[1], qkv_BTJK.is_cpu, str(qkv_BTJK.dtype).removeprefix("torch."))


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


def _chunks(at_once: int, *parts_BG: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of all parts: of as many samples as fit, or of some groups of one."""
    groups = min(at_once, parts_BG[0].shape[1])
    samples = max(1, at_once // groups)
    for some in zip(*(part.split(samples) for part in parts_BG), strict=True):
        yield from zip(*(part.split(groups, 1) for part in some), strict=True)


class _Blocked(torch.autograd.Function):
    """As many problems at a time as fit into the cache: the query heads of one key head in one sample are one."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.heads, ctx.num_groups, ctx.keeps = heads, (qkv.shape[2] - heads) // 2, _keeps(qkv)
        out = qkv.new_empty(*qkv.shape[:2], heads, qkv.shape[3])
        q, k, v = _parts(qkv, heads)
        ctx.at_once = max(1, AT_ONCE // (q.shape[2] * BLOCK * qkv.shape[1]))
        kept = []
        for parts in _chunks(ctx.at_once, q, k, v, _grouped(out, ctx.num_groups)):
            kept += _attend(ctx.keeps, *parts)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kept = ctx.saved_tensors  # asked for once: a hook may compute them
        each = 3 + (len(_blocks(grad.shape[1])) if ctx.keeps else 0)
        result = grad.new_empty(*grad.shape[:2], ctx.heads + 2 * ctx.num_groups, grad.shape[3])
        chunks = _chunks(ctx.at_once, _grouped(grad, ctx.num_groups), *_parts(result, ctx.heads))
        for index, parts in enumerate(chunks):
            _gradient(kept[index * each : (index + 1) * each], *parts)
        return result, None


def _probabilities(q_rows: Tensor, k_PtK: Tensor, size: int, future: Tensor) -> Tensor:
    """Of `size` queries, the last of which is as late as the last key: [P, r*n, t]."""
    scores = _multiply(q_rows, k_PtK.transpose(1, 2), q_rows.shape[2] ** -0.5)
    own = scores.unflatten(1, (-1, size))[..., -size:]
    own.add_(future if size == BLOCK else future[:size, :size])
    return torch.softmax(scores, -1, out=scores)


def _future(like: Tensor) -> Tensor:
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=like.dtype).triu_(1)


def _attend(keeps: bool, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Tensor]:
    """Attention into `out`: B*G problems, in which r = H/G query heads of n queries each share their keys, so that one
    product serves them all. Returns what the backward needs.
    """
    copies, dtype = [q.contiguous(), k.contiguous(), v.contiguous()], q.dtype
    q, k, v = map(wide_of, copies)
    k_PTK, v_PTK, future = k.flatten(0, 1), v.flatten(0, 1), _future(q)
    kept = []
    with by_faster_library(q):
        for (start, stop), q_rows, place in zip(_blocks(q.shape[3]), _rows(q), _cut(out), strict=True):
            p = _probabilities(q_rows, k_PTK.narrow(1, 0, stop), stop - start, future)
            place.copy_(torch.bmm(p, v_PTK.narrow(1, 0, stop)).view_as(place))
            if keeps:
                kept.append(p.to(dtype))
    return copies + kept


def _gradient(kept: Sequence[Tensor], grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The gradient by queries, keys and values, into `dq`, `dk` and `dv`."""
    q, k, v = map(wide_of, kept[:3])
    k_PTK, v_PTK = k.flatten(0, 1), v.flatten(0, 1)
    scale, blocks = k.shape[3] ** -0.5, _blocks(k.shape[2])
    g = wide_of(grad.contiguous())
    future = _future(q) if len(kept) == 3 else None
    sum_k: Tensor | None = None
    sum_v: Tensor | None = None
    with by_faster_library(q):
        rows = zip(blocks, _rows(q), _rows(g), kept[3:] or len(blocks) * [q], _cut(dq), strict=True)
        for (start, stop), q_rows, g_rows, known, place in rows:
            keys, values = k_PTK.narrow(1, 0, stop), v_PTK.narrow(1, 0, stop)
            p = wide_of(known) if future is None else _probabilities(q_rows, keys, stop - start, future)
            sum_v = _add(sum_v, torch.bmm(p.transpose(1, 2), g_rows))
            dp = torch.bmm(g_rows, values.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            place.copy_(_multiply(ds, keys, scale).view_as(place))
            sum_k = _add(sum_k, _multiply(ds.transpose(1, 2), q_rows, scale))
    assert sum_k is not None and sum_v is not None
    dk.copy_(sum_k.view(dk.shape))
    dv.copy_(sum_v.view(dv.shape))


def _cut(x_BGrTK: Tensor) -> tuple[Tensor, ...]:
    """The rows of each block, the last block first, in place."""
    return x_BGrTK.split(BLOCK, 3)[::-1]


def _rows(x_BGrTK: Tensor) -> Iterator[Tensor]:
    """As `_cut`, those of all r heads one under the other: [B*G, r*n, K]; in place where r is 1."""
    num_samples, num_groups, r, _, width = x_BGrTK.shape
    return (part.reshape(num_samples * num_groups, r * part.shape[3], width) for part in _cut(x_BGrTK))


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
