"""Which backwards a schedule need not split. Imports no torch.

A backward in two passes costs more than a whole one: what W reads has left the cache since I, and is held until W. It
pays where W fills what would be idle, mostly when a step ends. The other backwards can be whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.simulate import Cost, Times, simulate

__all__ = ["join"]

WEIGHT_GRAD_SHARES = (1.0, 0.65)
"""Of the time that a cost gives W: attention, norms and activations have no part in W. On 1x1x2 of
benchmarks/training.py F takes 29 ms, I 30 and W 19. A table must not get longer at either."""
PLAYED_AT_MOST = 400_000
"""Actions that all trials of one table may play: a second or so."""
EPSILON = 1e-9


def join(schedule: Schedule, cost: Cost) -> Schedule:
    """The same table with as many backwards whole as leave its makespan what it is, at these times.

    On each stage these are the first ones, where its I was: gradients are still added in microbatch order, and no rank
    holds more. In large tables all stages have the same number of them, and the largest stay as they are.
    """
    one_search = len(WEIGHT_GRAD_SHARES) * schedule.num_microbatches.bit_length() * sum(map(len, schedule.programs))
    if not schedule.splits or one_search > PLAYED_AT_MOST:
        return schedule
    costs = [replace(cost, weight_grad=_scaled(cost.weight_grad, share)) for share in WEIGHT_GRAD_SHARES]
    limits = [simulate(schedule, each).makespan + EPSILON for each in costs]
    num_whole = dict.fromkeys(range(schedule.num_stages), 0)

    def fits(stages: Sequence[int], number: int) -> bool:
        made = _joined(schedule, num_whole | dict.fromkeys(stages, number))
        return all(simulate(made, each).makespan <= limit for each, limit in zip(costs, limits, strict=True))

    stages = range(schedule.num_stages)
    each_alone = len(stages) * one_search <= PLAYED_AT_MOST
    for some in [stages, *([stage] for stage in stages if each_alone)]:
        low, high = num_whole[some[0]], schedule.num_microbatches
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(some, middle) else (low, middle - 1)
        num_whole |= dict.fromkeys(some, low)
    return _joined(schedule, num_whole)


def _scaled(times: Times, share: float) -> Times:
    return times * share if isinstance(times, int | float) else [share * time for time in times]


def _joined(schedule: Schedule, num_whole: Mapping[int, int]) -> Schedule:
    """Of each stage's split backwards the first ones whole."""

    def joined(action: Action) -> Action | None:
        if (action.stage, action.microbatch) not in schedule.splits or action.microbatch is None:
            return action
        if action.op not in (Op.I, Op.W) or action.microbatch >= num_whole[action.stage]:
            return action
        return action._replace(op=Op.B) if action.op == Op.I else None

    programs = tuple(tuple(filter(None, map(joined, program))) for program in schedule.programs)
    return replace(schedule, programs=programs)
