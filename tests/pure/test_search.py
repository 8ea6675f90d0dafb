"""The search: never worse than the best registered schedule in the same memory, and honest about its bound."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.errors import ScheduleError
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Op
from parallax.pipeline.schedules import SCHEDULES, make_schedule
from parallax.pipeline.search import generate, lower_bound, search, stage_cost, weighted_peak
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.split import Unit, balanced_split, check_partition
from parallax.pipeline.validate import Wire, validate

EVEN = [Unit(f"u{i}", 1.0, 1) for i in range(16)]
TIMES = st.lists(st.floats(0.1, 5.0), min_size=8, max_size=14)


def hand_made(units: list[Unit], num_ranks: int, num_microbatches: int, cap: float) -> list[float]:
    """Makespans of the registered schedules that fit the memory."""
    found = []
    for name in SCHEDULES:
        table = make_schedule(name, num_ranks, num_microbatches)
        if table.num_stages > len(units):
            continue
        spans = balanced_split(units, table.num_stages, table.stage_to_rank)
        weights = [(b - a) * num_ranks / len(units) for a, b in spans]
        if weighted_peak(table, weights) <= cap + 1e-9:
            found.append(simulate(table, stage_cost(units, spans, num_ranks)).makespan)
    return found


@given(TIMES, st.integers(1, 4), st.integers(1, 9), st.floats(1.0, 8.0))
@settings(max_examples=40)
def test_never_worse_than_a_registered_schedule(times: list[float], num_ranks: int, num_microbatches: int, cap: float):
    units = [Unit(str(i), time, 1) for i, time in enumerate(times)]
    best = min(hand_made(units, num_ranks, num_microbatches, cap), default=None)
    try:
        found = search(units, num_ranks, num_microbatches, memory_cap=cap)
    except ScheduleError as error:
        assert best is None and "the least that any table needs" in str(error)
        return
    assert best is None or found.timeline.makespan <= best + 1e-9
    assert found.peak <= cap + 1e-6 and found.bound <= found.timeline.makespan + 1e-6
    check_partition(found.spans, units)
    for wire in Wire:
        validate(lower(found.schedule), wire=wire)
    assert search(units, num_ranks, num_microbatches, memory_cap=cap) == found, "deterministic"


def test_more_memory_is_never_slower_and_less_is_never_free():
    makespans = [search(EVEN, 4, 12, memory_cap=cap).timeline.makespan for cap in (2, 3, 4, 7, 12)]
    assert makespans == sorted(makespans, reverse=True) and makespans[0] > makespans[-1]


def test_at_equal_times_it_finds_the_zero_bubble():
    found = search(EVEN, 4, 16, memory_cap=7.0)
    assert found.timeline.makespan == pytest.approx(found.bound)
    # In the memory of 1F1B as well: ZB-V.
    found = search(EVEN, 4, 16)
    assert found.peak <= 4 and found.timeline.bubble < 0.04


@given(st.integers(2, 4), st.integers(1, 6), st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=12, max_size=12))
@settings(max_examples=40)
def test_the_bound_is_below_every_table(num_ranks: int, num_microbatches: int, times: list[float]):
    for name, make in SCHEDULES.items():
        table = make(num_ranks, num_microbatches)
        n = table.num_stages
        if n > 4:
            continue
        cost = Cost(times[:n], times[n : 2 * n], times[2 * n : 3 * n])
        assert lower_bound(table, cost) <= simulate(table, cost).makespan + 1e-9, name


def test_the_generator_keeps_its_memory():
    cost = Cost([1.0] * 3, [1.0] * 3, [1.0] * 3)
    preference = ((Op.I, 0), (Op.F, 0))
    for cap in (1.0, 2.0, 3.0, 5.0):
        table = generate((0, 1, 2), 9, cost, [1.0] * 3, cap, preference)
        assert table is not None
        validate(table)
        assert weighted_peak(table, [1.0] * 3) <= cap
    assert generate((0, 1, 2), 9, cost, [1.0] * 3, 0.5, preference) is None, "nothing fits"
    for rank, program in itertools.product(range(3), table.programs):
        assert len(program) == 27, rank
