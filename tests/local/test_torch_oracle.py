"""torch's own schedule validator, as an oracle for ours. Private API: in tests alone."""

from __future__ import annotations

import pytest

from parallax.pipeline.schedules import SCHEDULES
from tests.local.pipelines import split_backward, two_stages_a_rank

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
validate = getattr(schedules, "_validate_schedule", None)
TABLES = dict(SCHEDULES) | {
    "split": lambda p, m: split_backward(p, m, 1),
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


@pytest.mark.skipif(validate is None, reason="this torch has no validator")
def test_torch_refuses_a_lost_backward():
    table = SCHEDULES["1f1b"](2, 3)
    rows = {r: [schedules._Action.from_str(str(a)) for a in program] for r, program in enumerate(table.programs)}
    rows[1] = [action for action in rows[1] if str(action) != "1B1"]
    with pytest.raises(AssertionError):
        validate(rows, 2, 2, 3)
