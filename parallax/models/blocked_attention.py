"""Causal attention of short sequences on a CPU, written out in blocks of queries.

torch's fused kernel computes the probabilities again in the backward, and its products are no faster than a library's.
For up to 512 tokens the probabilities are small enough to keep: half of T x T a head, beside the 2 K T of its keys and
values. Blocks of queries leave out what lies in their future. Longer sequences, other dtypes and GPUs have the kernel.

Queries, keys and values are read where the fused product left them, and their gradients are written side by side: a
sample at a time, so that its heads are the batch of a product, and what a block needs stays in the cache. In bfloat16
the numbers between are float32; what is kept is bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parallax.models.costs import BLOCK, keeps_probabilities
from parallax.tensor.norms import wide_of

__all__ = ["blocked_attention", "suits"]


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
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _parts(qkv_TJK: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [G, r, T, K], keys and values [G, T, K] of one sample, in place."""
    q_THK, k_TGK, v_TGK = qkv_TJK.split([heads, *2 * [(qkv_TJK.shape[1] - heads) // 2]], dim=1)
    groups = k_TGK.shape[1]
    q_GrTK = q_THK.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    return q_GrTK, k_TGK.transpose(0, 1), v_TGK.transpose(0, 1)


class _Blocked(torch.autograd.Function):
    """G problems a sample: r = H/G query heads of n queries each share their keys: one product serves them all."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        num_samples, length, _, width = qkv.shape
        ctx.heads, ctx.scale = heads, width**-0.5
        wide = wide_of(qkv)
        future = torch.full((BLOCK, BLOCK), -torch.inf, dtype=wide.dtype).triu_(1)
        out = wide.new_empty(num_samples, length, heads, width)
        kept = []
        for sample, result in zip(wide, out, strict=True):
            q, k, v = _parts(sample, heads)
            repeat = q.shape[1]
            out_GrTK = result.unflatten(1, (-1, repeat)).permute(1, 2, 0, 3)
            for start, stop in _blocks(length):
                size = stop - start
                scores = _multiply(_rows(q, start, stop), k[:, :stop].transpose(1, 2), ctx.scale)
                scores.view(-1, repeat, size, stop)[..., start:].add_(future[:size, :size])
                p = scores.softmax(-1)
                _write(out_GrTK, start, stop, p, v[:, :stop], 1.0)
                kept.append(p.to(qkv.dtype))
        ctx.save_for_backward(qkv, *kept)
        return out.to(qkv.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        qkv, *kept = ctx.saved_tensors
        length, scale, wide = qkv.shape[1], ctx.scale, wide_of(qkv)
        result = torch.empty_like(wide)
        probabilities = map(wide_of, kept)
        for sample, grad_sample, d in zip(wide, wide_of(grad), result, strict=True):
            (q, k, v), (dq, dk, dv) = _parts(sample, ctx.heads), _parts(d, ctx.heads)
            g_GrTK = grad_sample.unflatten(1, (-1, q.shape[1])).permute(1, 2, 0, 3)
            # From the last block, which meets all keys, so that its products begin the sums.
            for (start, stop), p in _backwards(length, probabilities):
                g, more = _rows(g_GrTK, start, stop), int(stop < length)
                dv[:, :stop].baddbmm_(p.transpose(1, 2), g, beta=more)
                dp = torch.bmm(g, v[:, :stop].transpose(1, 2))
                ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
                _write(dq, start, stop, ds, k[:, :stop], scale)
                dk[:, :stop].baddbmm_(ds.transpose(1, 2), _rows(q, start, stop), beta=more, alpha=scale)
        return result.to(qkv.dtype), None


def _backwards(length: int, kept: Iterator[Tensor]) -> list[tuple[tuple[int, int], Tensor]]:
    """The blocks of the next sample with their probabilities, the last block first."""
    return [(block, next(kept)) for block in _blocks(length)][::-1]


def _rows(x_GrTK: Tensor, start: int, stop: int) -> Tensor:
    """The block's rows of all r heads, one under the other: [G, r*n, K]; in place where r is 1."""
    return x_GrTK[:, :, start:stop].reshape(x_GrTK.shape[0], -1, x_GrTK.shape[3])


def _multiply(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor a b, without a pass for the factor."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return out.baddbmm_(a, b, beta=0, alpha=factor)


def _write(out_GrTK: Tensor, start: int, stop: int, a: Tensor, b: Tensor, factor: float) -> None:
    """factor a b into the block's rows of all r heads."""
    rows = out_GrTK[:, :, start:stop]
    if rows.shape[1] == 1:
        rows[:, 0].baddbmm_(a, b, beta=0, alpha=factor)
    else:
        rows.copy_(_multiply(a, b, factor).view(rows.shape))
