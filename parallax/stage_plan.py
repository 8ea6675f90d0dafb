"""Which schedule runs and which units of the model each stage holds: decided from the configuration, before any process
group is made. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallax.config import Config, resolve_batch
from parallax.models.costs import unit_costs
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Schedule
from parallax.pipeline.search import search
from parallax.pipeline.split import Span, Unit, balanced_split, check_partition, split_from_layers, stage_table
from parallax.pipeline.table import get_schedule
from parallax.pipeline.validate import Wire, validate

__all__ = ["StagePlan", "plan_stages", "prove", "split_units"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """schedule: lowered and proven. spans: by stage, the units [first, last). note: why this schedule, where it was
    searched for."""

    schedule: Schedule
    units: tuple[Unit, ...]
    spans: tuple[Span, ...]
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
        table = stage_table(self.spans, self.units, self.schedule.stage_to_rank)
        return f"{self.num_parameters:,} parameters; schedule {self.schedule.name}{note}\n{table}"


def plan_stages(config: Config) -> StagePlan:
    """What the configuration asks for. Raises ConfigError, ScheduleError."""
    units = tuple(Unit(*cost) for cost in unit_costs(config.model, config.corpus.sequence_length))
    wish, ranks, num_microbatches = config.pipeline, config.mesh_shape.pipeline, resolve_batch(config).num_microbatches
    if wish.schedule == "auto":
        found = search(units, ranks, num_microbatches, memory_cap=wish.memory_cap)
        return StagePlan(prove(found.schedule), units, found.spans, found.describe())
    schedule = prove(get_schedule(wish.schedule, ranks, num_microbatches, wish.stages_per_rank))
    return StagePlan(schedule, units, split_units(config, units, schedule))


def split_units(config: Config, units: tuple[Unit, ...], schedule: Schedule) -> tuple[Span, ...]:
    """Balanced, or as pipeline.split says; the model exactly once."""
    if config.pipeline.split is not None:
        spans = split_from_layers(config.pipeline.split, units)
    else:
        spans = balanced_split(units, schedule.num_stages, schedule.stage_to_rank)
    check_partition(spans, units)
    return tuple(spans)


def prove(schedule: Schedule) -> Schedule:
    """Lowered, and shown to end on an ordered wire before any process runs it."""
    validate(schedule)
    lowered = lower(schedule)
    validate(lowered, wire=Wire.ORDERED)
    return lowered
