"""Causal attention of short sequences on a CPU, written out in blocks of queries.

torch's fused kernel computes the probabilities again in the backward, and its products are no faster than a library's.
For up to 512 tokens the probabilities are small enough to keep: half of T x T a head, beside the 2 K T of its keys and
values. Blocks of queries leave out what lies in their future. Longer sequences, other dtypes and GPUs have the kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallax.models.costs import BLOCK, keeps_probabilities

__all__ = ["blocked_attention", "suits"]


def suits(q_BHTK: Tensor) -> bool:
    """Whether this way is the faster one."""
    return keeps_probabilities(q_BHTK.shape[2], q_BHTK.device.type == "cpu", str(q_BHTK.dtype).removeprefix("torch."))


def blocked_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over what is not in the future; key/value head i serves query heads i*H/G and on."""
    return _Blocked.apply(q_BHTK, k_BGTK, v_BGTK)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


class _Blocked(torch.autograd.Function):
    """P = B*G problems: r = H/G query heads of n queries each share their keys, so that one product serves them all."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_samples, heads, length, width = q.shape
        groups = k.shape[1]
        ctx.repeat, ctx.scale = heads // groups, width**-0.5
        q_PrTK = (q * ctx.scale).reshape(-1, ctx.repeat, length, width)
        k_PTK, v_PTK = (x.reshape(-1, length, width) for x in (k, v))
        future = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype).triu_(1)
        out = torch.empty_like(q_PrTK)
        kept = []
        for start, stop in _blocks(length):
            size = stop - start
            scores = torch.bmm(_rows(q_PrTK, start, stop), k_PTK[:, :stop].transpose(1, 2))
            scores.view(-1, ctx.repeat, size, stop)[..., start:].add_(future[:size, :size])
            p = scores.softmax(-1)
            out[:, :, start:stop] = torch.bmm(p, v_PTK[:, :stop]).view(-1, ctx.repeat, size, width)
            kept.append(p)
        ctx.save_for_backward(q_PrTK, k_PTK, v_PTK, *kept)
        return out.view(num_samples, heads, length, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *kept = ctx.saved_tensors
        length, width = k.shape[1:]
        grad_PrTK = grad.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # From the last block, which meets all keys, so that its products begin the sums.
        for (start, stop), p in reversed(list(zip(_blocks(length), kept, strict=True))):
            g, last = _rows(grad_PrTK, start, stop), stop == length
            dv[:, :stop].baddbmm_(p.transpose(1, 2), g, beta=0 if last else 1)
            dp = torch.bmm(g, v[:, :stop].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            block = torch.bmm(ds, k[:, :stop]).view(-1, ctx.repeat, stop - start, width)
            torch.mul(block, ctx.scale, out=dq[:, :, start:stop])
            dk[:, :stop].baddbmm_(ds.transpose(1, 2), _rows(q, start, stop), beta=0 if last else 1)
        shape = (grad.shape[0], -1, length, width)
        return dq.view(shape), dk.view(shape), dv.view(shape)


def _rows(x_PrTK: Tensor, start: int, stop: int) -> Tensor:
    """The block's rows of all r heads, one under the other: [P, r*n, K]."""
    return x_PrTK[:, :, start:stop].reshape(x_PrTK.shape[0], -1, x_PrTK.shape[3])
