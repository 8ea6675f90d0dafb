"""The best table for given times and memory: the registered schedules, and ones made for the case. Imports no torch.

The generator is an ordered greedy one, as in the automatic scheduler of arXiv:2401.10241, section 3.1: the clock
runs, and a rank that is free takes the first of its possible passes in a fixed order of preference, W filling what
would be idle; a forward waits where it would exceed the memory. Several orders of preference are tried and the
shortest table wins, so the result is never worse than the best registered schedule within the same memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from parallax.errors import ScheduleError
from parallax.pipeline.join import join, likely_costs
from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.schedules import SCHEDULES, make_schedule
from parallax.pipeline.simulate import Cost, Timeline, simulate
from parallax.pipeline.split import Span, Unit, balanced_split

__all__ = ["Found", "generate", "lower_bound", "search", "stage_cost", "weighted_peak"]

Preference = tuple[tuple[Op, int], ...]
"""(op, which of the rank's stages), most wanted first. W comes last, always."""

EPSILON = 1e-9


@dataclass(frozen=True, slots=True)
class Found:
    """What `search` chose. peak: activations held by the fullest rank, in microbatches of an average rank's share.
    bound: no table of this placement is shorter. tried: how many tables fitted the memory."""

    schedule: Schedule
    spans: tuple[Span, ...]
    timeline: Timeline
    peak: float
    bound: float
    tried: int

    def describe(self) -> str:
        return (
            f"{self.schedule.name}: the shortest of {self.tried} tables; bubble {self.timeline.bubble:.1%}, "
            f"{self.timeline.makespan / self.bound - 1:.1%} above the lower bound; holds {self.peak:.3g} microbatches"
        )


def search(
    units: Sequence[Unit],
    num_ranks: int,
    num_microbatches: int,
    *,
    memory_cap: float | None = None,
    recomputes: bool = False,
) -> Found:
    """The shortest table found for a model of these units, whose passes take time in proportion to their FLOPs, with
    whole backwards where it need not split them (pipeline/join.py).

    memory_cap: activations that a rank may hold, in microbatches of an average rank's share of the model; none is what
    1F1B's fullest rank holds. Deterministic. Raises ScheduleError where nothing fits, with the least that does.
    """
    if memory_cap is None:
        schedule = make_schedule("1f1b", num_ranks, num_microbatches)
        spans = balanced_split(units, num_ranks)
        memory_cap = weighted_peak(schedule, _weights(units, spans, num_ranks))
    candidates: list[tuple[Schedule, tuple[Span, ...]]] = []
    for name in SCHEDULES:
        schedule = make_schedule(name, num_ranks, num_microbatches)
        if schedule.num_stages <= len(units):
            candidates.append((schedule, balanced_split(units, schedule.num_stages, schedule.stage_to_rank)))
    placements = dict.fromkeys((schedule.stage_to_rank, spans) for schedule, spans in candidates)
    for places, spans in placements:
        cost, weights = stage_cost(units, spans, num_ranks), _weights(units, spans, num_ranks)
        for preference in _preferences(len(places) // num_ranks):
            made = generate(places, num_microbatches, cost, weights, memory_cap, preference)
            if made is not None:
                candidates.append((made, spans))
    found = []
    for schedule, spans in candidates:
        peak = weighted_peak(schedule, _weights(units, spans, num_ranks))
        found.append((simulate(schedule, stage_cost(units, spans, num_ranks)), peak, schedule, spans))
    fitting = [item for item in found if item[1] <= memory_cap + EPSILON]
    if not fitting:
        least = min(peak for _, peak, _, _ in found)
        raise ScheduleError(
            f"pipeline.memory_cap={memory_cap:g} is too small for {num_ranks} ranks and {num_microbatches} "
            f"microbatches; the least that any table needs is {least:.3g}"
        )
    timeline, _, schedule, spans = min(fitting, key=lambda item: (item[0].makespan, item[1]))
    cost = stage_cost(units, spans, num_ranks)
    joined = join(schedule, likely_costs(cost.forward, recomputes))
    peak = weighted_peak(joined, _weights(units, spans, num_ranks))
    return Found(joined, spans, timeline, peak, lower_bound(schedule, cost), len(fitting))


def stage_cost(units: Sequence[Unit], spans: Sequence[Span], num_ranks: int) -> Cost:
    """Times in proportion to FLOPs: the two products of a backward take as long as the forward's one, each.

    The unit is the forward of an average rank's share. A unit without FLOPs (the embedding) still takes a little.
    """
    total = sum(unit.flops for unit in units) or 1.0
    times = [max(0.01, sum(u.flops for u in units[a:b]) / total * num_ranks) for a, b in spans]
    return Cost(times, times, times)


def _weights(units: Sequence[Unit], spans: Sequence[Span], num_ranks: int) -> list[float]:
    """What an activation of each stage weighs, an average rank's share of the units being 1."""
    return [(b - a) * num_ranks / len(units) for a, b in spans]


def weighted_peak(schedule: Schedule, weights: Sequence[float]) -> float:
    """Activations held by the fullest rank at its fullest moment, from F to B or W."""
    most = 0.0
    for program in schedule.programs:
        held = 0.0
        for action in program:
            held += weights[action.stage] * ((action.op == Op.F) - (action.op in (Op.B, Op.W)))
            most = max(most, held)
    return most


def lower_bound(schedule: Schedule, cost: Cost) -> float:
    """No order of the same passes in the same places ends earlier: a rank's work after its first input can be there,
    or one microbatch's way there and back."""
    f, i, w = ([cost.of(Action(s, op, 0)) for s in range(schedule.num_stages)] for op in (Op.F, Op.I, Op.W))
    bounds = [sum(f) + sum(i)]
    for rank in range(schedule.num_ranks):
        mine = schedule.stages_of(rank)
        work = schedule.num_microbatches * sum(f[s] + i[s] + w[s] for s in mine)
        bounds.append(sum(f[: min(mine)]) + work)
    return max(bounds)


def _preferences(stages_per_rank: int) -> list[Preference]:
    """Every order of I and F of the rank's stages, forwards of later stages before those of earlier ones."""
    if stages_per_rank > 2:
        return []  # too many orders to try
    passes = [(op, k) for op in (Op.I, Op.F) for k in range(stages_per_rank)]
    orders = itertools.permutations(passes)
    return [o for o in orders if stages_per_rank == 1 or o.index((Op.F, 1)) < o.index((Op.F, 0))]


class _State:
    """The clock, what has ended, and what each rank holds, while a table is made."""

    def __init__(self, places: Sequence[int], num_microbatches: int, cost: Cost, weights: Sequence[float]) -> None:
        self.places, self.num_microbatches, self.cost, self.weights = places, num_microbatches, cost, weights
        self.num_ranks = max(places) + 1
        self.stages = [[s for s, rank in enumerate(places) if rank == r] for r in range(self.num_ranks)]
        self.done = {(op, s): 0 for op in (Op.F, Op.I, Op.W) for s in range(len(places))}
        self.ended: dict[Action, float] = {}
        self.free_at = [0.0] * self.num_ranks
        self.held = [0.0] * self.num_ranks
        self.programs: list[list[Action]] = [[] for _ in range(self.num_ranks)]

    def ready_at(self, action: Action) -> float | None:
        """When a rank's next pass of this kind can start; None if what it needs has not been begun."""
        stage, op, microbatch = action
        needs = []
        if op == Op.F and stage > 0:
            needs = [Action(stage - 1, Op.F, microbatch)]
        elif op == Op.I:
            needs = [Action(stage, Op.F, microbatch)]
            if stage < len(self.places) - 1:
                needs.append(Action(stage + 1, Op.I, microbatch))
        elif op == Op.W:
            needs = [Action(stage, Op.I, microbatch)]
        if any(need not in self.ended for need in needs):
            return None
        return max((self.ended[need] for need in needs), default=0.0)

    def do(self, rank: int, action: Action, start: float) -> None:
        self.free_at[rank] = self.ended[action] = start + self.cost.of(action)
        self.done[action.op, action.stage] += 1
        self.held[rank] += self.weights[action.stage] * ((action.op == Op.F) - (action.op == Op.W))
        self.programs[rank].append(action)


def generate(
    places: Sequence[int],
    num_microbatches: int,
    cost: Cost,
    weights: Sequence[float],
    memory_cap: float,
    preference: Preference,
) -> Schedule | None:
    """A table made by the clock; None where the memory is too small for this order of preference."""
    state = _State(places, num_microbatches, cost, weights)
    left = 3 * num_microbatches * len(places)
    now = 0.0
    while left:
        began = 0
        for rank in range(state.num_ranks):
            if state.free_at[rank] <= now + EPSILON and (action := _choose(state, rank, now, memory_cap, preference)):
                state.do(rank, action, now)
                began += 1
        left -= began
        later = [time for time in state.free_at if time > now + EPSILON]
        if not later and not began and left:
            return None
        now = min(later, default=now)
    programs = tuple(tuple(program) for program in state.programs)
    return Schedule("auto", num_microbatches, tuple(places), programs)


def _choose(state: _State, rank: int, now: float, memory_cap: float, preference: Preference) -> Action | None:
    """The most wanted pass that can start now."""
    mine = state.stages[rank]
    for op, k in (*preference, *((Op.W, k) for k in range(len(mine)))):
        stage = mine[k]
        microbatch = state.done[op, stage]
        if microbatch == state.num_microbatches:
            continue
        if op == Op.F and state.held[rank] + state.weights[stage] > memory_cap + EPSILON:
            continue
        action = Action(stage, op, microbatch)
        ready = state.ready_at(action)
        if ready is not None and ready <= now + EPSILON:
            return action
    return None
