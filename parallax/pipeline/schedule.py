"""A pipeline schedule as data: who does what in which order. Executed, simulated, checked and drawn from one table.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from parallax.errors import ScheduleError

__all__ = ["Action", "Op", "Schedule", "inputs"]


class Op(StrEnum):
    """What an action does, in the letters of the papers and of torch."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741 - the papers' letter for the input gradient
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    UNSHARD = "UNSHARD"
    RESHARD = "RESHARD"
    REDUCE_GRAD = "REDUCE_GRAD"


COMPUTE = frozenset({Op.F, Op.B, Op.I, Op.W})
SENDS = {Op.SEND_F: Op.RECV_F, Op.SEND_B: Op.RECV_B}
RECVS = {Op.RECV_F: Op.SEND_F, Op.RECV_B: Op.SEND_B}
WHOLE_STAGE = frozenset({Op.UNSHARD, Op.RESHARD, Op.REDUCE_GRAD})
_TEXT = re.compile(r"(\d{1,9})(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)(\d{0,9})")


class Action(NamedTuple):
    """One thing that one rank does. str() is torch's text form: "2F0", "3SEND_B1", "0UNSHARD".

    SEND_F sends the stage's output to the next stage, RECV_F receives the stage's input; SEND_B sends the gradient of
    the stage's input to the stage before, RECV_B receives the gradient of the stage's output.
    """

    stage: int
    op: Op
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{'' if self.microbatch is None else self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """Read the text form. Raises ScheduleError."""
        match = _TEXT.fullmatch(text.strip())
        op = Op(match[2]) if match else None
        if match is None or op is None or (match[3] == "") != (op in WHOLE_STAGE):
            raise ScheduleError(f"{text!r} is no action; write stage, op, microbatch, as in 2F0, 3SEND_B1 or 0UNSHARD")
        return cls(int(match[1]), op, int(match[3]) if match[3] else None)


@dataclass(frozen=True)
class Schedule:
    """The whole pipeline's program for one step, never one rank's view.

    stage_to_rank: which pipeline rank holds each stage. programs: each rank's actions, in order.
    """

    name: str
    num_microbatches: int
    stage_to_rank: tuple[int, ...]
    programs: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.stage_to_rank)

    @property
    def num_ranks(self) -> int:
        return len(self.programs)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(stage for stage, holder in enumerate(self.stage_to_rank) if holder == rank)

    def actions(self) -> Iterator[tuple[int, int, Action]]:
        """(rank, column, action) of every action."""
        for rank, program in enumerate(self.programs):
            for column, action in enumerate(program):
                yield rank, column, action

    @cached_property
    def ops(self) -> frozenset[Op]:
        """Which ops occur."""
        return frozenset(action.op for _, _, action in self.actions())

    @property
    def lowered(self) -> bool:
        """Whether messages between ranks are spelled out."""
        return not self.ops.isdisjoint(SENDS | RECVS)

    @property
    def trains(self) -> bool:
        """False for a schedule without any backward (evaluation)."""
        return not self.ops.isdisjoint({Op.B, Op.I, Op.W})

    @cached_property
    def splits(self) -> frozenset[tuple[int, int | None]]:
        """The (stage, microbatch) pairs whose backward is split into I and W."""
        return frozenset((a.stage, a.microbatch) for _, _, a in self.actions() if a.op == Op.I)

    @cached_property
    def gradient_actions(self) -> Mapping[int, tuple[Action, ...]]:
        """By stage, the actions that add to its weight gradients, in program order."""
        found: dict[int, list[Action]] = {stage: [] for stage in range(self.num_stages)}
        for _, _, action in self.actions():
            if action.op in (Op.B, Op.W) and 0 <= action.stage < self.num_stages:
                found[action.stage].append(action)
        return {stage: tuple(actions) for stage, actions in found.items()}


def inputs(action: Action, schedule: Schedule) -> tuple[Action, ...]:
    """What must have happened before an action may run: the only statement of it.

    A RECV may be posted at any time, what it brings exists once its SEND has happened; it is the compute action
    that needs both.
    """
    stage, op, microbatch = action
    last = schedule.num_stages - 1

    def from_stage(neighbour: int, made: Op, received: Op) -> Action:
        far = schedule.stage_to_rank[neighbour] != schedule.stage_to_rank[stage]
        if far and schedule.lowered:
            return Action(stage, received, microbatch)
        if made == Op.B and (neighbour, microbatch) in schedule.splits:
            made = Op.I
        return Action(neighbour, made, microbatch)

    if op == Op.F:
        return (from_stage(stage - 1, Op.F, Op.RECV_F),) if stage > 0 else ()
    if op in (Op.B, Op.I):
        own = Action(stage, Op.F, microbatch)
        return (own, from_stage(stage + 1, Op.B, Op.RECV_B)) if stage < last else (own,)
    if op == Op.W:
        return (Action(stage, Op.I, microbatch),)
    if op == Op.SEND_F:
        return (Action(stage, Op.F, microbatch),)
    if op == Op.SEND_B:
        return (Action(stage, Op.I if (stage, microbatch) in schedule.splits else Op.B, microbatch),)
    if op == Op.RECV_F:
        return (Action(stage - 1, Op.SEND_F, microbatch),)
    if op == Op.RECV_B:
        return (Action(stage + 1, Op.SEND_B, microbatch),)
    if op == Op.REDUCE_GRAD:
        return schedule.gradient_actions[stage]
    return ()
