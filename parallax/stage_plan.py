"""Which schedule runs and which units of the model each stage holds: decided from the configuration, before any process
group is made. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from parallax.config import Config, resolve_batch
from parallax.errors import ConfigError
from parallax.models.costs import unit_activations, unit_costs
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Op, Schedule
from parallax.pipeline.search import search
from parallax.pipeline.split import Span, Unit, balanced_split, check_partition, split_from_layers, stage_table
from parallax.pipeline.table import get_schedule
from parallax.pipeline.validate import Wire, validate

__all__ = ["StagePlan", "plan_stages", "prove", "split_units", "stage_in_flight"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """schedule: lowered and proven. spans: by stage, the units [first, last). stage_bytes: predicted memory of each.
    note: why this schedule, where it was searched for."""

    schedule: Schedule
    units: tuple[Unit, ...]
    spans: tuple[Span, ...]
    stage_bytes: tuple[float, ...] = ()
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
        held = [stage_in_flight(self.schedule, stage) for stage in range(self.schedule.num_stages)]
        table = stage_table(self.spans, self.units, self.schedule.stage_to_rank, held, self.stage_bytes)
        return f"{self.num_parameters:,} parameters; schedule {self.schedule.name}{note}\n{table}"


def plan_stages(config: Config) -> StagePlan:
    """What the configuration asks for. Raises ConfigError, ScheduleError."""
    units = tuple(Unit(*cost) for cost in unit_costs(config.model, config.corpus.sequence_length))
    wish, ranks, num_microbatches = config.pipeline, config.mesh_shape.pipeline, resolve_batch(config).num_microbatches
    note = ""
    if wish.schedule == "auto":
        found = search(units, ranks, num_microbatches, memory_cap=wish.memory_cap)
        schedule, spans, note = prove(found.schedule), found.spans, found.describe()
    else:
        schedule = prove(get_schedule(wish.schedule, ranks, num_microbatches, wish.stages_per_rank))
        spans = split_units(config, units, schedule)
    memory = _Memory(config, units, schedule)
    return StagePlan(schedule, units, spans, tuple(memory.of(s, span) for s, span in enumerate(spans)), note)


def split_units(config: Config, units: tuple[Unit, ...], schedule: Schedule) -> tuple[Span, ...]:
    """Balanced within pipeline.max_memory_bytes, or as pipeline.split says; the model exactly once."""
    cap = config.pipeline.max_memory_bytes
    if config.pipeline.split is not None:
        spans = split_from_layers(config.pipeline.split, units)
    elif cap is None:
        spans = balanced_split(units, schedule.num_stages, schedule.stage_to_rank)
    else:
        memory = _Memory(config, units, schedule)
        share = cap * schedule.num_ranks / schedule.num_stages
        try:
            spans = balanced_split(
                units,
                schedule.num_stages,
                schedule.stage_to_rank,
                allowed=lambda stage, span: memory.of(stage, span) <= share,
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


class _Memory:
    """Bytes that a stage takes on one rank: parameters, gradients, optimizer, and the activations in flight.

    What ZeRO cuts counts by its part; gradients that are reduced once a step are whole until then.
    """

    def __init__(self, config: Config, units: tuple[Unit, ...], schedule: Schedule) -> None:
        tensor = config.mesh_shape.tensor
        size = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[config.dtype]
        grad: float = size if config.dtype == "float64" or config.data.grad_dtype == "parameter" else 4
        master = 4 if size == 2 else 0
        moments = 2 * max(4, size)
        elements = unit_activations(
            config.model,
            tensor=tensor,
            sequence_parallel=config.tensor.sequence_parallel and tensor > 1,
            recompute=config.recompute,
        )
        batch = resolve_batch(config)
        tokens = batch.microbatch_size * config.corpus.sequence_length
        data, shape = config.data, config.mesh_shape
        parts = (data.shard_size or shape.data * shape.context) if data.zero else 1
        state = (master + moments) / parts
        if data.zero >= 2 and (data.reduce == "microbatch" or batch.num_microbatches == 1):
            grad = grad / parts
        values = size / parts if data.zero == 3 and data.gather == "block" else size
        self._fixed = list(accumulate((u.params / tensor * (values + grad + state) for u in units), initial=0.0))
        self._activations = list(accumulate((n * tokens * size for n in elements), initial=0))
        self._held = [stage_in_flight(schedule, stage) for stage in range(schedule.num_stages)]

    def of(self, stage: int, span: Span) -> float:
        first, last = span
        activations = self._activations[last] - self._activations[first]
        return self._fixed[last] - self._fixed[first] + self._held[stage] * activations


def prove(schedule: Schedule) -> Schedule:
    """Lowered, and shown to end on an ordered wire before any process runs it."""
    validate(schedule)
    lowered = lower(schedule)
    validate(lowered, wire=Wire.ORDERED)
    return lowered
