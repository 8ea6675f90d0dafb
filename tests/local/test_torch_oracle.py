"""torch's own schedule validator, as an oracle for ours. Private API: in tests alone."""

from __future__ import annotations

import pytest

from parallax.pipeline.schedules import SCHEDULES
from parallax.pipeline.table import to_text
from tests.local.pipelines import split_1f1b, two_stages_a_rank

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
validate = getattr(schedules, "_validate_schedule", None)
TABLES = dict(SCHEDULES) | {
    "split": lambda p, m: split_1f1b(p, m, 1),
    "two stages a rank": two_stages_a_rank,
}


@pytest.mark.skipif(validate is None, reason="this torch has no validator")
@pytest.mark.parametrize("name", TABLES)
def test_torch_accepts_our_text_form(name: str):
    for p in range(1, 9):
        for m in (1, 2, 3, p, 2 * p + 1, 4 * p):
            table = TABLES[name](p, m)
            rows = {
                r: [schedules._Action.from_str(str(a)) for a in program] for r, program in enumerate(table.programs)
            }
            mapping = validate(rows, p, table.num_stages, m)
            assert mapping == dict(enumerate(table.stage_to_rank))
            for row, program in zip(rows.values(), table.programs, strict=True):
                assert [str(a) for a in row] == [str(a) for a in program]


@pytest.mark.skipif(not hasattr(schedules, "_simulate_comms_compute"), reason="this torch has no simulator")
@pytest.mark.parametrize("name", TABLES)
def test_torch_adds_its_messages_to_an_exported_table_and_plays_it(name: str):
    """Its simulator takes a RECV for a wait, so it places receives itself; ours are posted ahead."""
    for p, m in [(2, 1), (2, 5), (3, 7), (4, 8), (6, 6)]:
        table = TABLES[name](p, m)
        text = to_text(table).splitlines()
        rows = {r: [schedules._Action.from_str(cell) for cell in row.split(",")] for r, row in enumerate(text)}
        where = {"stage_to_rank": table.stage_to_rank.__getitem__, "num_stages": table.num_stages}
        played = schedules._simulate_comms_compute(schedules._add_send_recv(rows, **where), **where)
        assert len(played) == p


@pytest.mark.skipif(validate is None, reason="this torch has no validator")
def test_torch_refuses_a_lost_backward():
    table = SCHEDULES["1f1b"](2, 3)
    rows = {r: [schedules._Action.from_str(str(a)) for a in program] for r, program in enumerate(table.programs)}
    rows[1] = [action for action in rows[1] if str(action) != "1B1"]
    with pytest.raises(AssertionError):
        validate(rows, 2, 2, 3)
