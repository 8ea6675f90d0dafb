"""A traced step: recorded on every rank, drawn, and the same numbers as an untraced one."""

from __future__ import annotations

import json
import re
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from parallax.pipeline.schedule import COMPUTE
from parallax.pipeline.schedules import SCHEDULES, make_schedule
from parallax.pipeline.simulate import Cost, simulate
from parallax.stage_plan import plan_stages
from parallax.trace import clock_offset, compare, sentence, traced
from tests.cases import LLAMA, advance, make_config, start
from tests.pictures import faults, texts

CHANGES = LLAMA | {"model.layers": 4, "batch.num_microbatches": 4}


def train_traced(output: str, schedule: str, trace: int | None) -> Any:
    run, state = start("2x1x2", **CHANGES | {"pipeline.schedule": schedule, "trace": trace})
    rows, told = [], []
    for step in (1, 2, 3):
        with traced(run, Path(output), step=step) as said:
            rows += advance(run, state, 1)
        told += said
    assert run.pipeline.recorder is None
    return rows, told, clock_offset(run.mesh)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-v"])
def test_tracing_draws_one_step_and_changes_no_number(ranks, tmp_path: Path, schedule: str):
    plain = ranks(4, train_traced, str(tmp_path / "no"), schedule, None)
    every = ranks(4, train_traced, str(tmp_path), schedule, 2)
    assert [found[0] for found in every] == [found[0] for found in plain]
    assert not (tmp_path / "no").exists() and not any(found[1] for found in plain)
    assert [len(found[1]) for found in every] == [2, 0, 0, 0], "one rank speaks, of one step"
    assert every[0][1][0].startswith(f"pipeline of {schedule}: ") and "slowest is stage" in every[0][1][0]
    names = sorted(path.name for path in (tmp_path / "trace").iterdir())
    assert names == ["step-2.json", "step-2.svg"]
    assert all(str(tmp_path / "trace" / name) in every[0][1][1] for name in names), "the log names what is drawn"
    picture = ElementTree.parse(tmp_path / "trace/step-2.svg").getroot()
    titles = [text for text, _, bold in texts(picture) if bold]
    assert titles == [f"{schedule}, step 2, measured", f"{schedule}, step 2, predicted"]
    facts = " ".join(text for text, _, _ in texts(picture))
    assert len(re.findall(r"makespan \d+\.\d ms; ", facts)) == 2 and faults(picture) == []
    events = json.loads((tmp_path / "trace/step-2.json").read_text())["traceEvents"]
    assert events[0]["args"]["name"] == titles[0]
    drawn = sorted(event["name"] for event in events if event["ph"] == "X")
    config = make_config("2x1x2", **CHANGES | {"pipeline.schedule": schedule})
    table = plan_stages(config).schedule
    assert drawn == sorted(str(action) for _, _, action in table.actions() if action.op in COMPUTE)
    # On one host all ranks read the same clock: what is left is how closely they leave a barrier.
    assert all(abs(found[2]) < 0.05 for found in every)


@pytest.mark.parametrize("whole", [None, 0.017])
@pytest.mark.parametrize("name", SCHEDULES)
def test_an_exact_recording_is_predicted_exactly(name: str, whole: float | None):
    """Spans taken from the simulation, on clocks that start anywhere; where a whole backward is quicker than its parts
    too."""
    table = make_schedule(name, 3, 8)
    timeline = simulate(table, Cost(0.010, 0.012, 0.008, whole=whole))
    begun = time.perf_counter()
    rows = [
        [(str(s.action), begun + s.start, begun + s.end) for s in timeline.spans if s.rank == rank] for rank in range(3)
    ]
    measured, predicted = compare(table, rows)
    assert measured.makespan == pytest.approx(timeline.makespan * 1e3, rel=1e-6)
    assert predicted.makespan == pytest.approx(measured.makespan, rel=1e-6)
    assert measured.bubble == pytest.approx(timeline.bubble, abs=1e-6)
    assert "0.0 ms (0.0%)" in sentence(table, measured, predicted)


def test_a_slow_stage_and_late_messages_are_named():
    table = make_schedule("1f1b", 2, 4)
    timeline = simulate(table, Cost([1.0, 2.0], [1.0, 2.0], [1.0, 2.0], send_s=0.5))
    rows = [[(str(s.action), s.start, s.end) for s in timeline.spans if s.rank == rank] for rank in range(2)]
    measured, predicted = compare(table, rows)
    text = sentence(table, measured, predicted)
    assert "slowest is stage 1 on pipeline rank 1, 33% above the mean" in text
    free = simulate(table, Cost([1.0, 2.0], [1.0, 2.0], [1.0, 2.0]))
    assert predicted.makespan == pytest.approx(free.makespan * 1e3) and measured.makespan > predicted.makespan
