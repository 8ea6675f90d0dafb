"""Whole pipelines in one process: every stage here, messages through a LocalTransport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from parallax.assemble import build_flat, build_stage
from parallax.data.late import Tie
from parallax.data.replicate import Replicate
from parallax.gradients import GradSink, attach
from parallax.mesh import init_mesh
from parallax.models.costs import unit_costs
from parallax.models.transformer import TIED
from parallax.optimizers import TrainOptimizer
from parallax.params import collect
from parallax.pipeline.executor import Executor, run_together
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.schedules import one_f_one_b, split_backward
from parallax.pipeline.split import Unit
from parallax.pipeline.transport import LocalTransport
from parallax.stage_plan import split_units
from tests.cases import make_batch, make_config

SMALL: dict[str, Any] = {
    "dtype": "float32",
    "model.layers": 6,
    "model.hidden": 32,
    "model.ffn": 40,
    "corpus.sequence_length": 8,
    "batch.global_size": 12,
    "batch.num_microbatches": None,
}
FEW_HEADS: dict[str, Any] = {"model.heads": 4, "model.kv_heads": 2}


class _Turns:
    """One sync for the executors of all ranks: what each of them finishes is finished once, by the caller."""

    def __init__(self, sync: Replicate) -> None:
        self._sync = sync

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "finish" else getattr(self._sync, name)


class LocalPipeline:
    """A model of `schedule.num_stages` stages, trained in this process."""

    def __init__(self, schedule: Schedule, **changes: Any) -> None:
        self.config = make_config("1x1x1", **SMALL | changes | FEW_HEADS)
        self.mesh = init_mesh("1x1x1", device_type="cpu")
        self.schedule = lower(schedule)
        costs = unit_costs(self.config.model, self.config.corpus.sequence_length)
        spans = split_units(self.config, tuple(Unit(*cost) for cost in costs), self.schedule)
        self.stages: dict[int, Any] = {}
        specs, sinks = {}, {}
        for stage, span in enumerate(spans):
            module = build_stage(self.config, self.mesh, range(*span))
            specs[stage], sinks[stage] = collect(module, self.mesh), GradSink()
            attach(module, sinks[stage])
            self.stages[stage] = module
        ties = []
        if self.config.model.tie_embeddings:
            ties = [Tie(TIED[0], (0, len(spans) - 1), (0, self.schedule.num_ranks - 1))]
        names = {tie.name for tie in ties}
        alone = self.mesh.data
        self.flats = {s: build_flat(self.config, self.mesh, m, specs[s], names, alone) for s, m in self.stages.items()}
        self.sync = Replicate(self.mesh, self.flats, sinks, ties)
        self.optimizer = TrainOptimizer(self.config.optimizer, self.flats)
        transport = LocalTransport()
        self.executors = [
            Executor(
                {s: self.stages[s] for s in self.schedule.stages_of(rank)},
                {s: sinks[s] for s in self.schedule.stages_of(rank)},
                self.schedule,
                rank,
                transport,
                _Turns(self.sync),
            )
            for rank in range(self.schedule.num_ranks)
        ]

    def run(self, step: int) -> Tensor:
        """Forward and backward of one batch; returns the loss."""
        batch = make_batch(self.config, self.mesh, step)
        microbatches = batch.split(self.schedule.num_microbatches)
        self.sync.zero()
        losses = run_together(self.executors, [microbatches] * len(self.executors), scale=1 / max(1, batch.num_tokens))
        self.sync.finish()
        return torch.stack(losses).sum()

    def train(self, num_steps: int) -> Mapping[str, Tensor]:
        """The parameters by canonical name, after some steps."""
        for step in range(num_steps):
            self.run(step)
            self.optimizer.step_at(0.01)
        return {
            spec.name: spec.view(placed.of(flat.values)).clone()
            for flat in self.flats.values()
            for placed in flat.placed
            if placed.start < flat.stop
            for spec in placed.specs
        }


def split_1f1b(num_ranks: int, num_microbatches: int, delay: int) -> Schedule:
    """1f1b with every W the same number of backwards after its I."""
    base = one_f_one_b(num_ranks, num_microbatches)
    return split_backward(base, f"1f1b-split-{delay}", [delay] * num_ranks)


def two_stages_a_rank(num_ranks: int, num_microbatches: int) -> Schedule:
    """A plain schedule whose ranks hold two stages each, there and back: neighbours on one rank send nothing."""
    stages = 2 * num_ranks
    places = tuple(min(s, stages - 1 - s) for s in range(stages))
    every = range(num_microbatches)
    programs = []
    for rank in range(num_ranks):
        low, high = rank, stages - 1 - rank
        forward = [Action(s, Op.F, m) for s in (low, high) for m in every]
        backward = [Action(s, Op.B, m) for s in (high, low) for m in every]
        programs.append(tuple(forward + backward))
    return Schedule("v-gpipe", num_microbatches, places, tuple(programs))
