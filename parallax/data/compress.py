"""Ways to send a gradient in less: what one rank contributes, and how all ranks add the contributions up.

Each is a generator over the matrices of one bucket. It yields collectives under way and is sent their results; at its
end every matrix M holds the sum of all ranks' contributions, the same bits on each rank, and `left` what this rank's
contribution did not say: M - contribution. With that added to the next step's gradient (error feedback,
arXiv:1901.09847) nothing is lost, only late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parallax.comm import Pending, all_gather_start, sum_start
from parallax.mesh import Axis

__all__ = ["METHODS", "Compressed", "Method", "Steps", "padded_sum"]

Steps = Generator[Pending, Tensor, None]


@dataclass(slots=True, eq=False)
class Compressed:
    """A gradient as a matrix M [A, B], in memory that the sum replaces.

    left: where what is not said goes. state: what a method keeps from step to step; next_state: after this one.
    """

    matrix: Tensor
    left: Tensor
    state: Tensor | None = None
    next_state: Tensor | None = None


Method = Callable[[Sequence[Compressed], Axis], Steps]


def padded_sum(parts: Sequence[Tensor], axis: Axis) -> Pending:
    """Begin the sum of some tensors in one message, in rank order; its length is a multiple of the ranks."""
    total = sum(part.numel() for part in parts)
    message = parts[0].new_zeros(math.ceil(total / axis.size) * axis.size)
    torch.cat([part.reshape(-1) for part in parts], out=message[:total])
    return sum_start(message, axis)


def split(message: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    parts = message[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def cast(items: Sequence[Compressed], axis: Axis, *, dtype: torch.dtype) -> Steps:
    """In a narrower dtype: 2(n-1)/n of its bytes."""
    said = [item.matrix.to(dtype) for item in items]
    for item, part in zip(items, said, strict=True):
        torch.sub(item.matrix, part, out=item.left)
    total = yield padded_sum(said, axis)
    for item, part in zip(items, split(total, [tuple(item.matrix.shape) for item in items]), strict=True):
        item.matrix.copy_(part)


def powersgd(items: Sequence[Compressed], axis: Axis) -> Steps:
    """PowerSGD (arXiv:1905.13727, algorithm 1) of rank r, with Q of the step before: r(A + B) numbers for A B.

    P = sum of M Q, made orthogonal; Q = sum of M^T P; the sum is P Q^T, a rank's part of it P (M^T P)^T.
    Sends 2(n-1)/n of 4 r (A + B) bytes a matrix, in two messages.
    """
    for item in items:
        assert item.state is not None
    products = [item.matrix @ item.state for item in items if item.state is not None]
    total = yield padded_sum(products, axis)
    bases = [torch.linalg.qr(p)[0] for p in split(total, [tuple(p.shape) for p in products])]
    mine = [item.matrix.T @ p for item, p in zip(items, bases, strict=True)]
    total = yield padded_sum(mine, axis)
    sums = split(total, [tuple(q.shape) for q in mine])
    for item, p, q, every in zip(items, bases, mine, sums, strict=True):
        torch.sub(item.matrix, p @ q.T, out=item.left)
        torch.mm(p, every.T, out=item.matrix)
        item.next_state = every.clone()


def onebit(items: Sequence[Compressed], axis: Axis) -> Steps:
    """The sign of each number, and the mean size of a matrix (Seide et al., Interspeech 2014; arXiv:2102.02888).

    Sends (n-1) times A B / 8 bytes and 4 more a matrix, in one message.
    """
    scales = torch.stack([item.matrix.abs().mean() for item in items])
    flat = torch.cat([(item.matrix >= 0).view(-1) for item in items])
    packed = pack_bits(flat)
    message = torch.cat([scales.view(torch.uint8), packed])
    every = (yield all_gather_start(message, axis)).view(axis.size, -1)
    for item, part, scale in zip(items, split(flat, [tuple(i.matrix.shape) for i in items]), scales, strict=True):
        torch.sub(item.matrix, torch.where(part, scale, -scale), out=item.left)
        item.matrix.zero_()
    for row in every:
        theirs = row[: scales.nbytes].clone().view(scales.dtype)
        bits = unpack_bits(row[scales.nbytes :], flat.numel())
        for item, part, scale in zip(items, split(bits, [tuple(i.matrix.shape) for i in items]), theirs, strict=True):
            item.matrix.add_(torch.where(part, scale, -scale))


def topk(items: Sequence[Compressed], axis: Axis, *, ratio: float) -> Steps:
    """The largest numbers alone, a share of each matrix, with their places (arXiv:1712.01887).

    Sends (n-1) times 8 bytes (float32) for each of them, in one message.
    """
    counts = [max(1, round(ratio * item.matrix.numel())) for item in items]
    places = [item.matrix.view(-1).abs().topk(k).indices for item, k in zip(items, counts, strict=True)]
    values = [item.matrix.view(-1)[place] for item, place in zip(items, places, strict=True)]
    parts = [torch.cat(values).view(torch.uint8), torch.cat(places).to(torch.int32).view(torch.uint8)]
    every = (yield all_gather_start(torch.cat(parts), axis)).view(axis.size, -1)
    for item, place in zip(items, places, strict=True):
        item.left.copy_(item.matrix).view(-1)[place] = 0
        item.matrix.zero_()
    for row in every:
        theirs = row[: parts[0].numel()].clone().view(values[0].dtype).split(counts)
        where = row[parts[0].numel() :].clone().view(torch.int32).long().split(counts)
        for item, value, place in zip(items, theirs, where, strict=True):
            item.matrix.view(-1)[place] += value  # a rank names no place twice


def pack_bits(bits: Tensor) -> Tensor:
    """Eight booleans a byte."""
    padded = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, device=bits.device)
    return (padded * weights).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[:, None] >> shifts) & 1).view(-1)[:count].bool()


def method(name: str, ratio: float) -> Method:
    """The method of that name. ratio: the share that topk keeps."""
    return partial(topk, ratio=ratio) if name == "topk" else METHODS[name]


METHODS: Mapping[str, Method] = {
    "bfloat16": partial(cast, dtype=torch.bfloat16),
    "float16": partial(cast, dtype=torch.float16),
    "powersgd": powersgd,
    "onebit": onebit,
}
