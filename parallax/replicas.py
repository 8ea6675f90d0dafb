"""The guard over copies: parameters that several ranks hold must be the same bits, always.

Copies drift apart through a bit that flips, a kernel that is not deterministic, or a bug; the loss shows it late, if
ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallax.comm import all_gather, gather_json
from parallax.errors import ReplicaError
from parallax.mesh import Axis

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

    With data.zero=3 a rank has a part only, which is compared over the ranks that hold the same (data.shard_size).
    Reads every parameter once. Collectives: one all-gather of 8 bytes a parameter over each axis, a JSON text over the
    world. Raises ReplicaError on every rank alike; it names the first parameter and the ranks that differ from most.
    """
    if run.config.data.zero < 3:
        run.sync.gather_all()
    rows = list(_rows(run))
    names = [name for name, _, _ in rows]
    sums = torch.stack([value for _, value, _ in rows]) if rows else torch.zeros(0, dtype=torch.int64)
    sums = sums.to(run.mesh.device)
    problems = []
    copies = run.replicas if run.config.data.zero == 3 else run.mesh.grad
    everyone = [tuple(range(copies.size))] * len(rows)
    problems += _differences(sums, names, copies, everyone, "data")
    problems += _differences(sums, names, run.mesh.tensor, [ranks for _, _, ranks in rows], "tensor")
    problems += _tied(run, rows)
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


def _rows(run: Run) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """(canonical name, checksum, coordinates along tensor of those that hold the same) of what this rank holds."""
    for flat in run.flats.values():
        if run.config.data.zero == 3:
            for piece in flat.pieces:
                values = flat.values_of(flat.segments[piece.segment])[piece.start : piece.stop]
                yield piece.spec.name, checksum(values), piece.spec.tensor_ranks
            continue
        for placed in flat.placed:
            for spec in placed.specs:
                yield spec.name, checksum(spec.view(placed.parameter)), spec.tensor_ranks


def _differences(
    sums: Tensor, names: Sequence[str], axis: Axis, holders: Sequence[tuple[int, ...]], what: str
) -> list[tuple[str, str]]:
    """What this rank holds otherwise than most of those who hold the same."""
    if axis.size == 1:
        return []
    every = all_gather(sums[None], axis).tolist()
    problems = []
    for place, (name, ranks) in enumerate(zip(names, holders, strict=True)):
        values = Counter(every[rank][place] for rank in ranks)
        usual = max(values, key=lambda value: (values[value], -[every[r][place] for r in ranks].index(value)))
        if every[axis.rank][place] != usual:
            problems.append((name, what))
    return problems


def _tied(run: Run, rows: Sequence[tuple[str, Tensor, tuple[int, ...]]]) -> list[tuple[str, str]]:
    """Tied weights whose two uses lie on two stages; the later one is said to differ."""
    problems = []
    for tie in run.sync.ties if run.config.data.zero < 3 else ():
        mine = [int(value) for name, value, _ in rows if name == tie.name]
        every = gather_json(mine, run.mesh.pipeline, run.mesh.device)
        first, last = every[tie.ranks[0]][0], every[tie.ranks[1]][-1]
        if first != last and run.mesh.pipeline.rank == tie.ranks[1]:
            problems.append((tie.name, "pipeline"))
    return problems
