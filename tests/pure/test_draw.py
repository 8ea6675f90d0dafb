"""Pictures of schedules: text, SVG and traces say what the timeline says."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from parallax.cli import main
from parallax.pipeline.draw import text_grid, to_svg, to_trace
from parallax.pipeline.schedules import SCHEDULES, make_schedule
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.table import read_table

SVG = "{http://www.w3.org/2000/svg}"


def test_the_grid_of_1f1b_is_the_one_of_the_paper():
    schedule = make_schedule("1f1b", 3, 3)
    assert text_grid(schedule, simulate(schedule, Cost())).splitlines() == [
        "rank 0 |F0 F1 F2 ............B0    ...B1    ...B2    |",
        "rank 1 |...F0 F1 ......B0    F2 B1    ...B2    ......|",
        "rank 2 |......F0 B0    F1 B1    F2 B2    ............|",
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_drawn_where_it_is(name: str):
    schedule = make_schedule(name, 4, 12)
    timeline = simulate(schedule, Cost(1.0, 1.5, 0.5))
    root = ElementTree.fromstring(to_svg(schedule, timeline))
    cells = {t.text: r for r in root.iter(f"{SVG}rect") if (t := r.find(f"{SVG}title")) is not None}
    assert len(cells) == len(timeline.spans)
    width = float(root.attrib["width"])
    scale = {
        float(cells[f"{s.action}: {s.start:.6g} to {s.end:.6g}"].attrib["width"]) / (s.end - s.start)
        for s in timeline.spans
    }
    assert max(scale) - min(scale) < 0.1, "widths are durations"
    assert all(float(r.attrib["x"]) + float(r.attrib["width"]) <= width for r in cells.values())
    sizes = {t.attrib["font-size"] for t in root.iter(f"{SVG}text") if t.attrib.get("text-anchor") == "middle"}
    assert len(sizes) == 1 and float(sizes.pop()) >= 7, "numbers can be read"
    assert "idle" in "".join(t.text or "" for t in root.iter(f"{SVG}text"))
    events = [e for e in json.loads(to_trace(schedule, timeline))["traceEvents"] if e["ph"] == "X"]
    assert len(events) == len(timeline.spans)
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(timeline.makespan * 1000)
    rows = text_grid(schedule, timeline).splitlines()
    assert len({len(row) for row in rows}) == 1 and len(rows) == 4


def test_show_list_and_export(tmp_path: Path, capsys):
    assert main(["schedule", "list", "pipeline=4", "num_microbatches=16"]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", text, re.MULTILINE) for name in SCHEDULES)
    svg, trace, table = (str(tmp_path / name) for name in ("a.svg", "a.json", "a.csv"))
    assert main(["schedule", "show", "zb-v", "pipeline=2", "num_microbatches=4", "--svg", svg, f"--trace={trace}"]) == 0
    out = capsys.readouterr().out
    assert "makespan 25" in out and "rank 1 |" in out and "\033" not in out, "no colour in a file"
    assert Path(svg).read_text().startswith("<svg") and json.loads(Path(trace).read_text())
    for extra in ([], ["--messages"]):
        assert main(["schedule", "export", "zb-v", table, "pipeline=2", "num_microbatches=4", *extra]) == 0
        assert read_table(Path(table)).lowered == bool(extra)
    assert main(["schedule", "show", table, "pipeline=2", "num_microbatches=4"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo", "1f1b"], "usage: parallax schedule"),
        (["show", "1f2b"], "did you mean 1f1b"),
        (["show", "1f1b", "piepline=3"], "'piepline=3' is not understood"),
        (["show", "1f1b", "pipeline=x"], "pipeline=x: expected an integer"),
        (["show", "1f1b", "pipeline=0"], "pipeline=0 is out of range"),
        (["show", "1f1b", "--svg"], "--svg needs a file"),
        (["show", "1f1b", "--svg", "/nowhere/x.svg"], "/nowhere/x.svg cannot be written"),
        (["export", "1f1b", "table.txt"], "a table's name ends in .csv"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments: list[str], message: str):
    assert main(["schedule", *arguments]) == 2
    assert message in capsys.readouterr().err
