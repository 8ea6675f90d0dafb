"""The hook on buckets: one bucket's gradients summed over the data ranks in fewer bytes than they have.

A compressor sends a part of what it is given and leaves the rest behind; error feedback (feedback.py) adds that to the
next step's gradients. What is compressed is each canonical parameter's box by itself, never a bucket or a fused weight
as a whole: so ranks that hold the same box, be they tensor ranks or two stages with a tied weight, have the same
gradient before and the same bits after.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallax.comm import Pending, all_gather_start, sum_start
from parallax.data.layout import ALIGN, Bucket
from parallax.mesh import Axis
from parallax.params import ParamSpec

__all__ = ["Chained", "Compressor", "OneBit", "Part", "Steps", "TopK", "parts_of"]

Steps = Generator[Pending, Tensor, None]
"""A reduction in several messages: yields each collective that it has begun, and is sent its result."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One canonical parameter's box in a bucket: its elements [start, stop), which are `rows` rows.

    block: which of the `num_blocks` equal boxes that tensor cuts it into; block_shape: of the first of them as a
    matrix, since the last may have fewer rows.
    """

    spec: ParamSpec
    start: int
    stop: int
    rows: int
    block: int
    num_blocks: int
    block_shape: tuple[int, int]

    @property
    def is_matrix(self) -> bool:
        return len(self.spec.global_shape) > 1

    def of(self, bucket: Tensor) -> Tensor:
        """Its elements of a tensor that has those of the bucket."""
        return bucket[self.start : self.stop]

    def matrix(self, bucket: Tensor) -> Tensor:
        """The same as a matrix: dim 0 by the rest."""
        return self.of(bucket).view(self.rows, -1)


def parts_of(bucket: Bucket) -> Iterator[Part]:
    """What a bucket consists of, padding left out."""
    for placed in bucket.placed:
        row = math.prod(placed.shape[1:])
        for spec in placed.specs:
            size = math.prod(spec.box_shape)
            if not size:
                continue
            start = placed.start - bucket.start + (spec.rows[0] * row if spec.global_shape else 0)
            index, shape = spec.tensor_ranks[0] // len(spec.tensor_ranks), list(spec.box_shape)
            num_blocks = 1
            if "tensor" in spec.shards:
                dim = spec.shards["tensor"]
                first, last = spec.box[dim]
                shape[dim] = first // index if index else last - first
                num_blocks = -(-spec.global_shape[dim] // shape[dim])
            block_shape = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
            rows = spec.box_shape[0] if spec.global_shape else 1
            yield Part(spec, start, start + size, rows, index, num_blocks, block_shape)


class Chained(Pending):
    """A reduction in several messages as one pending collective."""

    __slots__ = ("_current", "_steps")

    def __init__(self, steps: Steps, result: Tensor) -> None:
        super().__init__(result)
        self._steps = steps
        self._current = next(steps, None)

    def advance(self) -> None:
        """Take in what was sent last and send what follows it."""
        if self._current is not None:
            try:
                self._current = self._steps.send(self._current.wait())
            except StopIteration:
                self._current = None

    def wait(self) -> Tensor:
        while self._current is not None:
            self.advance()
        return self._result


class Compressor:
    """How the buckets of one rank's stages are summed over an axis. One that only casts needs none of this: see
    precision.reduce_dtype.

    lossless: nothing is ever left behind. warm: what it keeps from step to step besides, by part, the same on every
    data rank; a resumed run must have it again.
    """

    kind = "none"

    def __init__(self, axis: Axis, parts: Mapping[Bucket, Sequence[Part]]) -> None:
        self.axis = axis
        self.parts = parts
        self.lossless = axis.size == 1
        self.warm: dict[Part, Tensor] = {}

    def takes(self, part: Part) -> bool:
        """Whether the part is compressed; else it goes as it is. The same on every rank that has the parameter."""
        return part.is_matrix and not self.lossless

    def split(self, bucket: Bucket) -> tuple[list[Part], list[Part]]:
        """What is compressed of a bucket, and what goes as it is."""
        parts = self.parts[bucket]
        return [part for part in parts if self.takes(part)], [part for part in parts if not self.takes(part)]

    def reduce(self, bucket: Bucket, delta: Tensor, out: Tensor) -> Steps:
        """Sum `delta`, the bucket's gradients with what was owed, over the axis, into `out`; what is not sent stays
        in `delta`. Both flat, of one dtype, float32 or float64.
        """
        _, plain = self.split(bucket)
        yield from Plain(plain, delta, self.axis).finish(out)

    def commit(self) -> None:
        """The step counts: keep for the next one what this one made."""

    def forget(self) -> None:
        """The step does not count."""


class Plain:
    """The parts that go as they are: one sum of all of them, begun at once. Sends 2(n-1)/n of their bytes, each padded
    to 64 elements and together to 64n."""

    def __init__(self, parts: Sequence[Part], delta: Tensor, axis: Axis) -> None:
        self.parts = parts
        self.message, self.views = message_for([part.stop - part.start for part in parts], delta, axis)
        for part, view in zip(parts, self.views, strict=True):
            view.copy_(part.of(delta))
            part.of(delta).zero_()
        self.pending = sum_start(self.message, axis) if parts else None

    def finish(self, out: Tensor) -> Steps:
        """Wait, and put the sums into their places."""
        if self.pending is not None:
            yield self.pending
            put(self.parts, self.views, out)


def put(parts: Iterable[Part], sums: Iterable[Tensor], out: Tensor) -> None:
    """Put the sums of the parts into their places in the bucket."""
    for part, total in zip(parts, sums, strict=True):
        part.of(out).copy_(total)


def aligned(size: int) -> int:
    """The elements that it takes in a message."""
    return -(-size // ALIGN) * ALIGN


def message_for(sizes: Sequence[int], like: Tensor, axis: Axis) -> tuple[Tensor, list[Tensor]]:
    """Zeros for one message, and a view for each size: aligned, so that it makes no difference what lies before it."""
    starts, at = [], 0
    for size in sizes:
        starts.append(at)
        at += aligned(size)
    whole = ALIGN * axis.size
    message = torch.zeros(-(-at // whole) * whole, dtype=like.dtype, device=like.device)
    return message, [message[start : start + size] for start, size in zip(starts, sizes, strict=True)]


class OneBit(Compressor):
    """Signs, eight to a byte, and a scale for each row of a matrix: the mean of its magnitudes (Seide et al.,
    Interspeech 2014; arXiv:1809.07599). By row, since those of an embedding that had no token must stay zero. Adam,
    which divides by what it gets, learns more slowly with it than without (arXiv:2102.02888).

    Every rank gets every rank's signs. Volume a step and rank, over the n data ranks: (n-1) times an eighth byte an
    element of each bucket, padding too, and 4 bytes a row. So nearly 64/n times less than a sum in float32: at 64 ranks
    there is nothing left to gain.
    """

    kind = "onebit"

    def reduce(self, bucket: Bucket, delta: Tensor, out: Tensor) -> Steps:
        taken, plain = self.split(bucket)
        rest = Plain(plain, delta, self.axis)
        if taken:
            signs = pack(delta)
            num_rows = [part.rows for part in taken]
            scales = torch.cat([part.matrix(delta).abs().mean(1) for part in taken])
            own = _signs(signs, delta)
            for part, scale in zip(taken, scales.split(num_rows), strict=True):
                part.matrix(delta).sub_(part.matrix(own).mul_(scale[:, None]))
            every = yield all_gather_start(torch.cat([signs, scales.view(torch.uint8)]), self.axis)
            for part in taken:
                part.of(out).zero_()
            for row in every.view(self.axis.size, -1):
                theirs = _signs(row[: signs.numel()], delta)
                each = row[signs.numel() :].clone().view(delta.dtype)
                for part, scale in zip(taken, each.split(num_rows), strict=True):
                    part.matrix(out).add_(part.matrix(theirs).mul_(scale[:, None]))
        yield from rest.finish(out)


MAGIC = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as one integer: its highest byte has the eight bits."""


def pack(values: Tensor) -> Tensor:
    """Eight signs to a byte, 1 where a value is at least 0. Their number must divide by 8."""
    bits = (values >= 0).view(torch.int64)
    return ((bits * MAGIC) >> 56).to(torch.uint8)


def _signs(packed: Tensor, like: Tensor) -> Tensor:
    """1 or -1 for each bit."""
    codes = torch.arange(256, device=like.device)
    table = (codes[:, None] >> torch.arange(8, device=like.device) & 1).to(like.dtype) * 2 - 1
    return table.index_select(0, packed.int()).view(-1)


class TopK(Compressor):
    """Of each parameter the elements that are largest in magnitude, with their places (arXiv:1712.01887, without its
    momentum correction). Volume a step and rank: (n-1) times 8 bytes for each element that is sent (12 in float64).

    ratio: the share of elements that are sent; 1 sends all as they are, and so pays what is owed.
    """

    kind = "topk"

    def __init__(self, axis: Axis, parts: Mapping[Bucket, Sequence[Part]], ratio: float) -> None:
        super().__init__(axis, parts)
        self.ratio = ratio
        self.lossless = self.lossless or ratio == 1

    def reduce(self, bucket: Bucket, delta: Tensor, out: Tensor) -> Steps:
        taken, plain = self.split(bucket)
        rest = Plain(plain, delta, self.axis)
        if taken:
            places = torch.cat([self._largest(part, delta) for part in taken])
            values = delta[places]
            delta[places] = 0.0
            message = torch.cat([values.view(torch.uint8), places.int().view(torch.uint8)])
            every = yield all_gather_start(message, self.axis)
            for part in taken:
                part.of(out).zero_()
            # Rank after rank: within one no place occurs twice, so the order of adding is that of the ranks.
            for row in every.view(self.axis.size, -1):
                theirs = row[values.nbytes :].clone().view(torch.int32)
                out.index_add_(0, theirs, row[: values.nbytes].clone().view(delta.dtype))
        yield from rest.finish(out)

    def _largest(self, part: Part, delta: Tensor) -> Tensor:
        count = math.ceil(self.ratio * (part.stop - part.start))
        return part.of(delta).abs().topk(count, sorted=False).indices + part.start


Make = Callable[[Axis, Mapping[Bucket, Sequence[Part]]], Compressor]
"""Makes a compressor for an axis and the parts of every bucket."""
