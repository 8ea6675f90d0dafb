"""Which backwards a schedule need not split. Imports no torch.

A backward in two passes costs more than a whole one: what W reads has left the cache since I, and is held until W. It
pays where W fills what would be idle, mostly when a step ends. The other backwards can be whole.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence, Set
from dataclasses import replace

from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.simulate import Cost, Times, simulate

__all__ = ["join", "likely_costs"]

Place = tuple[int, int | None]
"""Stage and microbatch of a backward."""

INPUT_GRADS, WEIGHT_GRADS, SENDS = (1.0, 2.0), (1.0, 0.65), (0.0, 0.15)
"""Of a stage's forward: I, which takes twice as long where it computes activations again; W, in which attention, norms
and activations have no part; and, of a rank's share, a message."""
WHOLE = 0.95
"""Of I and W together: on 1x1x2 of benchmarks/training.py F takes 29 ms, I 30, W 19.6, and a whole backward 47.4."""
PLAYED_AT_MOST = 100_000
"""Actions that the trials for one table may play: half a second or so, which every rank takes."""


def likely_costs(forward: Times, recomputes: bool) -> list[Cost]:
    """What a step may turn out to take, where the forwards of a microbatch take so long on each stage, and those of a
    rank about 1."""
    costs = []
    for i, w, send in itertools.product(INPUT_GRADS[: 1 + recomputes], WEIGHT_GRADS, SENDS):
        input_grad, weight_grad, whole = (_scaled(forward, share) for share in (i, w, WHOLE * (i + w)))
        costs.append(Cost(forward, input_grad, weight_grad, send, whole))
    return costs


def join(schedule: Schedule, costs: Sequence[Cost]) -> Schedule:
    """The same table with whole backwards where that makes it shorter, or no longer, at all of these costs.

    They are the first ones of a stage, where their I was: gradients are still added in microbatch order, and no rank
    holds more. The number is sought for all stages together, then for one after the other. What nobody waits for is
    whole without a trial; in the largest tables that is all.
    """
    schedule = _whole(schedule, _waited_for_by_nobody(schedule))
    stages = sorted({stage for stage, _ in schedule.splits})
    trials = 2 * schedule.num_microbatches.bit_length()
    affordable = PLAYED_AT_MOST // (trials * len(costs) * sum(map(len, schedule.programs)))
    searches = [stages, *([stage] for stage in stages)] if stages else []
    for some in searches[:affordable]:
        schedule = _join_first(schedule, some, costs)
    return schedule


def _join_first(schedule: Schedule, stages: Sequence[int], costs: Sequence[Cost]) -> Schedule:
    """Of these stages' backwards the first ones whole, as many as make the table shortest."""
    before = [simulate(schedule, cost).makespan for cost in costs]

    @functools.cache
    def length(number: int) -> float:
        """Over what it was, at the cost that it suits least."""
        made = [simulate(with_first(number), cost).makespan for cost in costs]
        return round(max(now / then for now, then in zip(made, before, strict=True)), 9)

    def with_first(number: int) -> Schedule:
        return _whole(schedule, {(stage, microbatch) for stage in stages for microbatch in range(number)})

    low, high = 0, schedule.num_microbatches
    while low < high:  # it gets shorter by what is saved, from some number on longer by what is waited for
        middle = (low + high + 1) // 2
        low, high = (middle, high) if length(middle) <= length(middle - 1) else (low, middle - 1)
    return with_first(low) if length(low) <= 1 else schedule


def _waited_for_by_nobody(schedule: Schedule) -> set[Place]:
    """Backwards of the first stage whose W follows their I at once."""
    pairs = (pair for program in schedule.programs for pair in itertools.pairwise(program))
    return {(0, i.microbatch) for i, w in pairs if i.stage == 0 and i.op == Op.I and w == i._replace(op=Op.W)}


def _whole(schedule: Schedule, places: Set[Place]) -> Schedule:
    """With these backwards whole: B where I was, and no W."""

    def changed(action: Action) -> Action | None:
        if action.op not in (Op.I, Op.W) or action[::2] not in places:
            return action
        return action._replace(op=Op.B) if action.op == Op.I else None

    programs = tuple(tuple(filter(None, map(changed, program))) for program in schedule.programs)
    return replace(schedule, programs=programs)


def _scaled(times: Times, share: float) -> Times:
    return share * times if isinstance(times, int | float) else [share * time for time in times]
