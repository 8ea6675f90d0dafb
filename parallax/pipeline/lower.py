"""Spelling out what a schedule leaves unsaid: messages, parameter gathering, gradient reduction. Imports no torch."""

from __future__ import annotations

from parallax.pipeline.schedule import COMPUTE, Action, Op, Schedule

__all__ = ["lower"]


def lower(schedule: Schedule) -> Schedule:
    """Add SEND, RECV, UNSHARD, RESHARD and REDUCE_GRAD to a table of F, B, I and W.

    A SEND follows the action that makes what is sent. A RECV is posted one compute action before the one that needs
    it, so that the transfer overlaps with compute, and so that even blocking sends find it posted (see
    validate.Wire). UNSHARD comes before a stage's first F; RESHARD and, where it trains, REDUCE_GRAD follow its last
    use.
    """
    if schedule.lowered:
        return schedule
    programs = tuple(_lower_rank(schedule, rank) for rank in range(schedule.num_ranks))
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, programs)


def _lower_rank(schedule: Schedule, rank: int) -> tuple[Action, ...]:
    compute = [action for action in schedule.programs[rank] if action.op in COMPUTE]
    first = {stage: _place(compute, stage, first=True) for stage in schedule.stages_of(rank)}
    last = {stage: _place(compute, stage, first=False) for stage in schedule.stages_of(rank)}
    lowered: list[Action] = []
    posted = 0  # compute actions whose messages have been asked for
    for place, action in enumerate(compute):
        lowered += [Action(action.stage, Op.UNSHARD) for _ in range(first[action.stage] == place)]
        for upcoming in compute[posted : place + 2]:
            lowered += _receive(upcoming, schedule)
        posted = min(place + 2, len(compute))
        lowered.append(action)
        lowered += _send(action, schedule)
        if last[action.stage] == place:
            lowered += [Action(action.stage, Op.REDUCE_GRAD) for _ in range(schedule.trains)]
            lowered.append(Action(action.stage, Op.RESHARD))
    return tuple(lowered)


def _place(compute: list[Action], stage: int, *, first: bool) -> int:
    places = [place for place, action in enumerate(compute) if action.stage == stage]
    return (places[0] if first else places[-1]) if places else -1


def _receive(action: Action, schedule: Schedule) -> list[Action]:
    stage, op, microbatch = action
    if op == Op.F and _far(schedule, stage, stage - 1):
        return [Action(stage, Op.RECV_F, microbatch)]
    if op in (Op.B, Op.I) and _far(schedule, stage, stage + 1):
        return [Action(stage, Op.RECV_B, microbatch)]
    return []


def _send(action: Action, schedule: Schedule) -> list[Action]:
    stage, op, microbatch = action
    if op == Op.F and _far(schedule, stage, stage + 1):
        return [Action(stage, Op.SEND_F, microbatch)]
    if op in (Op.B, Op.I) and _far(schedule, stage, stage - 1):
        return [Action(stage, Op.SEND_B, microbatch)]
    return []


def _far(schedule: Schedule, stage: int, neighbour: int) -> bool:
    """Whether the neighbour exists and is on another rank."""
    places = schedule.stage_to_rank
    return 0 <= neighbour < len(places) and places[neighbour] != places[stage]
