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
from dataclasses import dataclass
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
    i serves query heads i*H/G and on. Raises ValueError where J is no such sum.
    """
    num_heads = qkv_BTJK.shape[2]
    if num_heads <= heads or (num_heads - heads) % 2 or heads % ((num_heads - heads) // 2):
        raise ValueError(
            f"{num_heads} heads in all are not {heads} query heads and G of keys and of values that divide it"
        )
    return _Blocked.apply(qkv_BTJK, heads)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Queries [start, stop), the last block first: it meets all keys, and later ones fit into memory that it left."""
    return [(start, min(start + BLOCK, length)) for start in reversed(range(0, length, BLOCK))]


@dataclass(frozen=True, slots=True)
class _Problems:
    """Key heads [group, group + groups) of samples [sample, sample + samples), each a problem with its r query heads.
    Its methods are views of what these heads have in [B, T, J, K]: [samples, groups, r, t, K], each made at once.
    """

    sample: int
    samples: int
    group: int
    groups: int
    heads: int
    num_groups: int

    def queries(self, x_BTJK: Tensor, start: int, stop: int) -> Tensor:
        r = self.heads // self.num_groups
        return self._view(x_BTJK, self.group * r, r, start, stop)

    def keys(self, x_BTJK: Tensor) -> Tensor:
        return self._view(x_BTJK, self.heads + self.group, 1, 0, x_BTJK.shape[1])

    def values(self, x_BTJK: Tensor) -> Tensor:
        return self._view(x_BTJK, self.heads + self.num_groups + self.group, 1, 0, x_BTJK.shape[1])

    def _view(self, x: Tensor, head: int, r: int, start: int, stop: int) -> Tensor:
        of_sample, of_token, of_head, of_number = x.stride()
        offset = x.storage_offset() + self.sample * of_sample + head * of_head + start * of_token
        shape = (self.samples, self.groups, r, stop - start, x.shape[3])
        return x.as_strided(shape, (of_sample, r * of_head, of_head, of_token, of_number), offset)


def _problems(qkv_BTJK: Tensor, heads: int) -> Iterator[_Problems]:
    """As many at a time as fit into the cache: of a few samples, or some key heads of one."""
    num_samples, length, num_heads, _ = qkv_BTJK.shape
    num_groups = (num_heads - heads) // 2
    at_once = max(1, AT_ONCE // (heads // num_groups * BLOCK * length))
    groups = min(at_once, num_groups)
    samples = max(1, at_once // groups)
    for sample in range(0, num_samples, samples):
        for group in range(0, num_groups, groups):
            some = min(samples, num_samples - sample), group, min(groups, num_groups - group)
            yield _Problems(sample, *some, heads, num_groups)


def _side_by_side(part: Tensor, dtype: torch.dtype) -> Tensor:
    """[samples, groups, r, t, K] as [P, r*t, K] in memory of its own."""
    copy = part.new_empty(part.shape, dtype=dtype).copy_(part)
    return copy.view(-1, part.shape[2] * part.shape[3], part.shape[4])


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        ctx.heads, ctx.keeps, ctx.shape = heads, _keeps(qkv), qkv.shape
        out = qkv.new_empty(*qkv.shape[:2], heads, qkv.shape[3])
        ctx.save_for_backward(*(x for some in _problems(qkv, heads) for x in _attend(some, qkv, out, ctx.keeps)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        kept = ctx.saved_tensors  # asked for once: a hook may compute them
        each = 2 + (2 if ctx.keeps else 1) * len(_blocks(grad.shape[1]))
        result = grad.new_empty(ctx.shape)
        for index, some in enumerate(_problems(result, ctx.heads)):
            _gradient(some, kept[index * each : (index + 1) * each], ctx.keeps, grad, result)
        return result, None


def _probabilities(q_rows: Tensor, k_PtK: Tensor, size: int, future: Tensor) -> Tensor:
    """Of `size` queries, the last of which is as late as the last key: [P, r*n, t]."""
    scores = _multiply(q_rows, k_PtK.transpose(1, 2), q_rows.shape[2] ** -0.5)
    problems, rows, length = scores.shape
    own = scores.as_strided((problems * rows // size, size, size), (size * length, length, 1), length - size)
    own.add_(future if size == BLOCK else future[:size, :size])
    return torch.softmax(scores, -1, out=scores)


def _future(like: Tensor) -> Tensor:
    return torch.full((BLOCK, BLOCK), -torch.inf, dtype=like.dtype).triu_(1)


def _attend(some: _Problems, qkv: Tensor, out: Tensor, keeps: bool) -> list[Tensor]:
    """Attention into `out`: problems, in which r query heads of n queries each share their keys, so that one product
    serves them all. Returns what the backward needs: keys, values, and the queries, and probabilities, of each block.
    """
    kept = [_side_by_side(part, qkv.dtype) for part in (some.keys(qkv), some.values(qkv))]
    k_PTK, v_PTK = map(wide_of, kept)
    future = _future(k_PTK)
    with by_faster_library(k_PTK):
        for start, stop in _blocks(qkv.shape[1]):
            q_rows = _side_by_side(some.queries(qkv, start, stop), qkv.dtype)
            p = _probabilities(wide_of(q_rows), _first(k_PTK, stop), stop - start, future)
            place = some.queries(out, start, stop)
            place.copy_(torch.bmm(p, _first(v_PTK, stop)).view(place.shape))
            kept += [q_rows, p.to(qkv.dtype)] if keeps else [q_rows]
    return kept


def _gradient(some: _Problems, kept: Sequence[Tensor], keeps: bool, grad: Tensor, result: Tensor) -> None:
    """The gradient by queries, keys and values, into their places in `result`."""
    k_PTK, v_PTK = map(wide_of, kept[:2])
    blocks, scale = _blocks(grad.shape[1]), k_PTK.shape[2] ** -0.5
    known: Sequence[Tensor | None] = kept[3::2] if keeps else len(blocks) * [None]
    sum_k: Tensor | None = None
    sum_v: Tensor | None = None
    with by_faster_library(k_PTK):
        for (start, stop), rows, p in zip(blocks, kept[2 :: 2 if keeps else 1], known, strict=True):
            q_rows, keys = wide_of(rows), _first(k_PTK, stop)
            g_rows = _side_by_side(some.queries(grad, start, stop), k_PTK.dtype)
            p = _probabilities(q_rows, keys, stop - start, _future(keys)) if p is None else wide_of(p)
            sum_v = _add(sum_v, torch.bmm(p.transpose(1, 2), g_rows))
            dp = torch.bmm(g_rows, _first(v_PTK, stop).transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
            place = some.queries(result, start, stop)
            place.copy_(_multiply(ds, keys, scale).view(place.shape))
            sum_k = _add(sum_k, _multiply(ds.transpose(1, 2), q_rows, scale))
    for place, total in ((some.keys(result), sum_k), (some.values(result), sum_v)):
        assert total is not None
        place.copy_(total.view(place.shape))


def _first(x_PTK: Tensor, stop: int) -> Tensor:
    """What is before `stop`."""
    return x_PTK if stop == x_PTK.shape[1] else x_PTK.narrow(1, 0, stop)


def _multiply(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """factor a b, without a pass for the factor."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return out.baddbmm_(a, b, beta=0, alpha=factor)


def _add(total: Tensor | None, part_PtK: Tensor) -> Tensor:
    """The sum, in the memory of the first part, which must be the longest."""
    if total is None:
        return part_PtK
    _first(total, part_PtK.shape[1]).add_(part_PtK)
    return total
