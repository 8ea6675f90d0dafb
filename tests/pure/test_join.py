"""Backwards that a schedule need not split are whole, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallax.config_io import load
from parallax.pipeline import join as joining
from parallax.pipeline.join import join, likely_costs
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Op, Schedule
from parallax.pipeline.schedules import SCHEDULES, make_schedule, split_backward
from parallax.pipeline.search import weighted_peak
from parallax.pipeline.simulate import Cost, Timeline, simulate
from parallax.pipeline.table import to_text
from parallax.pipeline.validate import Wire, validate
from parallax.stage_plan import plan_stages, stage_in_flight


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_table_gets_longer_or_holds_more(name: str, recomputes: bool):
    """Nor at any of the costs that it was chosen by, which have times of their own for each stage."""
    for p, m in [(1, 1), (1, 3), (2, 1), (2, 3), (2, 5), (2, 8), (3, 2), (3, 7), (4, 4), (4, 9), (5, 6)]:
        table = make_schedule(name, p, m)
        costs = likely_costs([1.0 + 0.1 * s for s in range(table.num_stages)], recomputes)
        assert len(costs) == (8 if recomputes else 4)
        joined = join(table, costs)
        validate(lower(joined), wire=Wire.ORDERED)  # gradients in microbatch order, each once, and it ends
        for cost in costs:
            assert simulate(joined, cost).makespan <= simulate(table, cost).makespan * (1 + 1e-8)
        ones = [1.0] * table.num_stages
        assert weighted_peak(joined, ones) <= weighted_peak(table, ones)
        assert joined.splits <= table.splits
        if not table.splits:
            assert joined == table


def test_zb_h2_splits_what_its_end_needs():
    """The first rank's W follows its I, and its I is sent to nobody; of the last rank's three remain: at equal times W
    of the last two fill its end, and where W takes less, those of the last three."""
    joined = join(make_schedule("zb-h2", 2, 8), likely_costs(1.0, False))
    assert joined.splits == {(1, 5), (1, 6), (1, 7)}
    assert " ".join(map(str, joined.programs[0])) == "0F0 0F1 0F2 0B0 0F3 0B1 0F4 0B2 0F5 0B3 0F6 0B4 0F7 0B5 0B6 0B7"
    assert simulate(joined, Cost()).makespan == 25 and simulate(make_schedule("1f1b", 2, 8), Cost()).makespan == 27


def test_what_the_costs_say_is_heeded():
    """Where whole backwards are dearer only the first stage's are whole, without a trial; and each stage has its own
    time: a last one that has less to do need not be quick."""
    table = make_schedule("zb-h2", 2, 8)
    assert join(table, [Cost(whole=2.2)]).splits == {(1, microbatch) for microbatch in range(8)}
    assert not join(table, [Cost([4.0, 1.0], [4.0, 1.0], [4.0, 1.0])]).splits
    assert len(join(table, [Cost([1.0, 4.0], [1.0, 4.0], [1.0, 4.0])]).splits) == 1
    slow_rank = likely_costs([1.0, 4.0], False)[0]
    assert (slow_rank.input_grad, slow_rank.whole) == ([1.0, 4.0], [1.9, 7.6])


def test_one_rank_splits_nothing():
    table = split_backward(make_schedule("1f1b", 1, 5), "split", [2])
    assert join(table, likely_costs(1.0, False)).programs == make_schedule("1f1b", 1, 5).programs


def test_large_tables_are_searched_as_far_as_time_allows(monkeypatch: pytest.MonkeyPatch):
    """Nothing but what nobody waits for, then all stages together, then each alone: fewer and fewer are split."""
    table = make_schedule("zb-h2", 4, 16)
    costs = likely_costs([1.0 + 0.1 * stage for stage in range(table.num_stages)], False)
    monkeypatch.setattr(joining, "PLAYED_AT_MOST", 0)
    unsearched = join(table, costs)
    assert len(unsearched.splits) == 3 * 16
    one_search = 2 * (16).bit_length() * len(costs) * sum(map(len, unsearched.programs))
    left = [len(unsearched.splits)]
    for searches in (1, 4):
        monkeypatch.setattr(joining, "PLAYED_AT_MOST", searches * one_search)
        left.append(len(join(table, costs).splits))
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), [("zb-v", 8, 64), ("zb-h2", 16, 64), ("zb-v", 32, 256)])
def test_no_more_actions_are_played_than_planned(
    monkeypatch: pytest.MonkeyPatch, name: str, ranks: int, microbatches: int
):
    played = 0

    def counted(schedule: Schedule, cost: Cost) -> Timeline:
        nonlocal played
        played += sum(map(len, schedule.programs))
        return simulate(schedule, cost)

    monkeypatch.setattr(joining, "simulate", counted)
    table = make_schedule(name, ranks, microbatches)
    joined = join(table, likely_costs(1.0, False))
    assert played <= 1.2 * joining.PLAYED_AT_MOST
    assert not any(stage == 0 for stage, _ in joined.splits) or len(joined.splits) < len(table.splits) / 2


def test_a_run_has_the_joined_table_and_says_so_but_a_user_s_own_stays(tmp_path: Path):
    keys = ["mesh=1x1x2", "batch.microbatch_size=2", "batch.global_size=16"]
    plan = plan_stages(load([*keys, "pipeline.schedule=zb-h2"]))
    assert 0 < len(plan.schedule.splits) < 5
    assert f"zb-h2, {len(plan.schedule.splits)} of 16 backwards in two" in plan.describe()
    path = tmp_path / "mine.csv"
    path.write_text(to_text(make_schedule("zb-h2", 2, 8)))
    own = plan_stages(load([*keys, f"pipeline.schedule={path}"]))
    assert len(own.schedule.splits) == 16
    assert "backwards in two" not in plan_stages(load(keys)).describe()


def test_memory_is_predicted_of_the_table_that_runs(tmp_path: Path):
    keys = ["mesh=1x1x4", "batch.microbatch_size=2", "batch.global_size=16", "model.layers=8"]
    path = tmp_path / "mine.csv"
    path.write_text(to_text(make_schedule("v-half", 4, 8)))
    named, own = (plan_stages(load([*keys, f"pipeline.schedule={name}"])) for name in ("v-half", path))
    assert [stage_in_flight(named.schedule, s) for s in range(8)] != [
        stage_in_flight(own.schedule, s) for s in range(8)
    ]
    assert sum(m.total for m in named.memory) < sum(m.total for m in own.memory)


def test_a_run_s_stages_and_recomputation_count():
    """Where the last rank has least to do, it can take its backwards whole."""
    keys = ["mesh=1x1x2", "batch.microbatch_size=2", "batch.global_size=16", "pipeline.schedule=zb-h2"]
    uneven = plan_stages(load([*keys, "model.layers=8", "pipeline.split=6,2"]))
    assert not uneven.schedule.splits
    splits = [
        plan_stages(load(["mesh=1x1x4", *keys[1:2], "batch.global_size=32", keys[3], recompute])).schedule.splits
        for recompute in ("recompute=none", "recompute=full")
    ]
    assert splits[0] != splits[1]


def test_the_table_that_is_found_is_joined():
    plan = plan_stages(
        load(["mesh=1x1x2", "batch.microbatch_size=2", "batch.global_size=16", "pipeline.schedule=auto"])
    )
    whole = [a for _, _, a in plan.schedule.actions() if a.op == Op.B]
    assert plan.schedule.name == "auto" and whole
    assert "backwards in two" in plan.describe() and "holds" in plan.note
