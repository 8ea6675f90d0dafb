"""Schedules as files: torch's text form, there and back; what is wrong is named by row and column."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.errors import ScheduleError
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import COMPUTE, Action, Op, Schedule
from parallax.pipeline.schedules import SCHEDULES
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.table import from_text, get_schedule, read_table, to_text
from parallax.pipeline.validate import Wire, validate


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("messages", [False, True])
def test_every_schedule_comes_back_from_its_file(tmp_path: Path, name: str, messages: bool):
    table = SCHEDULES[name](3, 7)
    written = lower(table) if messages else table
    file = tmp_path / f"{name}.csv"
    file.write_text(to_text(written))
    assert read_table(file) == written
    assert get_schedule(str(file), 3, 7) == written
    assert lower(read_table(file)) == lower(table)


def test_messages_without_stage_actions_are_kept_and_completed():
    """As torch writes them: sends and receives, nothing else."""
    lowered = lower(SCHEDULES["1f1b"](2, 3))
    plain = tuple(tuple(a for a in p if a.microbatch is not None) for p in lowered.programs)
    read = from_text(to_text(Schedule("x", 3, (0, 1), plain)), "x.csv")
    assert read.programs == plain and lower(read).programs == lowered.programs


def test_blank_cells_and_lines_are_idle_time():
    assert from_text("0F0,,0B0,\n\n , 1F0 ,1B0\n", "t.csv").programs == from_text("0F0,0B0\n1F0,1B0", "t").programs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv has no action"),
        ("0F0,0X0", r"t.csv, row 0, column 1: '0X0' is no action"),
        ("0F0,0B0\n0F1,0B1", r"row 1, column 0: 0F1 is of stage 0, which row 0 has too"),
        ("0F0,0B0\n2F0,2B0", "no row with stage 1; stages are 0 to 2"),
        ("0F0\n1F0,1B0", r"t.csv: stage 0 \(rank 0\) has F for microbatch 0"),
        ("0F0,0F0,0B0\n1F0,1B0", r"row 0, column 1 \(0F0\) is there twice, first at row 0, column 0"),
        ("0B0,0F0\n1F0,1B0", r"row 0, column 0 \(0B0\) waits for 0F0"),
        ("0F0,0F1,0B1,0B0\n1F0,1F1,1B0,1B1", "stage 0 accumulates gradients in the order"),
        ("0F0,0B0,999999999F0", "no row with stage 1; stages are 0 to 999999999"),
        ("0F0,0B0,9999999999F0", "'9999999999F0' is no action"),
        ("0UNSHARD,0F0,0F1,0B0,0B1,0RESHARD", r"stage 0 \(rank 0\) has no REDUCE_GRAD after its last gradient"),
        ("0F0,0UNSHARD,0B0,0REDUCE_GRAD,0RESHARD", "used in column 0 before its UNSHARD"),
        ("0UNSHARD,0F0,0RESHARD,0B0,0REDUCE_GRAD", "no RESHARD after its last use in column 3"),
        ("0F0,0B0,0RECV_B0\n1F0,1B0", "0RECV_B0.* has no 1SEND_B0 to meet it"),
        ("0F0,0SEND_F0,0RECV_B0,0B0\n1RECV_F0,1F0,1B0", "0RECV_B0.* has no 1SEND_B0 to meet it"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(text: str, message: str):
    with pytest.raises(ScheduleError, match=message):
        from_text(text, "t.csv")


def test_a_file_for_another_run_is_refused(tmp_path: Path):
    file = tmp_path / "t.csv"
    file.write_text(to_text(SCHEDULES["zb-v"](2, 4)))
    for arguments, message in [
        ((3, 4), "a table of 2 ranks, the run has 3"),
        ((2, 5), "a table of 4 microbatches, the run has 5"),
        ((2, 4, 1), "a table of 2 stages a rank, the run has 1"),
    ]:
        with pytest.raises(ScheduleError, match=message):
            get_schedule(str(file), *arguments)
    with pytest.raises(ScheduleError, match="^nothing.csv cannot be read: No such file or directory$"):
        get_schedule("nothing.csv", 2, 2)
    file.write_bytes(b"0F0,\xff")
    with pytest.raises(ScheduleError, match="t.csv is not UTF-8 text: invalid start byte at byte 4"):
        get_schedule(str(file), 2, 2)


@st.composite
def random_tables(draw: st.DrawFn) -> Schedule:
    """A complete table in a random placement and order: often impossible, sometimes good."""
    ranks, extra = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    microbatches = draw(st.integers(1, 4))
    places = [*range(ranks), *(draw(st.integers(0, ranks - 1)) for _ in range(extra))]
    places = draw(st.permutations(places))
    random = draw(st.randoms(use_true_random=False))
    depth = draw(st.integers(0, 3))
    programs = []
    for rank in range(ranks):
        mine = [s for s, place in enumerate(places) if place == rank]
        actions = [Action(s, Op.F, i) for i in range(microbatches) for s in mine]
        for i in range(microbatches):
            for s in reversed(mine):
                split = random.random() < 0.3
                actions += [Action(s, Op.I, i), Action(s, Op.W, i)] if split else [Action(s, Op.B, i)]
        for _ in range(depth):  # neighbours change places
            k = random.randrange(len(actions) - 1)
            actions[k], actions[k + 1] = actions[k + 1], actions[k]
        programs.append(tuple(actions))
    return Schedule("random", microbatches, tuple(places), tuple(programs))


@given(random_tables())
@settings(max_examples=200)
def test_a_random_table_runs_on_every_wire_or_is_refused(table: Schedule):
    try:
        validate(table)
    except ScheduleError as error:
        assert "rank" in str(error) or "stage" in str(error)
        return
    lowered = lower(table)
    for wire in Wire:
        validate(lowered, wire=wire)
    assert tuple(tuple(a for a in p if a.op in COMPUTE) for p in lowered.programs) == table.programs
    assert simulate(lowered, Cost()).makespan == simulate(table, Cost()).makespan
