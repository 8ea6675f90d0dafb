"""Schedules of two stages a rank in the shape of a V: rank r holds stages r and 2p - 1 - r. Imports no torch.

What comes down the V turns round on the last rank, so the first stage and the last are on rank 0. Units are the times
of one of the 2p stages; "in flight" is counted in stages, and a stage is half of what a rank of 1F1B holds.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque

from parallax.pipeline.schedule import Action, Op, Schedule

__all__ = ["dualpipe_v", "v_half", "v_min", "zb_v"]

DOWN, UP = 0, 1
"""Which of a rank's two stages: the one on the way down (stage r), the one on the way up."""


class _Program:
    """Writes one rank's program: each op takes the next microbatch of its stage; those beyond m are left out."""

    def __init__(self, rank: int, num_ranks: int, num_microbatches: int) -> None:
        self.stages = (rank, 2 * num_ranks - 1 - rank)
        self.num_microbatches = num_microbatches
        self.done: Counter[tuple[str, int]] = Counter()
        self.actions: list[Action] = []
        self.owed: deque[tuple[int, int]] = deque()  # weight gradients that wait, oldest first

    def _next(self, kind: str, side: int) -> int:
        self.done[kind, side] += 1
        return self.done[kind, side] - 1

    def _put(self, op: Op, side: int, microbatch: int) -> None:
        if microbatch < self.num_microbatches:
            self.actions.append(Action(self.stages[side], op, microbatch))

    def f(self, side: int) -> _Program:
        self._put(Op.F, side, self._next("F", side))
        return self

    def b(self, side: int) -> _Program:
        self._put(Op.B, side, self._next("B", side))
        return self

    def i(self, side: int) -> _Program:
        microbatch = self._next("B", side)
        self._put(Op.I, side, microbatch)
        self.owed.append((side, microbatch))
        return self

    def w(self, side: int | None = None) -> _Program:
        """The oldest weight gradient owed, of this side or of any."""
        owed = next((item for item in self.owed if side in (None, item[0])), None)
        if owed is not None:
            self.owed.remove(owed)
            self._put(Op.W, *owed)
        return self


def _schedule(name: str, num_microbatches: int, programs: list[list[Action]]) -> Schedule:
    stages = 2 * len(programs)
    places = tuple(min(stage, stages - 1 - stage) for stage in range(stages))
    return Schedule(name, num_microbatches, places, tuple(tuple(program) for program in programs))


def zb_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """The zero bubble of ZB-H2 within the memory of 1F1B (arXiv:2401.10241 section 6, arXiv:2405.15362 V-ZB).

    For m >= 2p - 1 at equal times: makespan 6m + p - 1, no rank idle between its first and its last action. In
    flight: at most 2p stages, as much as 1F1B's first rank. Made for 2p - 1 microbatches at least; of fewer, the rest
    is left out, and ranks wait.
    """
    p, count = num_ranks, max(2 * num_ranks - 1, num_microbatches)
    programs = []
    for rank in range(p):
        do = _Program(rank, p, num_microbatches)
        for _ in range(2 * (p - rank) - 1):
            do.f(DOWN)
        for _ in range(rank):
            do.f(UP).f(DOWN)
        for _ in range(p - rank):
            do.f(UP).i(UP).w(UP)
        while do.done["F", UP] < count:
            if do.done["F", DOWN] < count:
                do.f(DOWN)
            do.i(DOWN).w(DOWN).f(UP).i(UP).w(UP)
        for _ in range(rank):
            do.i(DOWN).i(UP)
        for _ in range(p - rank):
            do.i(DOWN).w(DOWN)
        for side in (UP, DOWN):
            while any(owed == side for owed, _ in do.owed):
                do.w(side)
        programs.append(do.actions)
    return _schedule("zb-v", num_microbatches, programs)


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe cut in half (DeepSeek-V3, arXiv:2412.19437, section 3.2.1, in the V form that its authors published).

    A steady state of F on one stage beside B on the other, which hardware can overlap; weight gradients are put off
    at both ends alone. For m >= 2p, p > 1, at tF = tI = tW: makespan 6m + p. In flight: 2p + 1 stages. Made for 2p
    microbatches at least, as zb_v.
    """
    p, count = num_ranks, max(2 * num_ranks, num_microbatches)
    programs = []
    for rank in range(p):
        do = _Program(rank, p, num_microbatches)
        later = p - rank - 1
        for _ in range(2 * later):
            do.f(DOWN)
        for _ in range(rank + 1):
            do.f(DOWN).f(UP)
        for _ in range(later):
            do.i(UP).w().f(UP)
        for _ in range(count - 2 * p + rank + 1):
            do.f(DOWN).b(UP).f(UP).b(DOWN)
        for _ in range(later):
            do.b(UP).f(UP).b(DOWN)
        for number in range(rank + 1):
            for side in (UP, DOWN):
                do.i(side) if number >= (rank + 1) // 2 else do.b(side)
        for _ in range(later):
            do.w().i(DOWN)
        while do.owed:
            do.w()
        programs.append(do.actions)
    return _schedule("dualpipe-v", num_microbatches, programs)


def v_half(num_ranks: int, num_microbatches: int) -> Schedule:
    """Half of 1F1B's memory for a longer bubble (arXiv:2405.15362, V-Half).

    In flight: at most p + 3 stages. At equal times the makespan is 6m plus at most 3.5p, whatever m.
    """
    return _repeated("v-half", num_ranks, num_microbatches, down=2, up=1)


def v_min(num_ranks: int, num_microbatches: int) -> Schedule:
    """A third of 1F1B's memory, the least that a V can do with (arXiv:2405.15362, V-Min).

    In flight: at most 2p/3 + 3 stages. At equal times, p > 1: makespan 6m + 4p - 5, 2 more where 3 divides p.
    """
    return _repeated("v-min", num_ranks, num_microbatches, down=1, up=1)


def _repeated(name: str, num_ranks: int, num_microbatches: int, *, down: int, up: int) -> Schedule:
    """One block of six passes, repeated for every microbatch six units later (arXiv:2405.15362, section 3).

    down, up: units between neighbouring ranks for F on the way down and I after it, and for F and I on the way up. The
    fewer, the shorter an activation lives. Only the order is kept: what can start earlier does.
    """
    turns = _turns(num_ranks, down, up)
    programs = []
    for rank in range(num_ranks):
        times = _times(rank, num_ranks, turns, down, up)
        free = sorted(set(range(6)) - {time % 6 for time in times.values()})
        for side in (UP, DOWN):
            first = times[Op.I, side] + 1
            times[Op.W, side] = next(t for t in range(first, first + 6) if t % 6 in free)
            free.remove(times[Op.W, side] % 6)
        stages = (rank, 2 * num_ranks - 1 - rank)
        timed = [
            (time + 6 * i, Action(stages[side], op, i))
            for (op, side), time in times.items()
            for i in range(num_microbatches)
        ]
        programs.append([action for _, action in sorted(timed, key=lambda item: item[0])])
    return _schedule(name, num_microbatches, programs)


def _times(rank: int, num_ranks: int, turns: tuple[int, int, int], down: int, up: int) -> dict[tuple[Op, int], int]:
    """When a rank does the passes of microbatch 0. turns: F turning up, I setting out, I turning up."""
    below = num_ranks - 1 - rank
    return {
        (Op.F, DOWN): down * rank,
        (Op.F, UP): turns[0] + up * below,
        (Op.I, UP): turns[1] + down * rank,
        (Op.I, DOWN): turns[2] + up * below,
    }


def _turns(num_ranks: int, down: int, up: int) -> tuple[int, int, int]:
    """The earliest turning points at which no rank has two passes in the same one of the six slots."""
    for gaps in sorted(itertools.product(range(6), repeat=3), key=lambda gaps: (sum(gaps), gaps)):
        first = down * (num_ranks - 1) + 1 + gaps[0]
        second = first + up * (num_ranks - 1) + 1 + gaps[1]
        turns = (first, second, second + down * (num_ranks - 1) + 1 + gaps[2])
        slots = ([t % 6 for t in _times(r, num_ranks, turns, down, up).values()] for r in range(num_ranks))
        if all(len(set(slot)) == 4 for slot in slots):
            return turns
    raise AssertionError("six slots always have room for four passes")
