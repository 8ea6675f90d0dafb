"""The schedules, each one a pure function from ranks and microbatches to a table. Imports no torch.

p ranks, m microbatches, r a rank, v stages a rank; tF, tI, tW the times of a stage's forward, input-gradient and
weight-gradient passes, tB = tI + tW. "In flight" counts the microbatches of which a rank holds activations: those
whose F is done and whose B, or W, is not. To add one: write the function, add its line to SCHEDULES; its laws go into
tests/pure/test_schedules.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from parallax.arguments import suggestion
from parallax.errors import ScheduleError
from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.v_schedules import dualpipe_v, v_half, v_min, zb_v

__all__ = [
    "SCHEDULES",
    "forward_only",
    "gpipe",
    "interleaved",
    "leaves_stages",
    "make_schedule",
    "one_f_one_b",
    "split_backward",
    "zb_h1",
    "zb_h2",
]

Programs = list[list[Action]]


def _one_stage_a_rank(name: str, num_microbatches: int, programs: Programs) -> Schedule:
    return Schedule(name, num_microbatches, tuple(range(len(programs))), tuple(tuple(p) for p in programs))


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (arXiv:1811.06965).

    Makespan (m + p - 1)(tF + tB): bubble (p - 1)/(m + p - 1). In flight on every rank: m.
    """
    every = range(num_microbatches)
    programs = [[Action(r, Op.F, i) for i in every] + [Action(r, Op.B, i) for i in every] for r in range(num_ranks)]
    return _one_stage_a_rank("gpipe", num_microbatches, programs)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Each rank warms up with p - 1 - r forwards, then alternates (PipeDream-flush, arXiv:2006.09503).

    Makespan (m + p - 1)(tF + tB), as gpipe. In flight on rank r: min(p - r, m).
    """
    programs = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        program = [Action(rank, Op.F, i) for i in range(warmup)]
        for index in range(num_microbatches):
            if warmup + index < num_microbatches:
                program.append(Action(rank, Op.F, warmup + index))
            program.append(Action(rank, Op.B, index))
        programs.append(program)
    return _one_stage_a_rank("1f1b", num_microbatches, programs)


def interleaved(num_ranks: int, num_microbatches: int, stages_per_rank: int = 2) -> Schedule:
    """1F1B over v stages a rank, stage s on rank s mod p, microbatches taken in groups of about p (arXiv:2104.04473).

    Where p does not divide m the groups are of nearly equal size, p at least. For m >= p: makespan
    (m*v + p - 1)(tF + tB) with the times of one of the v*p stages, bubble (p - 1)/(m*v + p - 1). In flight on rank r,
    in stages: 2(p - 1 - r) + (v - 1)g + 1, g the first group's size, at most m*v.
    """
    v, count = stages_per_rank, max(1, num_microbatches // num_ranks)
    sizes = [num_microbatches // count + (k < num_microbatches % count) for k in range(count)]
    order = []  # (which of the rank's stages, microbatch) of the forwards; of the backwards in reverse of the stages
    first = 0
    for size in sizes:
        order += [(chunk, first + k) for chunk in range(v) for k in range(size)]
        first += size
    programs = []
    for rank in range(num_ranks):
        forwards = [Action(chunk * num_ranks + rank, Op.F, i) for chunk, i in order]
        backwards = [Action((v - 1 - chunk) * num_ranks + rank, Op.B, i) for chunk, i in order]
        warmup = min(len(order), 2 * (num_ranks - 1 - rank) + (v - 1) * sizes[0])
        program = forwards[:warmup]
        for index, backward in enumerate(backwards):
            program += [*forwards[warmup + index : warmup + index + 1], backward]
        programs.append(tuple(program))
    places = tuple(stage % num_ranks for stage in range(v * num_ranks))
    return Schedule("interleaved", num_microbatches, places, tuple(programs))


def split_backward(schedule: Schedule, name: str, delays: Sequence[int]) -> Schedule:
    """Another schedule with every B cut into I and W, rank r's W following delays[r] backwards after its I."""
    programs = []
    for program, delay in zip(schedule.programs, delays, strict=True):
        out: list[Action] = []
        owed: list[Action] = []
        for action in program:
            if action.op != Op.B:
                out.append(action)
                continue
            out.append(action._replace(op=Op.I))
            owed.append(action._replace(op=Op.W))
            if len(owed) > delay:
                out.append(owed.pop(0))
        programs.append((*out, *owed))
    return Schedule(name, schedule.num_microbatches, schedule.stage_to_rank, tuple(programs))


def zb_h1(num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B with the backward split; rank r does W r microbatches after I, so that I is never kept waiting
    (arXiv:2401.10241, ZB-H1).

    For m >= p at equal times: makespan m(tF + tI + tW) + (p - 1)(tF + tI - tW). In flight on every rank: min(p, m), as
    on 1F1B's first.
    """
    base = one_f_one_b(num_ranks, num_microbatches)
    return split_backward(base, "zb-h1", delays=range(num_ranks))


def zb_h2(num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB-H1 with more warm-up: no rank idles between its first and its last action (arXiv:2401.10241, ZB-H2).

    For m >= 2p - 1 at equal times: makespan 3m + p - 1 in units of tF, of which the p - 1 are the time until the last
    rank starts, or before it ends. In flight on every rank: min(2p - 1, m).
    """
    programs = []
    for rank in range(num_ranks):
        warmup = min(2 * (num_ranks - rank) - 1, num_microbatches)
        program = [Action(rank, Op.F, i) for i in range(warmup)]
        for index in range(num_microbatches):
            program.append(Action(rank, Op.I, index))
            if index >= 2 * rank:
                program.append(Action(rank, Op.W, index - 2 * rank))
            if warmup + index < num_microbatches:
                program.append(Action(rank, Op.F, warmup + index))
        program += [Action(rank, Op.W, i) for i in range(max(0, num_microbatches - 2 * rank), num_microbatches)]
        programs.append(program)
    return _one_stage_a_rank("zb-h2", num_microbatches, programs)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of another schedule, in its own order and placement: for evaluation. Nothing is kept in flight."""
    programs = tuple(tuple(a for a in program if a.op == Op.F) for program in schedule.programs)
    return Schedule("forward-only", schedule.num_microbatches, schedule.stage_to_rank, programs)


SCHEDULES: Mapping[str, Callable[..., Schedule]] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zb-h1": zb_h1,
        "zb-h2": zb_h2,
        "zb-v": zb_v,
        "v-half": v_half,
        "v-min": v_min,
        "dualpipe-v": dualpipe_v,
    }
)
"""By the name that pipeline.schedule takes."""


def leaves_stages(name: str) -> bool:
    """Whether a registered schedule leaves the number of stages a rank to the user."""
    return "stages_per_rank" in inspect.signature(SCHEDULES[name]).parameters


def make_schedule(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The table of a registered schedule. stages_per_rank: for those that leave the choice (interleaved).

    Raises ScheduleError for an unknown name, sizes below 1, or stages that the schedule does not have.
    """
    if name not in SCHEDULES:
        hint = suggestion(name.lower().replace("_", "-"), [*SCHEDULES, "auto"])
        raise ScheduleError(
            f"pipeline.schedule={name} is unknown; {hint}choose one of {', '.join(SCHEDULES)}, auto, or a table's "
            "FILE.csv"
        )
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule needs at least 1 rank and 1 microbatch, not {num_ranks} and {num_microbatches}"
        )
    make = SCHEDULES[name]
    if stages_per_rank is None:
        return make(num_ranks, num_microbatches)
    if leaves_stages(name):
        return make(num_ranks, num_microbatches, stages_per_rank)
    schedule = make(num_ranks, num_microbatches)
    if schedule.num_stages != stages_per_rank * num_ranks:
        raise ScheduleError(
            f"pipeline.schedule={name} has {schedule.num_stages // num_ranks} stages a rank, pipeline.stages_per_rank="
            f"{stages_per_rank}; leave the key out, or take pipeline.schedule=interleaved"
        )
    return schedule
