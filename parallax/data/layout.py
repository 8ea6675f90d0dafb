"""Where each parameter of a stage lies in its flat buffers, and which elements this rank updates. No memory here.

The buffers are laid out

    [ early, in reverse order of use | late, those that the optimizer treats alike together | tied ]

early: gradients that are final once their stage's last backward has passed them; cut into buckets. late: those that
need a sum over another axis first (norms under sequence parallelism, tied embeddings), and the small ones: one more
bucket. tied: second uses of a parameter of the same stage, which the optimizer never sees. Every parameter starts at a
multiple of 64 elements, so that vectorised kernels treat an element alike wherever a stage split puts it.

With n shards each bucket is cut in n equal ranges of whole 64s, and rank r owns the r-th of each: so a bucket is one
reduce-scatter and one all-gather, and no parameter has to fit a shard.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from parallax.params import Box, ParamSpec

__all__ = ["Bucket", "FlatLayout", "Piece", "Placed", "Segment", "boxes_of_range", "decay_kind"]

ALIGN = 64


def decay_kind(spec: ParamSpec) -> str:
    """`decay` or `no_decay`."""
    return "decay" if spec.decay else "no_decay"


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A parameter in the flat buffers: elements [start, start + numel)."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    specs: tuple[ParamSpec, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def of(self, flat: Tensor, base: int = 0) -> Tensor:
        """The parameter's part of a flat buffer that starts at element `base`, in the parameter's shape."""
        return flat[self.start - base : self.stop - base].view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Elements [start, stop), reduced and gathered in one call, and the parameters that fill them.

    own: the range that this rank updates; own_at: where it begins when a rank's ranges are laid end to end.
    """

    start: int
    stop: int
    placed: tuple[Placed, ...]
    late: bool
    own: tuple[int, int]
    own_at: int

    @property
    def name(self) -> str:
        """The name of its first parameter: which bucket it is, in a message to people."""
        return self.placed[0].name


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of elements [start, stop) that this rank's optimizer treats alike: `kind` says how.

    own_at: where it begins when a rank's segments are laid end to end.
    """

    start: int
    stop: int
    kind: str
    own_at: int


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What a segment holds of one canonical parameter: elements [start, stop) of the segment, without padding.

    first: the place of the first of them among the elements of this rank's box, row by row.
    """

    spec: ParamSpec
    segment: int
    start: int
    stop: int
    first: int

    def boxes(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Box, int, int]]:
        """The boxes of the global tensor that the piece consists of, each with its elements of the segment; of the
        segment's elements [start, stop) alone where given.
        """
        at, last = max(start, self.start), self.stop if stop is None else min(stop, self.stop)
        skipped = self.first - self.start
        for box in boxes_of_range(self.spec.box_shape, at + skipped, last + skipped):
            size = math.prod(b - a for a, b in box)
            shifted = tuple((a + o, b + o) for (a, b), (o, _) in zip(box, self.spec.box, strict=True))
            yield shifted, at, at + size
            at += size


def boxes_of_range(shape: tuple[int, ...], first: int, last: int) -> Iterator[Box]:
    """The boxes, in order, that make up elements [first, last) of a row-major tensor: at most 2 a dim and one more."""
    if first >= last:
        return
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    begin, end = -(-first // row), last // row  # whole rows
    if begin > end:  # inside of one row
        for box in boxes_of_range(shape[1:], first - end * row, last - end * row):
            yield ((end, end + 1), *box)
        return
    for box in boxes_of_range(shape[1:], first - (begin - 1) * row, row) if first < begin * row else ():
        yield ((begin - 1, begin), *box)
    if begin < end:
        yield ((begin, end), *((0, size) for size in shape[1:]))
    for box in boxes_of_range(shape[1:], 0, last - end * row):
        yield ((end, end + 1), *box)


class FlatLayout:
    """The layout of one stage. ranks: how many sum it; a bucket is a multiple of 64 times that. shards, shard: in how
    many ranges each bucket is cut (a divisor of ranks), and which one is this rank's.

    named: (name, parameter, shape) in order of use. tied: canonical names of parameters that have a second use, on this
    stage or on another. group_of: buckets are cut where the group of their parameters changes, and only there; a group
    of None is late. Without it a bucket holds at least bucket_bytes, the last excepted. itemsize: of a gradient.
    kind_of: how the optimizer treats a parameter; by default whether it decays.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter, tuple[int, ...]]],
        specs: Sequence[ParamSpec],
        *,
        bucket_bytes: int,
        itemsize: int,
        tied: Collection[str] = (),
        ranks: int = 1,
        shards: int = 1,
        shard: int = 0,
        group_of: Callable[[str], str | None] | None = None,
        kind_of: Callable[[ParamSpec], str] = decay_kind,
    ) -> None:
        self.kind_of = kind_of
        self._align = ALIGN * ranks
        self._shards, self._shard = shards, shard
        by_parameter: dict[str, list[ParamSpec]] = {}
        for spec in specs:
            by_parameter.setdefault(spec.parameter, []).append(spec)
        items = [(name, p, shape, tuple(by_parameter[name])) for name, p, shape in named]
        firsts = {spec.name for spec in specs if not spec.tied}
        seconds = [item for item in items if item[3][0].tied and item[3][0].name in firsts]
        rest = [item for item in reversed(items) if item not in seconds]
        # A tied weight waits for its other use, a partial one for a sum over another axis: before the data axis sums.
        late = [
            item
            for item in rest
            if not item[3][0].decay
            or any(s.sum_over or s.name in tied for s in item[3])
            or (group_of is not None and group_of(item[0]) is None)
        ]
        early = [item for item in rest if item not in late]

        self.placed: list[Placed] = []
        self.buckets: list[Bucket] = []
        at = 0
        for members in _runs(early, bucket_bytes / itemsize, group_of):
            at = self._bucket(at, self._place(members, at), late=False)
        self.early_stop = at
        late.sort(key=lambda item: kind_of(item[3][0]))
        self.stop = self._bucket(at, self._place(late, at), late=True)
        self.end = self._place(seconds, self.stop)
        self.by_name = {p.name: p for p in self.placed}
        self.segments = list(self._segments())
        self.pieces = list(self._pieces())

    @property
    def own_size(self) -> int:
        """How many elements this rank updates, padding included."""
        return sum(b.own[1] - b.own[0] for b in self.buckets)

    @property
    def early(self) -> list[Bucket]:
        return [bucket for bucket in self.buckets if not bucket.late]

    @property
    def late(self) -> Bucket | None:
        return self.buckets[-1] if self.buckets and self.buckets[-1].late else None

    def first_use(self, tied: Placed) -> Placed:
        """The placed parameter whose canonical name a tied one bears."""
        name = tied.specs[0].name
        return next(p for p in self.placed if not p.specs[0].tied and p.specs[0].name == name)

    def _place(self, items: Sequence[Item], at: int) -> int:
        for name, parameter, shape, specs in items:
            self.placed.append(Placed(name, parameter, shape, specs, at))
            at += -(-math.prod(shape) // ALIGN) * ALIGN
        return at

    def _bucket(self, start: int, stop: int, *, late: bool) -> int:
        """Close a bucket of what was placed since the last one; returns its end, with padding."""
        if start == stop:
            return start
        stop = start + -(-(stop - start) // self._align) * self._align
        each = (stop - start) // self._shards
        own = (start + self._shard * each, start + (self._shard + 1) * each)
        members = tuple(p for p in self.placed if start <= p.start < stop)
        self.buckets.append(Bucket(start, stop, members, late, own, self.own_size))
        return stop

    def _segments(self) -> Iterator[Segment]:
        ranges = [(*b.own, b.own_at) for b in self.buckets] if self._shards > 1 else [(0, self.stop, 0)]
        runs: list[tuple[int, str]] = []  # where each begins; padding belongs to what is before it
        for placed in self.placed:
            kind = self.kind_of(placed.specs[0])  # of all that are one tensor: whoever names kinds has seen to it
            if placed.start < self.stop and (not runs or runs[-1][1] != kind):
                runs.append((placed.start, kind))
        for start, stop, at in ranges:
            for (first, kind), (last, _) in itertools.pairwise([*runs, (self.stop, "")]):
                begin, end = max(start, first), min(stop, last)
                if begin < end:
                    yield Segment(begin, end, kind, at + begin - start)

    def _pieces(self) -> Iterator[Piece]:
        for placed in self.placed:
            row = math.prod(placed.shape[1:])
            for spec in placed.specs if placed.start < self.stop else ():
                first = placed.start + spec.rows[0] * row if spec.global_shape else placed.start
                size = math.prod(spec.box_shape)
                for index, segment in enumerate(self.segments):
                    start, stop = max(first, segment.start), min(first + size, segment.stop)
                    if start < stop:
                        yield Piece(spec, index, start - segment.start, stop - segment.start, start - first)


Item = tuple[str, nn.Parameter, tuple[int, ...], tuple[ParamSpec, ...]]


def _runs(items: Sequence[Item], least: float, group_of: Callable[[str], str | None] | None) -> Iterator[list[Item]]:
    """Consecutive items that share a bucket."""
    members: list[Item] = []
    for index, item in enumerate(items):
        members.append(item)
        last = index == len(items) - 1
        if group_of is not None:
            full = last or group_of(items[index + 1][0]) != group_of(item[0])
        else:
            full = last or sum(-(-math.prod(m[2]) // ALIGN) * ALIGN for m in members) >= least
        if full:
            yield members
            members = []
