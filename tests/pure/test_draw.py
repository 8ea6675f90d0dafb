"""Pictures of schedules: text, SVG and traces say what the timeline says."""

from __future__ import annotations

import json
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from parallax.cli import main
from parallax.pipeline.draw import summary, text_grid, to_svg, to_trace
from parallax.pipeline.schedule import Op, Schedule
from parallax.pipeline.schedules import SCHEDULES, make_schedule
from parallax.pipeline.simulate import Cost, Timeline, played, simulate
from parallax.pipeline.table import from_text, read_table
from tests.pictures import SVG, faults, texts


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
    root = ElementTree.fromstring(to_svg(schedule, {name: timeline}))
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


SIZES = [(1, 1, None), (2, 2, None), (4, 8, None), (4, 12, Cost(1.0, 1.5, 0.5)), (3, 101, None), (12, 4, None)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_of_a_picture_lies_inside_it(name: str):
    for ranks, microbatches, cost in SIZES:
        schedule = make_schedule(name, ranks, microbatches)
        picture = ElementTree.fromstring(to_svg(schedule, {name: simulate(schedule, cost or Cost())}))
        assert faults(picture) == [], (ranks, microbatches)
        legend = {text for text, _, _ in texts(picture) if re.match("forward|backward|input|weight|idle$", text)}
        assert len(legend) == len({(a.op, a.stage // ranks) for _, _, a in schedule.actions()}) + 1


@pytest.mark.parametrize("stages", [3, 4, 6, 16])
def test_a_shade_of_many_stages_names_them_all(stages: int):
    schedule = make_schedule("interleaved", 2, 4, stages)
    picture = ElementTree.fromstring(to_svg(schedule, {"interleaved": simulate(schedule, Cost())}))
    assert faults(picture) == []
    named = [text for text, _, _ in texts(picture) if text.startswith("forward, stage")]
    numbers = [int(n) for text in named for n in re.findall(r"\d+", text.partition(" of ")[0])]
    assert sorted(numbers) == list(range(1, stages + 1))


def jittered(schedule: Schedule, seed: int) -> Timeline:
    """As measured: milliseconds, no two alike, some next to nothing."""
    draw = random.Random(seed)
    cost = Cost(*([draw.uniform(0.02, 9.0) for _ in range(schedule.num_stages)] for _ in range(3)), send_s=1.234)
    spans = simulate(schedule, cost).spans
    return played(schedule, [replace(s, end=s.start + (s.end - s.start) * draw.uniform(0.001, 1)) for s in spans])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_measured_step_is_drawn_above_the_predicted_one_on_one_scale(name: str):
    for ranks, microbatches, seed in ((1, 1, 0), (2, 4, 1), (4, 9, 2)):
        schedule = make_schedule(name, ranks, microbatches)
        measured, predicted = jittered(schedule, seed), simulate(schedule, Cost(2.0, 1.0, 1.0))
        titles = {f"{name}, step 3, measured": measured, f"{name}, step 3, predicted": predicted}
        picture = ElementTree.fromstring(to_svg(schedule, titles, unit="ms"))
        assert faults(picture) == []
        bold = [(text, box) for text, box, is_bold in texts(picture) if is_bold]
        assert [text for text, _ in bold] == list(titles) and bold[0][1][3] < bold[1][1][1], "one above the other"
        words = " ".join(text for text, _, _ in texts(picture))
        assert all(f"makespan {timeline.makespan:.1f} ms; " in words for timeline in titles.values())
        rows = [r for r in picture.findall(f"{SVG}rect") if r.get("fill") == "url(#idle)" and r.get("x") and r[:] == []]
        wide = [float(r.attrib["width"]) for r in rows[: 2 * ranks]]
        scale = [w / t.makespan for w, t in zip((wide[0], wide[-1]), (measured, predicted), strict=True)]
        assert scale[0] == pytest.approx(scale[1], rel=1e-3)
        hovers = [t.text or "" for t in picture.iter(f"{SVG}title")]
        assert all(re.search(r"\d ms$", text) for text in hovers)


def test_a_few_times_next_to_nothing_do_not_stretch_a_picture():
    schedule = make_schedule("1f1b", 2, 4)
    spans = simulate(schedule, Cost()).spans
    short = [replace(s, end=s.start + (1e-4 if s.action.stage == 0 and s.action.op == Op.F else 1)) for s in spans]
    picture = ElementTree.fromstring(to_svg(schedule, {"x": played(schedule, short)}))
    assert float(picture.attrib["width"]) < 2000 and faults(picture) == []
    numbers = [text for text, _, _ in texts(picture) if text.isdecimal()]
    assert len(numbers) == len(spans) - 4, "a cell without room for its number has none"


def test_a_long_title_is_not_cut_off():
    schedule = replace(make_schedule("1f1b", 2, 2), name="A-TABLE-WITH-A-LONG-NAME+" * 4)
    assert faults(ElementTree.fromstring(to_svg(schedule, {schedule.name: simulate(schedule, Cost())}))) == []


def test_a_table_with_uneven_stages_has_its_shades_in_the_legend():
    schedule = from_text("0F0,2F0,2B0,0B0\n1F0,1B0\n", "uneven.csv")
    words = [text for text, _, _ in texts(ElementTree.fromstring(to_svg(schedule, {"x": simulate(schedule, Cost())})))]
    assert "forward, stage 1 of 2" in words and "forward, stage 2 of 2" in words
    assert text_grid(schedule, simulate(schedule, Cost())).startswith("rank 0 |F0 ...f0 b0")


def test_the_two_kinds_of_idle_time_are_told_apart_in_words(capsys):
    schedule = make_schedule("zb-v", 4, 8)
    timeline = simulate(schedule, Cost(1.0, 1.5, 0.5))
    text = summary(schedule, timeline)
    assert f"bubble {timeline.bubble:.1%} (idle share of the makespan, mean over ranks); between its own first" in text
    assert f"first and last action the worst rank idles {timeline.inner_bubble:.1%};" in text
    assert main(["schedule", "list"]) == 0
    footer = capsys.readouterr().out.splitlines()[-3:]
    assert footer[0] == "bubble: idle share of the makespan, mean over ranks"
    assert "between its own first and last action of the rank where that is largest" in footer[1]


def test_a_list_takes_stages_and_times(capsys):
    assert main(["schedule", "list", "stages_per_rank=4", "forward=2"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert "stages_per_rank=4 where a schedule leaves it open" in head and "but for forward=2" in head
    stages = {row.split()[0]: row.split()[1] for row in rows[1:-3]}
    assert stages["interleaved"] == "4" and stages["1f1b"] == "1" and stages["zb-v"] == "2"


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
        (
            ["shwo", "1f1b"],
            "there is no command 'shwo' of parallax schedule; did you mean show? usage: parallax schedule",
        ),
        (["zb-v"], "there is no command 'zb-v' of parallax schedule; did you mean show zb-v? usage"),
        (["show"], "schedule show takes NAME, and was given nothing; usage"),
        (["export", "zb-v"], "schedule export takes NAME FILE.csv, and was given zb-v; usage"),
        (["list", "zb-v"], "schedule list takes no name, and was given zb-v; usage"),
        (["show", "1f2b"], "there is no schedule '1f2b'; did you mean 1f1b? choose one of gpipe, "),
        (["show", "ZB_H1"], "did you mean zb-h1? "),
        (["show", "auto"], "pipeline.schedule=auto has no table until a run has costs to search with"),
        (["export", "auto", "a.csv"], "`parallax check mesh=1x1x4 pipeline.schedule=auto [key=value ...]`"),
        (["show", "nope.csv"], "error: nope.csv cannot be read: No such file or directory\n"),
        (["show", "1f1b", "pipelin=3"], "'pipelin=3' is not understood; did you mean pipeline? "),
        (["show", "1f1b", "--pipeline=3"], "'--pipeline=3' is not understood; did you mean pipeline? "),
        (["show", "1f1b", "pipeline=x"], "pipeline=x: expected an integer"),
        (["show", "1f1b", "pipeline=0"], "pipeline=0 is out of range; choose at least 1 and less than 1,000,000,000"),
        (["show", "1f1b", "forward=0"], "forward=0 is out of range; choose more than 0 and less than"),
        (["show", "1f1b", "send=nan"], "send=nan is out of range; choose at least 0 and less than"),
        (["show", "1f1b", "--svg"], "--svg needs a file, as in --svg schedule.svg"),
        (["show", "1f1b", "--trace", "--svg", "a.svg"], "--trace needs a file, as in --trace schedule.json"),
        (["show", "1f1b", "--svg", "a", "--svg=b"], "--svg is given twice: --svg a and --svg=b; keep one"),
        (["list", "pipeline=2", "pipeline=3"], "pipeline is given twice: pipeline=2 and pipeline=3; keep one"),
        (["list", "--svg", "a.svg"], "--svg a.svg is for schedule show, not list; leave it out"),
        (["--trace=a.json"], "--trace=a.json is for schedule show, not list; leave it out"),
        (["list", "--messages"], "--messages is for schedule export, not list; leave it out"),
        (["show", "1f1b", "--messages"], "--messages is for schedule export, not show; leave it out"),
        (["export", "1f1b", "a.csv", "forward=2"], "forward=2 is for schedule list and show, not export; leave it out"),
        (["export", "1f1b", "a.csv", "--messages=1"], "'--messages=1' is not understood"),
        (["show", "1f1b", "--svg", "/nowhere/x.svg"], "/nowhere/x.svg cannot be written"),
        (["export", "1f1b", "table.txt"], "a table's name ends in .csv"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments: list[str], message: str):
    assert main(["schedule", *arguments]) == 2
    assert message in capsys.readouterr().err
