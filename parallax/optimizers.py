"""Optimizers over flat buffers, with float32 master weights where the model computes in less."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallax.config import OptimizerConfig
from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Segment

__all__ = ["AdamW", "FlatOptimizer"]

Group = Callable[[Segment], Mapping[str, Any]]


class FlatOptimizer:
    """Any elementwise torch optimizer over a few flat tensors a stage: the segments that this rank updates.

    make: builds it from parameter groups. group_of: the options of the group that a segment belongs to. The state is
    laid out as the segments of the parameters are, so that the checkpoint cuts both alike, and a rank has
    state for what it updates alone. Collectives: none.
    """

    def __init__(
        self,
        flats: Mapping[int, FlatBuffers],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        group_of: Group = lambda segment: {},
    ) -> None:
        self.flats = flats
        self._masters: dict[int, list[nn.Parameter]] = {}
        groups: list[dict[str, Any]] = []
        for stage, flat in flats.items():
            values = [flat.values_of(segment) for segment in flat.segments]
            self._masters[stage] = [nn.Parameter(v.float() if narrow(flat) else v) for v in values]
            for master, segment in zip(self._masters[stage], flat.segments, strict=True):
                options = dict(group_of(segment))
                found = next((g for g in groups if {k: v for k, v in g.items() if k != "params"} == options), None)
                if found is None:
                    groups.append(found := {"params": [], **options})
                found["params"].append(master)
        self.inner = make(groups)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients in the flat buffers."""
        for stage, flat in self.flats.items():
            for master, segment in zip(self._masters[stage], flat.segments, strict=True):
                master.grad = flat.grads_of(segment).to(master.dtype)
        self.inner.step()
        for masters in self._masters.values():
            for master in masters:
                master.grad = None
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's own parameters, where they are not the same memory."""
        for stage, flat in self.flats.items():
            if narrow(flat):
                for segment, master in zip(flat.segments, self._masters[stage], strict=True):
                    flat.values_of(segment).copy_(master)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's own parameters as masters: they were loaded from elsewhere."""
        for stage, flat in self.flats.items():
            if narrow(flat):
                for segment, master in zip(flat.segments, self._masters[stage], strict=True):
                    master.copy_(flat.values_of(segment))

    def flat_state(self, stage: int) -> dict[str, list[Tensor]]:
        """What a checkpoint holds of a stage, by kind: a tensor for each of the stage's segments."""
        masters = self._masters[stage]
        states = [self.inner.state.get(master, {}) for master in masters]
        kinds = {kind for state in states for kind, value in state.items() if _elementwise(value)}
        found = {"parameters": [master.detach() for master in masters]}
        return found | {kind: [state[kind] for state in states] for kind in sorted(kinds)}


def narrow(flat: FlatBuffers) -> bool:
    """Whether parameters are too coarse to add small updates to."""
    return flat.dtype in (torch.bfloat16, torch.float16)


def _elementwise(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


class AdamW(FlatOptimizer):
    """torch's fused AdamW (arXiv:1711.05101). Norms and biases do not decay."""

    def __init__(self, config: OptimizerConfig, flats: Mapping[int, FlatBuffers]) -> None:
        super().__init__(
            flats,
            lambda groups: torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True),
            lambda segment: {"weight_decay": config.weight_decay if segment.decay else 0.0},
        )
        for masters in self._masters.values():  # before the first step, so that a checkpoint finds its places
            for master in masters:
                self.inner.state[master] = {
                    "step": torch.zeros((), dtype=torch.float32, device=master.device),
                    "exp_avg": torch.zeros_like(master, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
                }

    def step_at(self, lr: float) -> None:
        """One update with this learning rate."""
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.step()

    def set_step(self, step: int) -> None:
        """Resume the bias correction at this many steps done."""
        for state in self.inner.state.values():
            state["step"].fill_(float(step))
