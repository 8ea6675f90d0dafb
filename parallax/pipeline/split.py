"""Which units of the model each stage holds: balanced contiguous spans, or as the user says. Imports no torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from parallax.errors import ConfigError, ScheduleError

__all__ = ["Span", "Unit", "balanced_split", "check_partition", "split_from_layers", "stage_table"]

Span = tuple[int, int]
"""Units [first, last)."""

TOLERANCE = 1.05


@dataclass(frozen=True, slots=True)
class Unit:
    """A piece of the model that is never cut: the embedding, a layer, the head. flops: forward, a token."""

    name: str
    flops: float
    params: int


def balanced_split(
    units: Sequence[Unit],
    num_stages: int,
    stage_to_rank: Sequence[int] | None = None,
    *,
    allowed: Callable[[int, Span], bool] = lambda stage, span: True,
) -> tuple[Span, ...]:
    """Contiguous spans, each with a unit at least, whose largest FLOPs are as small as can be.

    Of the splits within 5 % of that, the one whose largest stage has the fewest parameters: time first, then memory.
    The embedding has parameters and hardly FLOPs, the head has both. Dynamic programming, O(L^2 p). Where ranks
    hold several stages (stage_to_rank), borders then move as long as the busiest rank gets less to do.
    allowed(stage, span): whether the stage may hold those units (its memory).
    Raises ConfigError where there are more stages than units, or no split is allowed.
    """
    if not 1 <= num_stages <= len(units):
        raise ConfigError(
            f"{num_stages} pipeline stages cannot share {len(units)} units (embedding, layers, head), a stage needs "
            f"one at least; use pipeline of at most {len(units)} or more layers"
        )
    flops = [0.0, *accumulate(unit.flops for unit in units)]
    params = [0, *accumulate(unit.params for unit in units)]
    infinite = float("inf")

    def time(stage: int, i: int, j: int) -> float:
        return flops[j] - flops[i] if allowed(stage, (i, j)) else infinite

    fastest = _min_max(len(units), num_stages, time)
    if fastest is None:
        raise ConfigError(f"no split of {len(units)} units into {num_stages} stages is allowed")
    limit = TOLERANCE * max(flops[j] - flops[i] for i, j in fastest)

    def memory(stage: int, i: int, j: int) -> float:
        return infinite if time(stage, i, j) > limit else float(params[j] - params[i])

    spans = _min_max(len(units), num_stages, memory)
    assert spans is not None
    if stage_to_rank is None or len(set(stage_to_rank)) == num_stages:
        return spans
    return _balance_ranks(spans, flops, params, stage_to_rank, allowed)


def _balance_ranks(
    spans: tuple[Span, ...],
    flops: Sequence[float],
    params: Sequence[int],
    stage_to_rank: Sequence[int],
    allowed: Callable[[int, Span], bool],
) -> tuple[Span, ...]:
    """Move one border, or two, by a unit as long as the ranks get more even. flops and params are running sums."""

    def loads(spans: Sequence[Span], sums: Sequence[float]) -> list[float]:
        total = dict.fromkeys(stage_to_rank, 0.0)
        for rank, (first, last) in zip(stage_to_rank, spans, strict=True):
            total[rank] += sums[last] - sums[first]
        return sorted(total.values(), reverse=True)

    def badness(spans: Sequence[Span]) -> tuple[object, ...]:
        return loads(spans, flops), max(flops[j] - flops[i] for i, j in spans), loads(spans, params)

    best, least = spans, badness(spans)
    while True:
        found = [(badness(other), other) for other in _neighbours(best) if all(map(allowed, range(len(other)), other))]
        better = min((item for item in found if item[0] < least), default=None)
        if better is None:
            return best
        least, best = better


def _neighbours(spans: tuple[Span, ...]) -> list[tuple[Span, ...]]:
    """The splits in which one border or two lie a unit further left or right, no stage empty."""
    borders = [first for first, _ in spans[1:]]
    end = spans[-1][1]
    found = set()
    for one in range(len(borders)):
        for two in range(one, len(borders)):
            for step, other in itertools.product((-1, 0, 1), repeat=2):
                moved = list(borders)
                moved[one] += step
                moved[two] += other if two != one else 0
                edges = [0, *moved, end]
                if all(a < b for a, b in itertools.pairwise(edges)):
                    found.add(tuple(itertools.pairwise(edges)))
    return sorted(found)


def _min_max(num_units: int, num_stages: int, cost: Callable[[int, int, int], float]) -> tuple[Span, ...] | None:
    """The spans with the least largest cost(stage, first, last); of equals, the one whose last stages end earliest."""
    best = [[float("inf")] * (num_units + 1) for _ in range(num_stages + 1)]
    cut = [[0] * (num_units + 1) for _ in range(num_stages + 1)]
    best[0][0] = 0.0
    for stages in range(1, num_stages + 1):
        for end in range(stages, num_units + 1):
            for start in range(stages - 1, end):
                worst = max(best[stages - 1][start], cost(stages - 1, start, end))
                if worst < best[stages][end]:
                    best[stages][end], cut[stages][end] = worst, start
    if best[num_stages][num_units] == float("inf"):
        return None
    spans: list[Span] = []
    end = num_units
    for stages in range(num_stages, 0, -1):
        spans.append((cut[stages][end], end))
        end = cut[stages][end]
    return tuple(reversed(spans))


def split_from_layers(layers: Sequence[int], units: Sequence[Unit]) -> tuple[Span, ...]:
    """The user's split: layers per stage. The embedding joins the first stage, the head the last.

    Raises ConfigError where the numbers do not add up to the layers.
    """
    if sum(layers) != len(units) - 2:
        raise ConfigError(f"pipeline.split={list(layers)} sums to {sum(layers)}, the model has {len(units) - 2} layers")
    if not layers or min(layers) < 0 or 0 in layers[1:-1]:
        raise ConfigError(f"pipeline.split={list(layers)} leaves a stage empty; give each at least 1 layer")
    ends = [1 + end for end in accumulate(layers)]
    ends[-1] += 1
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def check_partition(spans: Sequence[Span], units: Sequence[Unit]) -> None:
    """The union of the stages is the model exactly once, and no stage is empty. Raises ScheduleError."""
    held = [unit for first, last in spans for unit in range(first, last)]
    if held != list(range(len(units))) or any(first >= last for first, last in spans):
        raise ScheduleError(f"the stages {list(spans)} are not units 0 to {len(units) - 1} exactly once")


def stage_table(
    spans: Sequence[Span],
    units: Sequence[Unit],
    stage_to_rank: Sequence[int],
    in_flight: Sequence[int] = (),
    num_bytes: Sequence[float] = (),
) -> str:
    """A line a stage: rank, parameters, share of the FLOPs, microbatches in flight, predicted memory, units."""
    total = sum(unit.flops for unit in units) or 1.0
    extra = ("  in flight" if in_flight else "") + ("     memory" if num_bytes else "")
    lines = [f"stage  rank       params  FLOPs{extra}  units"]
    for stage, (first, last) in enumerate(spans):
        inside = units[first:last]
        names = inside[0].name if len(inside) == 1 else f"{inside[0].name} .. {inside[-1].name}"
        share = sum(unit.flops for unit in inside) / total
        params = sum(unit.params for unit in inside)
        line = f"{stage:>5}  {stage_to_rank[stage]:>4}  {params:>11,}  {share:>5.1%}"
        line += f"  {in_flight[stage]:>9}" if in_flight else ""
        line += f"  {num_bytes[stage] / 1e6:>6,.0f} MB" if num_bytes else ""
        lines.append(f"{line}  {names}")
    return "\n".join(lines)
