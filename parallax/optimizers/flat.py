"""Any elementwise torch optimizer over a few flat tensors a stage, for who brings one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Segment
from parallax.optimizers.masters import Masters

__all__ = ["FlatOptimizer"]

Group = Callable[[Segment], Mapping[str, Any]]


class FlatOptimizer(Masters):
    """One torch optimizer over all segments that this rank updates.

    make: builds it from parameter groups. group_of: the options of the group that a segment belongs to. Its state is
    laid out as the segments are, so a rank has state for what it updates alone. Collectives: none.
    """

    def __init__(
        self,
        flats: Mapping[int, FlatBuffers],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        group_of: Group = lambda segment: {},
    ) -> None:
        super().__init__(flats)
        groups: list[dict[str, Any]] = []
        for stage, flat in flats.items():
            for master, segment in zip(self.masters[stage], flat.segments, strict=True):
                options = dict(group_of(segment))
                found = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == options), None)
                if found is None:
                    groups.append(found := {"params": [], **options})
                found["params"].append(master)
        self.inner = make(groups)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients in the flat buffers."""
        self.show_grads()
        self.inner.step()
        for masters in self.masters.values():
            for master in masters:
                master.grad = None
        self.publish()

    def show_grads(self) -> None:
        """Let the masters have the gradients in the flat buffers."""
        for stage, flat in self.flats.items():
            for master, segment in zip(self.masters[stage], flat.segments, strict=True):
                master.grad = flat.grads_of(segment).to(master.dtype)
