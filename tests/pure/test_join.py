"""Backwards that a schedule need not split are whole, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallax.config_io import load
from parallax.pipeline import join as joining
from parallax.pipeline.join import join
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Op
from parallax.pipeline.schedules import SCHEDULES, make_schedule, split_backward
from parallax.pipeline.search import weighted_peak
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.table import to_text
from parallax.pipeline.validate import Wire, validate
from parallax.stage_plan import plan_stages
from tests.pure.test_schedules import SIZES


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_table_gets_longer_or_holds_more(name: str):
    for p, m in SIZES:
        table = make_schedule(name, p, m)
        cost = Cost([1.0 + 0.1 * s for s in range(table.num_stages)], 1.2, 0.9)
        joined = join(table, cost)
        validate(lower(joined), wire=Wire.ORDERED)  # gradients in microbatch order, each once, and it ends
        for share in (1.0, 0.65):
            at = Cost(cost.forward, cost.input_grad, 0.9 * share)
            assert simulate(joined, at).makespan <= simulate(table, at).makespan + 1e-9
        ones = [1.0] * table.num_stages
        assert weighted_peak(joined, ones) <= weighted_peak(table, ones)
        assert joined.splits <= table.splits
        if not table.splits:
            assert joined == table


def test_zb_h2_splits_what_its_end_needs():
    """The first rank's W follows its I, and its I is sent to nobody; of the last rank's three remain, since at equal
    times W of the last two fill its end, and where W takes less, those of the last three."""
    joined = join(make_schedule("zb-h2", 2, 8), Cost())
    assert joined.splits == {(1, 5), (1, 6), (1, 7)}
    assert " ".join(map(str, joined.programs[0])) == ("0F0 0F1 0F2 0B0 0F3 0B1 0F4 0B2 0F5 0B3 0F6 0B4 0F7 0B5 0B6 0B7")
    assert simulate(joined, Cost()).makespan == 25 and simulate(make_schedule("1f1b", 2, 8), Cost()).makespan == 27


def test_one_rank_splits_nothing():
    table = split_backward(make_schedule("1f1b", 1, 5), "split", [2])
    assert not join(table, Cost()).splits
    assert join(table, Cost()).programs == make_schedule("1f1b", 1, 5).programs


def test_large_tables_are_searched_as_a_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch):
    table, numbers = make_schedule("zb-h2", 4, 16), []
    for most in (400_000, 20 * 4 * 48, 1000):
        monkeypatch.setattr(joining, "PLAYED_AT_MOST", most)
        joined = join(table, Cost())
        numbers.append([sum(a.op == Op.I for a in program) for program in joined.programs])
    assert numbers == [[0, 6, 6, 7], [7, 7, 7, 7], [16, 16, 16, 16]]


def test_a_run_has_the_joined_table_and_says_so_but_a_user_s_own_stays(tmp_path: Path):
    keys = ["mesh=1x1x2", "batch.microbatch_size=2", "batch.global_size=16", "pipeline.schedule=zb-h2"]
    plan = plan_stages(load(keys))
    assert len(plan.schedule.splits) == 3 and "zb-h2, 3 of 16 backwards in two" in plan.describe()
    path = tmp_path / "mine.csv"
    path.write_text(to_text(make_schedule("zb-h2", 2, 8)))
    own = plan_stages(load([*keys[:-1], f"pipeline.schedule={path}"]))
    assert len(own.schedule.splits) == 16
    assert "backwards in two" not in plan_stages(load(keys[:-1])).describe()
