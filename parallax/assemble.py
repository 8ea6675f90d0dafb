"""Model, configuration and mesh put together into a run: the only file that imports every room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parallax.comm import gather_json
from parallax.config import Config, ResolvedBatch, check, resolve_batch
from parallax.data.buckets import FlatBuffers
from parallax.data.replicate import Replicate, Tie, spec_grads
from parallax.errors import ConfigError
from parallax.gradients import GradSink, attach
from parallax.mesh import Mesh
from parallax.models.costs import unit_costs
from parallax.models.transformer import TIED, Transformer
from parallax.optimizer import AdamW
from parallax.params import ParamSpec, collect, materialize
from parallax.pipeline.executor import Executor
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Schedule
from parallax.pipeline.schedules import forward_only
from parallax.pipeline.split import Unit, balanced_split, check_partition, split_from_layers, stage_table
from parallax.pipeline.table import get_schedule
from parallax.pipeline.transport import P2P
from parallax.pipeline.validate import Wire, validate
from parallax.step import TrainState

__all__ = ["DTYPES", "Run", "assemble", "build_stage", "plan_run", "plan_stages"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Everything one rank needs to train, fixed for the whole run; what changes is in TrainState.

    stages: this rank's spans of the model. specs: the table of its parameters, by stage. order: every canonical name
    of the whole model -> its place. grads: this rank's gradients by spec. pipeline trains, evaluator runs forward only.
    """

    config: Config
    mesh: Mesh
    batch: ResolvedBatch
    spans: tuple[tuple[int, int], ...]
    units: tuple[Unit, ...]
    schedule: Schedule
    stages: Mapping[int, nn.Module]
    specs: Mapping[int, Sequence[ParamSpec]]
    order: Mapping[str, int]
    flats: Mapping[int, FlatBuffers]
    sync: Replicate
    pipeline: Executor
    evaluator: Executor

    @property
    def grads(self) -> list[tuple[ParamSpec, Tensor]]:
        return spec_grads(self.flats)

    @property
    def flat_grads(self) -> list[Tensor]:
        return [flat.grads for flat in self.flats.values()]

    @property
    def num_parameters(self) -> int:
        """Of the whole model; a tied weight counts once."""
        return sum(unit.params for unit in self.units)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward of the whole model: three times the forward."""
        return 3.0 * sum(unit.flops for unit in self.units)

    def describe(self) -> str:
        """The stage table and the batch equation, for the log."""
        table = stage_table(self.spans, self.units, self.schedule.stage_to_rank)
        return f"{self.num_parameters:,} parameters; schedule {self.schedule.name}; {self.batch.equation}\n{table}"


StageBuilder = Callable[..., nn.Module]


def plan_stages(config: Config, schedule: Schedule) -> tuple[tuple[Unit, ...], tuple[tuple[int, int], ...]]:
    """The units of the model, and which of them each stage holds: balanced, or as pipeline.split says."""
    units = tuple(Unit(*cost) for cost in unit_costs(config.model, config.corpus.sequence_length))
    if config.pipeline.split is not None:
        spans = split_from_layers(config.pipeline.split, units)
    else:
        spans = balanced_split(units, schedule.num_stages, schedule.stage_to_rank)
    check_partition(spans, units)
    return units, tuple(spans)


def plan_run(config: Config) -> tuple[Schedule, tuple[Unit, ...], tuple[tuple[int, int], ...]]:
    """The schedule, lowered and proven, with the units of the model and the span of each stage: no process needed."""
    num_microbatches = resolve_batch(config).num_microbatches
    wish, ranks = config.pipeline, config.mesh_shape.pipeline
    schedule = _prove(get_schedule(wish.schedule, ranks, num_microbatches, wish.stages_per_rank))
    return schedule, *plan_stages(config, schedule)


def build_stage(config: Config, mesh: Mesh, units: Sequence[int], model: StageBuilder = Transformer) -> nn.Module:
    """One stage of the model, on the meta device."""
    return model(
        config.model,
        mesh,
        units,
        sequence_length=config.corpus.sequence_length,
        sequence_parallel=config.tensor.sequence_parallel,
        seed=config.seed,
        dtype=DTYPES[config.dtype],
    )


def assemble(config: Config, mesh: Mesh, model: StageBuilder = Transformer) -> tuple[Run, TrainState]:
    """Build this rank's part of the model and everything that trains it.

    model: makes a stage from (config.model, mesh, units, ...), on the meta device; Transformer unless told.
    Collectives: the names of all parameters are gathered over pipeline once. Raises ConfigError, ScheduleError on
    every rank alike before that.
    """
    if problems := check(config):
        raise ConfigError("; ".join(problems))
    batch = resolve_batch(config)
    schedule, units, spans = plan_run(config)
    evaluation = _prove(forward_only(schedule))
    rank = mesh.pipeline.rank
    stages = {s: build_stage(config, mesh, range(*spans[s]), model) for s in schedule.stages_of(rank)}
    specs = {s: collect(stage, mesh) for s, stage in stages.items()}
    for s, stage in stages.items():
        materialize(stage, specs[s], config.seed, mesh.device, DTYPES[config.dtype])
    sinks = {s: GradSink() for s in stages}
    for s, stage in stages.items():
        attach(stage, sinks[s])
    ties = _ties(config, schedule)
    flats = {
        s: FlatBuffers(
            stage,
            specs[s],
            bucket_bytes=config.data.bucket_bytes,
            grad_dtype=_grad_dtype(config),
            tied={tie.name for tie in ties},
        )
        for s, stage in stages.items()
    }
    sync = Replicate(mesh, flats, sinks, ties)
    transport = P2P(mesh, schedule.num_stages)
    pipeline, evaluator = (
        Executor(stages, sinks, s, rank, transport, sync, mesh.device)  # type: ignore[arg-type]
        for s in (schedule, evaluation)
    )
    run = Run(
        config=config,
        mesh=mesh,
        batch=batch,
        spans=spans,
        units=units,
        schedule=schedule,
        stages=stages,
        specs=specs,
        order=_canonical_order(specs, mesh),
        flats=flats,
        sync=sync,
        pipeline=pipeline,
        evaluator=evaluator,
    )
    return run, TrainState(AdamW(config.optimizer, flats))


def _prove(schedule: Schedule) -> Schedule:
    """Lowered, and shown to end on an ordered wire before any process runs it."""
    lowered = lower(schedule)
    validate(lowered, wire=Wire.ORDERED)
    return lowered


def _grad_dtype(config: Config) -> torch.dtype:
    parameter = DTYPES[config.dtype]
    if parameter == torch.float64 or config.data.grad_dtype == "parameter":
        return parameter
    return torch.float32


def _ties(config: Config, schedule: Schedule) -> list[Tie]:
    if not config.model.tie_embeddings:
        return []
    last = schedule.num_stages - 1
    return [Tie(TIED[0], (0, last), (schedule.stage_to_rank[0], schedule.stage_to_rank[last]))]


def _canonical_order(specs: Mapping[int, Sequence[ParamSpec]], mesh: Mesh) -> dict[str, int]:
    """Every canonical name of the model, in stage order: the same on any mesh, since stages are spans.

    Raises ConfigError where two stages hold the same parameter and have not tied it.
    """
    mine: dict[str, Any] = {str(s): [spec.name for spec in table if not spec.tied] for s, table in specs.items()}
    every = [(int(s), names) for rank in gather_json(mine, mesh.pipeline, mesh.device) for s, names in rank.items()]
    order = [name for _, names in sorted(every) for name in names]
    twice = {name for name in order if order.count(name) > 1}
    if twice:
        raise ConfigError(f"more than one stage holds {', '.join(sorted(twice)[:5])}; tie them or rename one")
    return {name: place for place, name in enumerate(order)}
