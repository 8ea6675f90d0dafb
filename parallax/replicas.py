"""The guard over copies: parameters that several ranks hold must be the same bits, always.

Copies drift apart through a bit that flips, a kernel that is not deterministic, or a bug; the loss shows it late, if
ever.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from parallax.comm import all_gather, gather_json
from parallax.errors import ReplicaError
from parallax.params import ParamSpec

if TYPE_CHECKING:
    from parallax.assemble import Run

__all__ = ["check_replicas"]

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(values: Tensor) -> Tensor:
    """The sum of the values' bits, as integers that wrap: any one flipped bit changes it. An int64 scalar."""
    flat = values.detach().reshape(-1)
    # Eight bytes to an integer: many times as fast as to widen each value.
    each = 8 // flat.element_size()
    if flat.storage_offset() % each or flat.data_ptr() % 8:
        flat = flat.clone()
    whole = flat.numel() // each * each
    rest = flat[whole:].view(INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
    return rest + flat[:whole].view(torch.int64).sum()


def check_replicas(run: Run) -> None:
    """Compare a checksum of every parameter over data, over tensor where it is not cut, and of tied ones over pipeline.

    With data.zero=3 a rank has a part only, which is compared over the ranks that hold the same (data.shard_size), and
    over tensor with whoever holds the same elements.
    Reads every parameter once. Collectives: one all-gather of 8 bytes a parameter over data; over tensor, and then over
    the shards, two JSON texts of some 60 bytes a parameter that is not cut over tensor; one over the world. Raises
    ReplicaError on every rank alike; it names the first parameter and the ranks that differ from most.
    """
    if run.config.data.zero < 3:
        run.sync.gather_all()
    parts = _split(list(_parts(run)), run)
    sums = torch.stack([checksum(part.values) for part in parts]) if parts else torch.zeros(0, dtype=torch.int64)
    sums = sums.to(run.mesh.device)
    read = sums.tolist()
    problems = _over_data(sums, parts, run) + _over_tensor(read, parts, run) + _tied(read, parts, run)
    every = gather_json(
        [[run.order[name], name, axis, run.mesh.rank] for name, axis in problems], run.mesh.world, run.mesh.device
    )
    found = sorted(tuple(problem) for of_rank in every for problem in of_rank)
    if found:
        _, name, axis, _ = found[0]
        ranks = sorted({rank for _, other, at, rank in found if (other, at) == (name, axis)})
        raise ReplicaError(
            f"{name} is not the same on all ranks along {axis} that hold a copy: rank {', '.join(map(str, ranks))} "
            f"differ{'s' if len(ranks) == 1 else ''} ({len({n for _, n, _, _ in found})} parameters in all). A flipped "
            "bit, or a kernel that is not deterministic: resume from the last checkpoint, and test that machine"
        )


class _Part(NamedTuple):
    """Elements [first, last) of a canonical parameter, or of this rank's box of it: row by row."""

    spec: ParamSpec
    first: int
    last: int
    values: Tensor

    def cut(self, first: int, last: int) -> _Part:
        return self._replace(first=first, last=last, values=self.values[first - self.first : last - self.first])


def _parts(run: Run) -> Iterator[_Part]:
    """What this rank holds."""
    for flat in run.flats.values():
        if run.config.data.zero == 3:
            for piece in flat.pieces:
                values = flat.values_of(flat.segments[piece.segment])[piece.start : piece.stop]
                yield _Part(piece.spec, piece.first, piece.first + len(values), values)
            continue
        for placed in flat.placed:
            for spec in placed.specs:
                values = spec.view(placed.parameter).detach().reshape(-1)
                yield _Part(spec, 0, len(values), values)


def _split(parts: Sequence[_Part], run: Run) -> list[_Part]:
    """The same, cut wherever a part of another rank along tensor that holds the same parameter begins or ends.

    A shard's ends are elsewhere on a rank whose share of the vocabulary has another size, and then so are the copies'.
    """
    if run.mesh.tensor.size == 1:
        return list(parts)
    mine = [[part.spec.name, part.first, part.last] for part in parts if len(part.spec.tensor_ranks) > 1]
    ends: defaultdict[str, set[int]] = defaultdict(set)
    for of_rank in _along_tensor(mine, run):
        for name, first, last in of_rank:
            ends[name] |= {first, last}
    found = []
    for part in parts:
        within = sorted(end for end in ends[part.spec.name] if part.first < end < part.last)
        found += [part.cut(a, b) for a, b in itertools.pairwise([part.first, *within, part.last])]
    return found


def _along_tensor(mine: list[Any], run: Run) -> list[list[Any]]:
    """By the coordinate along tensor what its ranks said: with data.zero=3 all that hold shards, else one of them."""
    every = gather_json(mine, run.mesh.tensor, run.mesh.device)
    if run.config.data.zero < 3:
        return every
    of_shards = gather_json(every, run.shards, run.mesh.device)
    return [[row for of_shard in of_shards for row in of_shard[rank]] for rank in range(run.mesh.tensor.size)]


def _over_data(sums: Tensor, parts: Sequence[_Part], run: Run) -> list[tuple[str, str]]:
    """What this rank holds otherwise than most of those who hold the same: all of an axis, so in the same order."""
    axis = run.replicas if run.config.data.zero == 3 else run.mesh.grad
    if axis.size == 1:
        return []
    every = all_gather(sums[None], axis).tolist()
    columns = zip(parts, zip(*every, strict=True), strict=True)
    return [(part.spec.name, "data") for part, values in columns if values[axis.rank] != _usual(values)]


def _over_tensor(sums: Sequence[int], parts: Sequence[_Part], run: Run) -> list[tuple[str, str]]:
    """The same over tensor, where a rank holds a copy of what others hold or does not."""
    axis = run.mesh.tensor
    if axis.size == 1:
        return []
    shared = [(part, value) for part, value in zip(parts, sums, strict=True) if len(part.spec.tensor_ranks) > 1]
    mine = [[part.spec.name, part.first, part.last, value] for part, value in shared]
    copies: defaultdict[tuple[str, int, int], dict[int, int]] = defaultdict(dict)
    for rank, of_rank in enumerate(_along_tensor(mine, run)):
        for name, first, last, value in of_rank:
            copies[name, first, last][rank] = value
    problems = []
    for part, value in shared:
        of_part = copies[part.spec.name, part.first, part.last]
        if value != _usual([of_part[rank] for rank in part.spec.tensor_ranks if rank in of_part]):
            problems.append((part.spec.name, "tensor"))
    return problems


def _usual(values: Sequence[int]) -> int:
    """What most have; of several, what the first rank has."""
    return Counter(values).most_common(1)[0][0]


def _tied(sums: Sequence[int], parts: Sequence[_Part], run: Run) -> list[tuple[str, str]]:
    """Tied weights whose two uses lie on two stages; the later one is said to differ."""
    problems = []
    for tie in run.sync.ties if run.config.data.zero < 3 else ():
        mine = [value for part, value in zip(parts, sums, strict=True) if part.spec.name == tie.name]
        every = gather_json(mine, run.mesh.pipeline, run.mesh.device)
        first, last = every[tie.ranks[0]][0], every[tie.ranks[1]][-1]
        if first != last and run.mesh.pipeline.rank == tie.ranks[1]:
            problems.append((tie.name, "pipeline"))
    return problems
