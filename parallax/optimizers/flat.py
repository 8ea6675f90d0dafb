"""Any elementwise torch optimizer over a few flat tensors a stage, for who brings one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from parallax.data.buckets import FlatBuffers
from parallax.optimizers.masters import Masters

__all__ = ["FlatOptimizer"]

Group = Callable[[str], Mapping[str, Any]]


class FlatOptimizer(Masters):
    """One torch optimizer over all segments that this rank updates.

    make: builds it from parameter groups. group_of: the options of the group that segments of a kind belong to. Every
    rank has the same groups, also those of which it updates nothing. The state is laid out as the segments are, so a
    rank has state for what it updates alone. Collectives: none.
    """

    def __init__(
        self,
        flats: Mapping[int, FlatBuffers],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        group_of: Group = lambda kind: {},
    ) -> None:
        super().__init__(flats)
        kinds = {f.kind_of(p.specs[0]) for f in flats.values() for p in f.placed if p.start < f.stop}
        groups: list[dict[str, Any]] = []
        self.group_of_kind: dict[str, int] = {}
        for kind in sorted(kinds):
            options = dict(group_of(kind))
            alike = [i for i, g in enumerate(groups) if {k: v for k, v in g.items() if k != "params"} == options]
            if not alike:
                groups.append({"params": [], **options})
            self.group_of_kind[kind] = alike[0] if alike else len(groups) - 1
        for stage, flat in flats.items():
            for master, segment in zip(self.masters[stage], flat.segments, strict=True):
                groups[self.group_of_kind[segment.kind]]["params"].append(master)
        self.inner = make(groups)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients in the flat buffers, of the parameters as they are: a script may have written
        into them since the last one."""
        self.refresh()
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
