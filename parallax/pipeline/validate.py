"""Proof that a schedule is complete, keeps the laws, and ends: by playing it. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from enum import Enum

from parallax.errors import ScheduleError
from parallax.pipeline.schedule import COMPUTE, RECVS, SENDS, WHOLE_STAGE, Action, Op, Schedule, inputs

__all__ = ["Wire", "validate"]


class Wire(Enum):
    """How messages between two ranks behave.

    TAGGED: matched by name, without bound (gloo). ORDERED: one channel for each direction of a pair of ranks, the k-th
    SEND meets the k-th RECV, and a SEND holds up its rank until that RECV is posted (NCCL without buffering). That a
    SEND blocks is stricter than NCCL, where it is queued: what passes here passes there.
    """

    TAGGED = "tagged"
    ORDERED = "ordered"


def validate(schedule: Schedule, *, wire: Wire = Wire.TAGGED) -> None:
    """Raise ScheduleError unless the schedule is complete and comes to its end on this wire.

    Every (stage, microbatch) has one F and, if the schedule trains, one B or one I and one W, on the stage's rank;
    weight gradients accumulate in microbatch order; each SEND has its RECV; no rank waits forever. The
    message names rank, column and what is waited for.
    """
    _check_places(schedule)
    _check_complete(schedule)
    _check_order(schedule)
    if not schedule.ops.isdisjoint(WHOLE_STAGE):
        _check_stage_actions(schedule)
    if schedule.lowered:
        _check_messages(schedule)
    if wire is Wire.ORDERED:
        _check_channels(schedule)
    _play(schedule, wire)


def _where(rank: int, column: int, action: Action) -> str:
    return f"rank {rank}, column {column} ({action})"


def _check_places(schedule: Schedule) -> None:
    if schedule.num_microbatches < 1:
        raise ScheduleError(f"{schedule.name}: a schedule needs at least 1 microbatch")
    if bad := [r for r in schedule.stage_to_rank if not 0 <= r < schedule.num_ranks]:
        raise ScheduleError(f"{schedule.name}: a stage is on rank {bad[0]}, there are {schedule.num_ranks} programs")
    seen: dict[Action, tuple[int, int]] = {}
    for rank, column, action in schedule.actions():
        if problem := _misplaced(schedule, rank, action):
            raise ScheduleError(f"{schedule.name}: {_where(rank, column, action)}: {problem}")
        if action in seen and action.op not in (Op.UNSHARD, Op.RESHARD):
            first = _where(*seen[action], action)
            raise ScheduleError(f"{schedule.name}: {_where(rank, column, action)} is there twice, first at {first}")
        seen[action] = (rank, column)


def _misplaced(schedule: Schedule, rank: int, action: Action) -> str | None:
    """What is wrong with an action's stage or microbatch on this rank."""
    stage, op, microbatch = action
    if not 0 <= stage < schedule.num_stages:
        return f"there are stages 0 to {schedule.num_stages - 1}"
    if schedule.stage_to_rank[stage] != rank:
        return f"stage {stage} is on rank {schedule.stage_to_rank[stage]}"
    if (op in WHOLE_STAGE) != (microbatch is None) or not (
        microbatch is None or 0 <= microbatch < schedule.num_microbatches
    ):
        return f"microbatches are 0 to {schedule.num_microbatches - 1}"
    return None


def _check_complete(schedule: Schedule) -> None:
    present = {action for _, _, action in schedule.actions()}
    for stage, rank in enumerate(schedule.stage_to_rank):
        for microbatch in range(schedule.num_microbatches):
            ops = {op for op in COMPUTE if Action(stage, op, microbatch) in present}
            wanted = [{Op.F, Op.B}, {Op.F, Op.I, Op.W}] if schedule.trains else [{Op.F}]
            if ops not in wanted:
                has = ", ".join(sorted(op.value for op in ops)) or "nothing"
                need = "F and either B, or I and W" if schedule.trains else "F"
                raise ScheduleError(
                    f"{schedule.name}: stage {stage} (rank {rank}) has {has} for microbatch {microbatch}; "
                    f"it needs {need}"
                )


def _check_order(schedule: Schedule) -> None:
    for stage, actions in schedule.gradient_actions.items():
        order = [action.microbatch for action in actions]
        if order != sorted(order, key=lambda m: -1 if m is None else m):
            raise ScheduleError(
                f"{schedule.name}: stage {stage} accumulates gradients in the order {order}; they must come in "
                "microbatch order, which is what makes schedules equal bit for bit"
            )


def _check_stage_actions(schedule: Schedule) -> None:
    """A table that has any of them has them all: parameters there before their first use, gradients reduced after the
    last, and only then let go. Left out, a reduction is a wrong gradient without a word."""
    for stage, rank in enumerate(schedule.stage_to_rank):
        program = [(column, a.op) for column, a in enumerate(schedule.programs[rank]) if a.stage == stage]
        uses = [column for column, op in program if op in COMPUTE]
        at = {op: [column for column, other in program if other == op] for op in WHOLE_STAGE}
        where = f"{schedule.name}: stage {stage} (rank {rank})"
        if not at[Op.UNSHARD] or at[Op.UNSHARD][0] > uses[0]:
            raise ScheduleError(f"{where} is used in column {uses[0]} before its UNSHARD")
        if not at[Op.RESHARD] or at[Op.RESHARD][-1] < uses[-1]:
            raise ScheduleError(f"{where} has no RESHARD after its last use in column {uses[-1]}")
        if schedule.trains and (not at[Op.REDUCE_GRAD] or at[Op.REDUCE_GRAD][0] < uses[-1]):
            raise ScheduleError(f"{where} has no REDUCE_GRAD after its last gradient in column {uses[-1]}")
        if schedule.trains and at[Op.REDUCE_GRAD][0] > at[Op.RESHARD][-1]:
            raise ScheduleError(f"{where}: REDUCE_GRAD comes after the last RESHARD, in column {at[Op.RESHARD][-1]}")


def _check_messages(schedule: Schedule) -> None:
    present = {action for _, _, action in schedule.actions()}
    last = schedule.num_stages - 1
    for rank, column, action in schedule.actions():
        if action.op in SENDS or action.op in RECVS:
            step = 1 if action.op in (Op.SEND_F, Op.RECV_B) else -1
            peer = action.stage + step
            other = (SENDS | RECVS)[action.op]
            if not 0 <= peer <= last or schedule.stage_to_rank[peer] == rank:
                raise ScheduleError(f"{schedule.name}: {_where(rank, column, action)} has no other rank to talk to")
            if Action(peer, other, action.microbatch) not in present:
                missing = Action(peer, other, action.microbatch)
                raise ScheduleError(f"{schedule.name}: {_where(rank, column, action)} has no {missing} to meet it")


def _channel(action: Action, schedule: Schedule) -> tuple[tuple[int, int], Action]:
    """(source, destination) of a SEND or RECV, and the message's name: its SEND."""
    send = action
    if action.op in RECVS:
        step = -1 if action.op == Op.RECV_F else 1
        send = Action(action.stage + step, RECVS[action.op], action.microbatch)
    target = send.stage + (1 if send.op == Op.SEND_F else -1)
    return (schedule.stage_to_rank[send.stage], schedule.stage_to_rank[target]), send


def _check_channels(schedule: Schedule) -> None:
    """On an ordered wire both ends must name the messages of a channel in the same order."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for _, _, action in schedule.actions():
        if action.op in SENDS or action.op in RECVS:
            channel, message = _channel(action, schedule)
            (sent if action.op in SENDS else received)[channel].append(message)
    for channel, messages in sent.items():
        for place, (left, right) in enumerate(zip(messages, received[channel], strict=True)):
            if left != right:
                raise ScheduleError(
                    f"{schedule.name}: on the channel from rank {channel[0]} to rank {channel[1]} message {place} "
                    f"is {left}, but rank {channel[1]} receives {right} there; "
                    "an ordered wire would deliver the wrong one"
                )


def _play(schedule: Schedule, wire: Wire) -> None:
    """Run all programs as far as they go. Raises ScheduleError where some rank cannot reach its end."""
    at = [0] * schedule.num_ranks
    done: set[Action] = set()
    posted: Counter[tuple[int, int]] = Counter()
    sent: Counter[tuple[int, int]] = Counter()

    def missing(action: Action) -> Action | None:
        if action.op in RECVS:
            return None
        if wire is Wire.ORDERED and action.op in SENDS:
            channel, _ = _channel(action, schedule)
            if posted[channel] <= sent[channel]:
                target = action.stage + (1 if action.op == Op.SEND_F else -1)
                return Action(target, SENDS[action.op], action.microbatch)
        for need in inputs(action, schedule):
            if need not in done:
                return need
            if need.op in RECVS and inputs(need, schedule)[0] not in done:
                return inputs(need, schedule)[0]
        return None

    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(schedule.programs):
            while at[rank] < len(program) and missing(program[at[rank]]) is None:
                action = program[at[rank]]
                if action.op in SENDS or action.op in RECVS:
                    channel, _ = _channel(action, schedule)
                    (sent if action.op in SENDS else posted)[channel] += 1
                done.add(action)
                at[rank] += 1
                moved = True
    stuck = [rank for rank, program in enumerate(schedule.programs) if at[rank] < len(program)]
    if stuck:
        lines = [
            f"{_where(rank, at[rank], schedule.programs[rank][at[rank]])} waits for "
            f"{missing(schedule.programs[rank][at[rank]])}"
            for rank in stuck
        ]
        raise ScheduleError(f"{schedule.name} cannot finish on a wire that is {wire.value}: " + "; ".join(lines))
