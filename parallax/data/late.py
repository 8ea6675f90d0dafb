"""What is summed before the data axis sums: both uses of a tied weight, and gradients that are partial over tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallax.comm import all_reduce, exchange_sum
from parallax.data.buckets import FlatBuffers
from parallax.mesh import Mesh

__all__ = ["Tie", "sum_partial", "sum_ties"]


@dataclass(frozen=True, slots=True)
class Tie:
    """A parameter used by two stages. ranks: their coordinates on the pipeline axis, first use first."""

    name: str
    stages: tuple[int, int]
    ranks: tuple[int, int]


def sum_ties(ties: Sequence[Tie], flats: Mapping[int, FlatBuffers], mesh: Mesh) -> None:
    """Give both uses of each tied parameter the sum of their gradients. Sends its bytes once to the peer stage."""
    for tie in ties:
        uses = [_find(flats.get(stage), tie.name, tied=bool(index)) for index, stage in enumerate(tie.stages)]
        here = [use for use in uses if use is not None]
        if len(here) == 2:
            torch.add(here[0], here[1], out=here[0])
            here[1].copy_(here[0])
        elif here:
            peer = tie.ranks[1] if uses[0] is not None else tie.ranks[0]
            here[0].copy_(exchange_sum(here[0], mesh.pipeline, peer))


def _find(flat: FlatBuffers | None, name: str, *, tied: bool) -> Tensor | None:
    for placed in flat.placed if flat else ():
        if placed.specs[0].name == name and placed.specs[0].tied == tied:
            return flat.grad(placed)  # type: ignore[union-attr]
    return None


def sum_partial(flats: Mapping[int, FlatBuffers], mesh: Mesh) -> None:
    """Sum over tensor, in one all-reduce, the gradients of which each rank has only a part."""
    views = [
        (spec, spec.view(flat.grad(placed)))
        for flat in flats.values()
        for placed in flat.placed
        for spec in placed.specs
        if "tensor" in spec.sum_over
    ]
    if not views:
        return
    # Several ranks may hold the same box while others hold another (replicated key/value heads): each puts
    # its part where it belongs in the whole.
    sizes = [spec.global_shape if "tensor" in spec.shards else tuple(view.shape) for spec, view in views]
    message = torch.zeros(sum(map(math.prod, sizes)), dtype=views[0][1].dtype, device=views[0][1].device)
    places, at = [], 0
    for (spec, view), size in zip(views, sizes, strict=True):
        whole = message[at : at + math.prod(size)].view(size)
        places.append(whole[slice(*spec.box[0])] if "tensor" in spec.shards else whole)
        places[-1].copy_(view)
        at += math.prod(size)
    all_reduce(message, mesh.tensor)
    for (_, view), place in zip(views, places, strict=True):
        view.copy_(place)
