"""Model, configuration and mesh put together into a run: the only file that imports every room."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from parallax.allocator import keep_freed_memory
from parallax.arguments import close_to
from parallax.comm import gather_json
from parallax.compiled import require_compiler
from parallax.config import Config, OptimizerConfig, ResolvedBatch, check, resolve_batch
from parallax.data.buckets import FlatBuffers
from parallax.data.choose import CASTS, replicate
from parallax.data.gather import block_of
from parallax.data.late import Tie
from parallax.data.layout import Placed
from parallax.data.sync import BucketSync
from parallax.data.zero import Zero
from parallax.errors import ConfigError
from parallax.gradients import GradSink, attach
from parallax.memory import format_bytes, memory_bytes, peak_memory_bytes
from parallax.mesh import Axis, Mesh, cut_axis
from parallax.models.transformer import TIED, Transformer
from parallax.optimizers import kind_of, optimizer_for
from parallax.params import ParamSpec, collect, fill
from parallax.pipeline.executor import Executor
from parallax.pipeline.schedule import Schedule
from parallax.pipeline.schedules import forward_only
from parallax.pipeline.transport import P2P
from parallax.precision.loss_scale import LossScale
from parallax.stage_plan import StagePlan, plan_stages, prove
from parallax.step import TrainState
from parallax.tensor.float8 import require_float8

__all__ = ["DTYPES", "Run", "assemble", "build_stage"]

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,
}
"""What parameters and activations are held in."""


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """Everything one rank needs to train, fixed for the whole run; what changes is in TrainState.

    stages: this rank's spans of the model. specs: the table of its parameters, by stage. order: every canonical name
    of the whole model -> its place. grads: the gradients that this rank's optimizer uses, by spec. shards: the ranks
    over which ZeRO cuts, itself alone without; replicas: those that hold the same part.
    pipeline trains, evaluator runs forward only. baseline_bytes: peak memory before anything was made.
    """

    config: Config
    mesh: Mesh
    batch: ResolvedBatch
    plan: StagePlan
    stages: Mapping[int, nn.Module]
    specs: Mapping[int, Sequence[ParamSpec]]
    order: Mapping[str, int]
    flats: Mapping[int, FlatBuffers]
    sync: BucketSync
    shards: Axis
    replicas: Axis
    pipeline: Executor
    evaluator: Executor
    baseline_bytes: int = 0

    @property
    def grads(self) -> list[tuple[ParamSpec, Tensor]]:
        return [
            (piece.spec, flat.grads_of(flat.segments[piece.segment])[piece.start : piece.stop])
            for flat in self.flats.values()
            for piece in flat.pieces
        ]

    @property
    def flat_grads(self) -> list[Tensor]:
        return [flat.grads_of(segment) for flat in self.flats.values() for segment in flat.segments]

    @property
    def schedule(self) -> Schedule:
        return self.plan.schedule

    @property
    def share(self) -> dict[str, Any]:
        """This rank's part of each global batch, as `token_batches` takes it. Which samples those are depends on
        (seed, step) alone.
        """
        return {
            "global_size": self.batch.global_size,
            "sequence_length": self.config.corpus.sequence_length,
            "data_rank": self.mesh.data.rank,
            "data_size": self.mesh.data.size,
            "device": self.mesh.device,
        }

    def describe(self) -> str:
        """The batch equation and the stage table, for the log; a warning where memory will not do."""
        return f"{self.batch.equation}\n{self.plan.describe()}{self._warn_of_memory()}"

    def _warn_of_memory(self) -> str:
        """A line more where more is predicted than a device like this has, or for all ranks of a machine like this."""
        schedule, size = self.plan.schedule, self.mesh.shape.size
        each = size // self.mesh.pipeline.size
        wanted = [sum(self.plan.memory[s].total for s in schedule.stages_of(r // each)) for r in range(size)]
        on_cpu = self.mesh.device.type == "cpu"
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if on_cpu else 1
        need = max(sum(wanted[first : first + local]) for first in range(0, size, local))
        has = memory_bytes(self.mesh.device)
        if need <= has:
            return ""
        who = "the ranks of a machine" if on_cpu else "a rank"
        return (
            f"\nWARNING: {format_bytes(need)} are predicted for {who}, and there are {format_bytes(has)}; a smaller "
            "batch.microbatch_size, recompute=full, data.zero or more tensor and pipeline ranks need less"
        )


StageBuilder = Callable[..., nn.Module]


def build_stage(config: Config, mesh: Mesh, units: Sequence[int], model: StageBuilder = Transformer) -> nn.Module:
    """One stage of the model, on the meta device. Raises ConfigError where it has not what a pipeline asks of it."""
    stage = model(
        config.model,
        mesh,
        units,
        sequence_length=config.corpus.sequence_length,
        sequence_parallel=config.tensor.sequence_parallel,
        seed=config.seed,
        dtype=DTYPES[config.dtype],
        recompute=config.recompute,
        float8=config.dtype == "float8",
        offload=config.offload_activations,
        compiled=config.compile,
    )
    if missing := [name for name in ("dtype", "boundary_shape") if not hasattr(stage, name)]:
        raise ConfigError(
            f"{type(stage).__name__} has no {' and no '.join(missing)}: the next stage must know the dtype and the "
            "shape of what it receives, as models/transformer.py says them"
        )
    return stage


def assemble(config: Config, mesh: Mesh, model: StageBuilder = Transformer) -> tuple[Run, TrainState]:
    """Build this rank's part of the model and everything that trains it.

    model: makes a stage from (config.model, mesh, units, ...), on the meta device; Transformer unless told.
    Collectives: the names of all parameters are gathered over pipeline once. Raises ConfigError, ScheduleError on
    every rank alike.
    """
    if problems := check(config):
        raise ConfigError("; ".join(problems))
    if config.dtype == "float8":
        require_float8(mesh.device)
    if config.compile:
        require_compiler(mesh.device.type)
    if mesh.device.type == "cpu":
        keep_freed_memory()
    baseline = peak_memory_bytes(mesh.device)
    batch = resolve_batch(config)
    # Where it computes is known by now, whatever device=auto was planned for before.
    plan = plan_stages(replace(config, device="cpu" if mesh.device.type == "cpu" else "cuda"))
    schedule, spans = plan.schedule, plan.spans
    evaluation = prove(forward_only(schedule))
    rank = mesh.pipeline.rank
    stages = {s: build_stage(config, mesh, range(*spans[s]), model) for s in schedule.stages_of(rank)}
    specs = {s: collect(stage, mesh) for s, stage in stages.items()}
    order = _canonical_order(specs, mesh, config.optimizer)
    ties = _ties(config, schedule)
    shards, replicas = _shards(config, mesh)
    flats = {
        s: build_flat(config, mesh, stage, specs[s], {tie.name for tie in ties}, shards) for s, stage in stages.items()
    }
    sinks = {s: GradSink() for s in stages}
    for s, stage in stages.items():
        attach(stage, sinks[s])
    sync = _sync(config, mesh, flats, sinks, ties, stages, shards, replicas)
    transport = P2P(mesh, schedule.num_stages)
    pipeline, evaluator = (
        Executor(stages, sinks, s, rank, transport, sync, mesh.device)  # type: ignore[arg-type]
        for s in (schedule, evaluation)
    )
    run = Run(
        config=config,
        mesh=mesh,
        batch=batch,
        plan=plan,
        stages=stages,
        specs=specs,
        order=order,
        flats=flats,
        sync=sync,
        shards=shards,
        replicas=replicas,
        pipeline=pipeline,
        evaluator=evaluator,
        baseline_bytes=baseline,
    )
    scale = LossScale()
    if config.dtype == "float16":
        scale = LossScale(config.precision.loss_scale, config.precision.loss_scale_window)
    return run, TrainState(optimizer_for(config.optimizer, flats, mesh, shards, config.seed), scale)


def build_flat(
    config: Config, mesh: Mesh, stage: nn.Module, specs: Sequence[ParamSpec], tied: Collection[str], shards: Axis
) -> FlatBuffers:
    """The stage's memory, with its initial values: a function of (seed, canonical name, global element) alone."""

    def initial(placed: Placed, view: Tensor) -> None:
        for spec in placed.specs:
            fill(spec.view(view), spec, config.seed, spec.name)

    names = {name: parameter for name, parameter in stage.named_parameters()}
    blocks = block_of(stage)
    return FlatBuffers(
        stage,
        specs,
        bucket_bytes=config.data.bucket_bytes,
        grad_dtype=_grad_dtype(config),
        tied=tied,
        device=mesh.device,
        fill=initial,
        level=config.data.zero,
        ranks=mesh.grad.size,
        shards=shards,
        group_of=lambda name: blocks[names[name]],
        kind_of=kind_of(config.optimizer),
    )


def _shards(config: Config, mesh: Mesh) -> tuple[Axis, Axis]:
    """The ranks over which ZeRO cuts, and those that hold the same part."""
    size = (config.data.shard_size or mesh.grad.size) if config.data.zero else 1
    return cut_axis(mesh, mesh.grad, ("data", "context"), size)


def _sync(
    config: Config,
    mesh: Mesh,
    flats: Mapping[int, FlatBuffers],
    sinks: Mapping[int, GradSink],
    ties: Sequence[Tie],
    stages: Mapping[int, nn.Module],
    shards: Axis,
    replicas: Axis,
) -> BucketSync:
    """What sums the gradients over data, as the configuration says."""
    data, wish = config.data, config.precision.reduce_dtype
    reduce_dtype = CASTS.get(data.compression, None if wish == "gradient" else DTYPES[wish])
    if shards.size > 1:
        keep, each = data.gather == "step", data.reduce == "microbatch"
        cut: dict[str, Any] = {"models": stages, "shards": shards, "replicas": replicas, "keep": keep, "each": each}
        return Zero(mesh, flats, sinks, ties, reduce_dtype=reduce_dtype, **cut)
    return replicate(
        mesh,
        flats,
        sinks,
        ties,
        compression=data.compression,
        compression_rank=data.compression_rank,
        compression_ratio=data.compression_ratio,
        reduction=data.reduction,
        seed=config.seed,
        reduce_dtype=reduce_dtype,
    )


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


def _canonical_order(specs: Mapping[int, Sequence[ParamSpec]], mesh: Mesh, config: OptimizerConfig) -> dict[str, int]:
    """Every canonical name of the model, in stage order: the same on any mesh, since stages are spans.

    Raises ConfigError, on every rank alike, where two stages hold the same parameter and have not tied it, and where
    optimizer.no_decay names nothing, or a part of what is one tensor.
    """
    kind = kind_of(config)
    mine = {s: [(spec.name, spec.parameter, kind(spec), spec.tied) for spec in table] for s, table in specs.items()}
    gathered = gather_json(mine, mesh.pipeline, mesh.device)
    every = sorted((int(s), table) for of_rank in gathered for s, table in of_rank.items())
    order = [name for _, table in every for name, _, _, tied in table if not tied]
    twice = {name for name, times in Counter(order).items() if times > 1}
    if twice:
        raise ConfigError(f"more than one stage holds {', '.join(sorted(twice)[:5])}; tie them or rename one")
    for _, table in every:
        _check_decay_alike(table)
    # A tied head is a parameter by the embedding's name, and a pattern may call it by its own.
    _check_patterns(
        config.no_decay or (), order, [tensor for _, table in every for _, tensor, _, tied in table if tied]
    )
    return {name: place for place, name in enumerate(order)}


def _check_decay_alike(table: Sequence[tuple[str, str, str, bool]]) -> None:
    """Raise ConfigError where parameters that are one tensor of a stage are of different kinds to the optimizer."""
    within: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name, tensor, kind, _ in table:
        within[tensor][name] = kind
    for kinds in within.values():
        if len(set(kinds.values())) > 1:
            raise ConfigError(f"{', '.join(kinds)} are one tensor and must decay alike; name all of them or none")


def _check_patterns(patterns: Sequence[str], names: Sequence[str], more: Sequence[str]) -> None:
    """Raise ConfigError where no pattern meets a parameter, and for a whole name that is none: a pattern of several may
    be for models with more, as *.bias is.
    """
    unmet = [pattern for pattern in patterns if not fnmatch.filter([*names, *more], pattern)]
    for pattern in unmet:
        if len(unmet) == len(patterns) or not set(pattern) & set("*?["):
            hint = close_to(pattern, names) or f"; names are such as {names[0]}"
            raise ConfigError(f"optimizer.no_decay={pattern} is no parameter's name{hint}")
