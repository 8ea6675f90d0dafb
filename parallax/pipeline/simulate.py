"""What a schedule takes: the same table that is executed, played against the clock. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from parallax.errors import ScheduleError
from parallax.pipeline.schedule import COMPUTE, RECVS, SENDS, Action, Op, Schedule, inputs

__all__ = ["Cost", "Span", "Timeline", "played", "simulate"]

Times = float | Sequence[float]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of one microbatch on one stage: a number for all stages or one for each. B takes I plus W, but where
    whole says otherwise.

    send_s: from the end of the action that makes a message until it can be used on another rank; messages do not hold
    up compute.
    """

    forward: Times = 1.0
    input_grad: Times = 1.0
    weight_grad: Times = 1.0
    send_s: float = 0.0
    whole: Times | None = None

    def of(self, action: Action) -> float:
        """Duration of an action on its rank."""

        def at(times: Times) -> float:
            return float(times) if isinstance(times, int | float) else float(times[action.stage])

        if action.op == Op.F:
            return at(self.forward)
        if action.op == Op.I:
            return at(self.input_grad)
        if action.op == Op.W:
            return at(self.weight_grad)
        if action.op == Op.B:
            return at(self.input_grad) + at(self.weight_grad) if self.whole is None else at(self.whole)
        return 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """One compute action in time."""

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A played schedule.

    in_flight: by rank, the most (stage, microbatch) pairs at once whose activations it holds: F done, B or W not.
    held: of those, the most at once that are between I and W. first, last: by rank, when it starts and when it ends.
    """

    spans: tuple[Span, ...]
    makespan: float
    busy: tuple[float, ...]
    in_flight: tuple[int, ...] = field(default=())
    held: tuple[int, ...] = field(default=())
    first: tuple[float, ...] = field(default=())
    last: tuple[float, ...] = field(default=())

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time: 1 - busy / (ranks * makespan)."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0

    @property
    def inner_bubble(self) -> float:
        """The largest idle share of a rank between its own first and last action: what is left where steps are chained
        without a barrier, as the zero-bubble papers count."""
        spans = zip(self.first, self.last, self.busy, strict=True)
        return max((1 - busy / (last - first) for first, last, busy in spans if last > first), default=0.0)


def simulate(schedule: Schedule, cost: Cost) -> Timeline:
    """Play a schedule, lowered or not: every rank in program order, an action as soon as its inputs are there.

    Raises ScheduleError where a rank can never go on.
    """
    ended: dict[Action, float] = {}
    clock = [0.0] * schedule.num_ranks
    at = [0] * schedule.num_ranks
    spans: list[Span] = []
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(schedule.programs):
            while at[rank] < len(program):
                action = program[at[rank]]
                ready = _ready_at(action, schedule, ended, cost)
                if ready is None:
                    break
                start = max(clock[rank], ready) if action.op in COMPUTE else clock[rank]
                end = start + cost.of(action)
                if action.op in COMPUTE:
                    spans.append(Span(rank, action, start, end))
                clock[rank] = ended[action] = end
                at[rank] += 1
                moved = True
    stuck = [r for r, program in enumerate(schedule.programs) if at[r] < len(program)]
    if stuck:
        where = "; ".join(f"rank {r} at {schedule.programs[r][at[r]]}" for r in stuck)
        raise ScheduleError(f"{schedule.name} never ends: {where}")
    return played(schedule, spans)


def played(schedule: Schedule, spans: Sequence[Span]) -> Timeline:
    """The timeline of a schedule's compute actions, simulated or measured, from time 0."""
    ordered = sorted(spans, key=lambda s: (s.start, s.rank))
    mine: list[list[Span]] = [[] for _ in schedule.programs]
    for span in ordered:
        mine[span.rank].append(span)
    last = tuple(max((s.end for s in row), default=0.0) for row in mine)
    return Timeline(
        tuple(ordered),
        max(last, default=0.0),
        tuple(sum(s.end - s.start for s in row) for row in mine),
        *_peaks(schedule),
        tuple(row[0].start if row else 0.0 for row in mine),
        last,
    )


def _ready_at(action: Action, schedule: Schedule, ended: dict[Action, float], cost: Cost) -> float | None:
    """When an action's inputs are all there; None if one is not made yet."""
    if action.op in RECVS:
        return 0.0  # posting waits for nothing
    ready = 0.0
    for need in inputs(action, schedule):
        sender = inputs(need, schedule)[0] if need.op in RECVS else need
        if sender not in ended or need not in ended:
            return None
        crosses = sender.op in SENDS or schedule.stage_to_rank[sender.stage] != schedule.stage_to_rank[action.stage]
        ready = max(ready, ended[sender] + (cost.send_s if crosses and action.op in COMPUTE else 0.0))
    return ready


def _peaks(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    in_flight, held = [], []
    for program in schedule.programs:
        now: Counter[str] = Counter()
        most: Counter[str] = Counter()
        for action in program if schedule.trains else ():
            now["flight"] += (action.op == Op.F) - (action.op in (Op.B, Op.W))
            now["held"] += (action.op == Op.I) - (action.op == Op.W)
            most |= now
        in_flight.append(most["flight"])
        held.append(most["held"])
    return tuple(in_flight), tuple(held)
