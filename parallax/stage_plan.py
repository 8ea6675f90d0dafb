"""Which schedule runs and which units of the model each stage holds: decided from the configuration, before any process
group is made. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallax.config import Config, resolve_batch
from parallax.errors import ConfigError
from parallax.models.costs import unit_costs
from parallax.models.memory import MemoryModel, StageMemory
from parallax.pipeline.join import join, likely_costs
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Op, Schedule
from parallax.pipeline.search import search, stage_cost
from parallax.pipeline.split import Span, Unit, balanced_split, check_partition, split_from_layers, stage_table
from parallax.pipeline.table import get_schedule, is_file
from parallax.pipeline.validate import Wire, validate

__all__ = ["StagePlan", "plan_stages", "prove", "split_units", "stage_in_flight"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """schedule: lowered and proven. spans: by stage, the units [first, last). memory: predicted, of each stage.
    note: why this schedule, where it was searched for."""

    schedule: Schedule
    units: tuple[Unit, ...]
    spans: tuple[Span, ...]
    memory: tuple[StageMemory, ...] = ()
    note: str = ""

    @property
    def num_parameters(self) -> int:
        """Of the whole model; a tied weight counts once."""
        return sum(unit.params for unit in self.units)

    @property
    def flops_per_token(self) -> float:
        """Forward and backward of the whole model: three times the forward."""
        return 3.0 * sum(unit.flops for unit in self.units)

    def describe(self) -> str:
        """The schedule, and a line a stage."""
        note = f"\n{self.note}" if self.note else ""
        held = _all_in_flight(self.schedule)
        table = stage_table(self.spans, self.units, self.schedule.stage_to_rank, held, [m.total for m in self.memory])
        split, total = len(self.schedule.splits), self.schedule.num_stages * self.schedule.num_microbatches
        backwards = f", {split} of {total} backwards in two" if split else ""
        return f"{self.num_parameters:,} parameters; schedule {self.schedule.name}{backwards}{note}\n{table}"


def plan_stages(config: Config) -> StagePlan:
    """What the configuration asks for. Raises ConfigError, ScheduleError."""
    units = tuple(Unit(*cost) for cost in unit_costs(config.model, config.corpus.sequence_length))
    wish, ranks, num_microbatches = config.pipeline, config.mesh_shape.pipeline, resolve_batch(config).num_microbatches
    note, recomputes = "", config.recompute != "none"
    if wish.schedule == "auto":
        found = search(units, ranks, num_microbatches, memory_cap=wish.memory_cap, recomputes=recomputes)
        table, spans, note = found.schedule, found.spans, found.describe()
    else:
        table = get_schedule(wish.schedule, ranks, num_microbatches, wish.stages_per_rank)
        spans = split_units(config, units, table)
        if not is_file(wish.schedule):  # a user's own table stays as it is
            table = join(table, likely_costs(stage_cost(units, spans, ranks).forward, recomputes))
    schedule = prove(table)
    memory = MemoryModel(config, units, _all_in_flight(schedule))
    return StagePlan(schedule, units, spans, tuple(memory.of(s, span) for s, span in enumerate(spans)), note)


def split_units(config: Config, units: tuple[Unit, ...], schedule: Schedule) -> tuple[Span, ...]:
    """Balanced within pipeline.max_memory_bytes, or as pipeline.split says; the model exactly once."""
    cap = config.pipeline.max_memory_bytes
    if config.pipeline.split is not None:
        spans = split_from_layers(config.pipeline.split, units)
    elif cap is None:
        spans = balanced_split(units, schedule.num_stages, schedule.stage_to_rank)
    else:
        memory = MemoryModel(config, units, _all_in_flight(schedule))
        share = cap * schedule.num_ranks / schedule.num_stages
        try:
            spans = balanced_split(
                units,
                schedule.num_stages,
                schedule.stage_to_rank,
                allowed=lambda stage, span: memory.of(stage, span).total <= share,
            )
        except ConfigError:
            raise ConfigError(
                f"pipeline.max_memory_bytes={cap} is too small for any split into {schedule.num_stages} stages; "
                "raise it, use more ranks, smaller microbatches, or a schedule that holds fewer (v-min)"
            ) from None
    check_partition(spans, units)
    return tuple(spans)


def stage_in_flight(schedule: Schedule, stage: int) -> int:
    """The most microbatches at once whose activations a stage holds."""
    held = most = 0
    for action in schedule.programs[schedule.stage_to_rank[stage]]:
        if action.stage == stage:
            held += (action.op == Op.F) - (action.op in (Op.B, Op.W))
            most = max(most, held)
    return most


def _all_in_flight(schedule: Schedule) -> list[int]:
    return [stage_in_flight(schedule, stage) for stage in range(schedule.num_stages)]


def prove(schedule: Schedule) -> Schedule:
    """Lowered, and shown to end on an ordered wire before any process runs it."""
    validate(schedule)
    lowered = lower(schedule)
    validate(lowered, wire=Wire.ORDERED)
    return lowered
