"""Spelling out what a schedule leaves unsaid: messages, parameter gathering, gradient reduction. Imports no torch.

Note: where a RECV goes. The schedule is played at unit times. A message that is made at time t is asked for before
the receiver's last action that starts earlier than t. So on every channel both ends name the messages in one order,
that of their times; no sender finds its RECV missing, since that stands strictly earlier in time; and so no ring of
ranks can wait for each other, blocking sends or not. And the transfer overlaps with compute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from parallax.pipeline.schedule import COMPUTE, WHOLE_STAGE, Action, Op, Schedule
from parallax.pipeline.simulate import Cost, simulate

__all__ = ["lower"]


def lower(schedule: Schedule) -> Schedule:
    """Add SEND, RECV, UNSHARD, RESHARD and REDUCE_GRAD to a table of F, B, I and W.

    A SEND follows the action that makes what is sent; for a RECV see the note above. UNSHARD comes before a stage's
    first F; RESHARD and, where it trains, REDUCE_GRAD follow its last use. What the table has already stays as it is.
    Raises ScheduleError where the schedule never ends.
    """
    if not schedule.lowered:
        schedule = _with_messages(schedule)
    if schedule.ops.isdisjoint(WHOLE_STAGE):
        programs = tuple(_with_stage_actions(schedule, rank) for rank in range(schedule.num_ranks))
        schedule = _replaced(schedule, programs)
    return schedule


def _replaced(schedule: Schedule, programs: tuple[tuple[Action, ...], ...]) -> Schedule:
    return Schedule(schedule.name, schedule.num_microbatches, schedule.stage_to_rank, programs)


def _with_messages(schedule: Schedule) -> Schedule:
    spans = simulate(schedule, Cost()).spans
    starts: list[list[float]] = [[] for _ in schedule.programs]
    for span in spans:
        starts[span.rank].append(span.start)
    # rank -> the place among its compute actions -> (when it was made, the RECV)
    receives: list[dict[int, list[tuple[float, Action]]]] = [defaultdict(list) for _ in schedule.programs]
    for span in spans:
        for _, receive in _messages(span.action, schedule):
            receiver = schedule.stage_to_rank[receive.stage]
            place = max(0, bisect_left(starts[receiver], span.end) - 1)
            receives[receiver][place].append((span.end, receive))
    programs = tuple(_lowered_rank(program, schedule, receives[r]) for r, program in enumerate(schedule.programs))
    return _replaced(schedule, programs)


def _lowered_rank(
    program: tuple[Action, ...], schedule: Schedule, receives: Mapping[int, list[tuple[float, Action]]]
) -> tuple[Action, ...]:
    lowered: list[Action] = []
    place = 0
    for action in program:
        if action.op in COMPUTE:
            lowered += [receive for _, receive in sorted(receives.get(place, []), key=lambda item: item[0])]
            place += 1
        lowered.append(action)
        lowered += [send for send, _ in _messages(action, schedule)]
    return tuple(lowered)


def _messages(action: Action, schedule: Schedule) -> list[tuple[Action, Action]]:
    """The SEND and the RECV of what an action makes for another rank."""
    stage, op, microbatch = action
    if op == Op.F and _far(schedule, stage, stage + 1):
        return [(Action(stage, Op.SEND_F, microbatch), Action(stage + 1, Op.RECV_F, microbatch))]
    if op in (Op.B, Op.I) and _far(schedule, stage, stage - 1):
        return [(Action(stage, Op.SEND_B, microbatch), Action(stage - 1, Op.RECV_B, microbatch))]
    return []


def _far(schedule: Schedule, stage: int, neighbour: int) -> bool:
    """Whether the neighbour exists and is on another rank."""
    places = schedule.stage_to_rank
    return 0 <= neighbour < len(places) and places[neighbour] != places[stage]


def _with_stage_actions(schedule: Schedule, rank: int) -> tuple[Action, ...]:
    program = schedule.programs[rank]
    uses = {s: [k for k, a in enumerate(program) if a.stage == s and a.op in COMPUTE] for s in schedule.stages_of(rank)}
    first = {places[0]: stage for stage, places in uses.items() if places}
    last = {places[-1]: stage for stage, places in uses.items() if places}
    out: list[Action] = []
    ended: list[int] = []
    for place, action in enumerate(program):
        if action.op in COMPUTE:
            out += _ends(ended, schedule)
        if place in first:
            out.append(Action(first[place], Op.UNSHARD))
        out.append(action)
        if place in last:
            ended.append(last[place])  # after the message that its last action makes
    return tuple(out + _ends(ended, schedule))


def _ends(stages: list[int], schedule: Schedule) -> list[Action]:
    found = [
        Action(s, op) for s in stages for op in (Op.REDUCE_GRAD, Op.RESHARD) if schedule.trains or op == Op.RESHARD
    ]
    stages.clear()
    return found
