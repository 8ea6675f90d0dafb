"""What compressed gradients owe, in a checkpoint: each data rank its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from parallax.assemble import Run
from parallax.checkpoint import Entry
from parallax.data.compressed import CompressedSync
from parallax.params import ParamSpec

__all__ = ["OWED", "owed_entries", "owed_ranks"]

OWED = ("owed/", "powersgd/")
"""Beginnings of the names of what only a run with data.compression has; another one leaves it."""


def owed_ranks(names: Iterable[str]) -> int:
    """How many data ranks a checkpoint's owed gradients are of; 0 without any."""
    found = {int(name.split("/")[1].partition("of")[2]) for name in names if name.startswith(OWED[0])}
    return max(found, default=0)


def owed_entries(
    run: Run, num_ranks: int, replicas_of: Callable[[ParamSpec], tuple[int, ...]]
) -> tuple[list[Entry], Callable[[], None]]:
    """Entries for what this rank owes, as num_ranks data ranks have it, and what to call once they are filled.

    With as many ranks as this run has they are its own memory. Else a rank reads what all of them owed, and takes an
    equal part of the sum: so nothing is lost, and the sum over ranks is what it was. The state of powersgd is that of a
    local matrix; on another tensor size it starts anew.
    """
    sync, grad, tensor = run.sync, run.mesh.grad, run.mesh.tensor
    if not isinstance(sync, CompressedSync):
        return [], lambda: None
    entries: list[Entry] = []
    sums: list[tuple[Tensor, list[Tensor]]] = []
    for flat in run.flats.values():
        for placed, owed, state in sync.kept(flat):
            for spec in placed.specs:
                same = replicas_of(spec)
                mine = spec.view(owed)
                parts = [mine] if num_ranks == grad.size else [torch.zeros_like(mine) for _ in range(num_ranks)]
                if num_ranks != grad.size:
                    sums.append((mine, parts))
                for number, part in enumerate(parts):
                    rank = grad.rank if num_ranks == grad.size else number
                    holders = tuple(r for r in same if run.mesh.shape.coords(r)["data"] == run.mesh.data.rank)
                    name = f"{OWED[0]}{rank}of{num_ranks}/{spec.name}"
                    entries.append(Entry(name, spec.global_shape, spec.box, part, holders))
            if state is not None:
                box = tuple((0, size) for size in state.shape)
                holders = tuple(
                    r for r in replicas_of(placed.specs[0]) if run.mesh.shape.coords(r)["tensor"] == tensor.rank
                )
                name = f"{OWED[1]}{tensor.rank}of{tensor.size}/{placed.specs[0].name}"
                entries.append(Entry(name, tuple(state.shape), box, state, holders))

    def spread() -> None:
        for mine, parts in sums:
            mine.copy_(sum(parts[1:], start=parts[0]) / grad.size if parts else mine)

    return entries, spread
