"""The schedules, each one a pure function from ranks and microbatches to a table. Imports no torch.

p ranks, m microbatches, r a rank; tF and tB the times of a stage's forward and backward.
To add one: write the function, add its line to SCHEDULES; its laws go into tests/pure/test_schedules.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from parallax.errors import ScheduleError
from parallax.pipeline.schedule import Action, Op, Schedule

__all__ = ["SCHEDULES", "forward_only", "gpipe", "one_f_one_b"]


def _check(num_ranks: int, num_microbatches: int) -> None:
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(
            f"a schedule needs at least 1 rank and 1 microbatch, not {num_ranks} and {num_microbatches}"
        )


def _one_stage_a_rank(name: str, num_ranks: int, num_microbatches: int, programs: list[list[Action]]) -> Schedule:
    return Schedule(name, num_microbatches, tuple(range(num_ranks)), tuple(tuple(p) for p in programs))


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards (arXiv:1811.06965).

    Makespan (m + p - 1)(tF + tB): bubble (p - 1)/(m + p - 1). In flight on every rank: m.
    """
    _check(num_ranks, num_microbatches)
    every = range(num_microbatches)
    programs = [[Action(r, Op.F, i) for i in every] + [Action(r, Op.B, i) for i in every] for r in range(num_ranks)]
    return _one_stage_a_rank("gpipe", num_ranks, num_microbatches, programs)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
    """Each rank warms up with p - 1 - r forwards, then alternates (PipeDream-flush, arXiv:2006.09503).

    Makespan (m + p - 1)(tF + tB), as gpipe. In flight on rank r: min(p - r, m).
    """
    _check(num_ranks, num_microbatches)
    programs = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        program = [Action(rank, Op.F, i) for i in range(warmup)]
        for index in range(num_microbatches):
            if warmup + index < num_microbatches:
                program.append(Action(rank, Op.F, warmup + index))
            program.append(Action(rank, Op.B, index))
        programs.append(program)
    return _one_stage_a_rank("1f1b", num_ranks, num_microbatches, programs)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of another schedule, in its own order and placement: for evaluation. Nothing is kept in flight."""
    programs = tuple(tuple(a for a in program if a.op == Op.F) for program in schedule.programs)
    return Schedule("forward-only", schedule.num_microbatches, schedule.stage_to_rank, programs)


SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType({"gpipe": gpipe, "1f1b": one_f_one_b})
"""By the name that pipeline.schedule takes."""
