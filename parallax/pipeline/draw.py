"""Pictures of a played schedule: text for the terminal, SVG, and a trace for Perfetto. Imports no torch.

They are drawn from a Timeline, the same whether it was simulated or measured.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.simulate import Span, Timeline

__all__ = ["legend_line", "summary", "text_grid", "to_svg", "to_trace"]

NAMES = {Op.F: "forward", Op.B: "backward", Op.I: "input gradient", Op.W: "weight gradient"}
# By op, a shade for each of a rank's stages in turn. Chosen to differ in lightness too, for eyes that see hues alike.
SHADES = {
    Op.F: ("#3b6fb5", "#7ba6dd", "#25487a", "#a9c7ec"),
    Op.B: ("#2f8f5b", "#74c297", "#1f5f3d", "#a8dcbf"),
    Op.I: ("#1f9a9a", "#6cc7c7", "#136464", "#a3e0e0"),
    Op.W: ("#d9902f", "#efbf7d", "#96601a", "#f6dab2"),
}
ANSI = {Op.F: 44, Op.B: 42, Op.I: 46, Op.W: 43}


def summary(schedule: Schedule, timeline: Timeline) -> str:
    """In one line: how long, how much of it idle, how many activations held."""
    held = ", ".join(map(str, timeline.in_flight))
    return f"{schedule.name}: {_facts(schedule, timeline)}; activations held at most: {held}"


def _facts(schedule: Schedule, timeline: Timeline, unit: str = "") -> str:
    """Sizes, makespan and idle time. unit: of time, as in ms; of what is only drawn, times have none."""
    stages = _most_stages(schedule)
    of = "" if stages == 1 else f" of {stages} stages a rank"
    took = f"{timeline.makespan:.1f} {unit}" if unit else f"{timeline.makespan:.6g}"
    return (
        f"{_counted(schedule.num_ranks, 'rank')}, {_counted(schedule.num_microbatches, 'microbatch')}{of}; makespan "
        f"{took}; bubble {timeline.bubble:.1%} (idle share of the makespan, mean over ranks); between its own first "
        f"and last action the worst rank idles {timeline.inner_bubble:.1%}"
    )


def _counted(number: int, what: str) -> str:
    plural = "es" if what.endswith("ch") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


def _most_stages(schedule: Schedule) -> int:
    """Stages of the rank that has the most: those of a table from a file may be dealt out unevenly."""
    return max(len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks))


def _chunk(schedule: Schedule, action: Action) -> int:
    """Which of its rank's stages an action is of: 0, 1, ..."""
    return schedule.stages_of(schedule.stage_to_rank[action.stage]).index(action.stage)


def _label(schedule: Schedule, action: Action) -> str:
    """F3; f3 on the second of two stages a rank; 5F3 where there are more."""
    if _most_stages(schedule) > 2:
        return str(action)
    letter = action.op.value.lower() if _chunk(schedule, action) else action.op.value
    return f"{letter}{action.microbatch}"


def text_grid(
    schedule: Schedule, timeline: Timeline, *, columns_per_unit: int | None = None, color: bool = False
) -> str:
    """A row a rank; each action as wide as it is long, from its label on; dots are idle time.

    columns_per_unit: characters a unit of time; as many as the longest label in the shortest action needs unless told.
    """
    labels = [_label(schedule, span.action) for span in timeline.spans]
    shortest = min(span.end - span.start for span in timeline.spans if span.end > span.start)
    unit = columns_per_unit or max(1, -(-(max(map(len, labels)) + 1) // shortest))
    rows = []
    for rank in range(schedule.num_ranks):
        cells: list[str] = []
        at = 0
        for span, label in zip(timeline.spans, labels, strict=True):
            if span.rank != rank:
                continue
            start, end = round(span.start * unit), round(span.end * unit)
            cells.append("." * (start - at))
            text = label[: end - start - 1].ljust(end - start - 1)
            cells.append(f"\033[30;{ANSI[span.action.op]}m{text}\033[0m " if color else f"{text} ")
            at = end
        cells.append("." * (round(timeline.makespan * unit) - at))
        rows.append(f"rank {rank:>{len(str(schedule.num_ranks - 1))}} |{''.join(cells)}|")
    return "\n".join(rows)


def to_trace(schedule: Schedule, timeline: Timeline, *, title: str | None = None, unit_s: float = 1e-3) -> str:
    """Chrome's trace format, for ui.perfetto.dev: a process, named by the title (the schedule's name unless told), a
    thread a rank. unit_s: seconds a unit of time."""
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": title or schedule.name}},
    ]
    for rank in range(schedule.num_ranks):
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}})
    events += [
        {
            "ph": "X",
            "pid": 0,
            "tid": span.rank,
            "name": str(span.action),
            "cat": NAMES[span.action.op],
            "ts": span.start * unit_s * 1e6,
            "dur": (span.end - span.start) * unit_s * 1e6,
            "args": {"stage": span.action.stage, "microbatch": span.action.microbatch},
        }
        for span in timeline.spans
    ]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


ROW, GAP, MARGIN = 30, 8, 20
TITLE, FACTS, RANK, NOTE = 18, 13, 14, 12
LEAST_WIDTH = 640


def to_svg(schedule: Schedule, timelines: Mapping[str, Timeline], *, unit: str = "") -> str:
    """A picture of timelines of one schedule, each under its title, one above the other on one time scale.

    A row a rank: microbatch numbers in the cells, idle time hatched, what a rank holds on the right. unit: of time, for
    the words, as in ms.
    """
    page = _layout(schedule, timelines, unit)
    body: list[str] = []
    y = 0.0
    for title, timeline in timelines.items():
        heading, y = _heading(page, title, timeline, y)
        panel, y = _panel(page, timeline, y)
        body += [*heading, *panel]
    legend, y = _legend(page, y + 6)
    size = f'width="{page.width:.0f}" height="{y + MARGIN:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {page.width:.0f} {y + MARGIN:.0f}" '
            'font-family="Helvetica, Arial, sans-serif">',
            '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f4f4f4"/><line x1="0" y1="0" x2="0" '
            'y2="6" stroke="#cfcfcf" stroke-width="2"/></pattern></defs>',
            f'<rect {size} fill="white"/>',
            *body,
            *legend,
            "</svg>\n",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the rows begin and how wide the picture is, a unit of time (scale), and the cells' numbers, all in pixels.

    The numbers have one size, so that none looks more important.
    """

    schedule: Schedule
    unit: str
    left: float
    width: float
    scale: float
    number_size: float


def _layout(schedule: Schedule, timelines: Mapping[str, Timeline], unit: str) -> _Layout:
    spans = [span for timeline in timelines.values() for span in timeline.spans]
    lengths = sorted(span.end - span.start for span in spans if span.end > span.start) or [1.0]
    # The shortest cells shall have room for their number. Of measured times a few may be next to nothing: for those
    # alone the picture does not grow, and they go without.
    shortest = max(lengths[len(lengths) // 20], lengths[len(lengths) // 2] / 2)
    makespan = max([timeline.makespan for timeline in timelines.values()])
    scale = max(17.0 / shortest, min(36.0 / shortest, 1400 / max(makespan, 1e-9)))
    longest = max((len(str(span.action.microbatch)) for span in spans), default=1)
    size = min(13.0, (shortest * scale - 3) / (0.58 * longest))
    left = MARGIN + _text_width(f"rank {schedule.num_ranks - 1}", RANK) + 10
    rows = max(
        timeline.makespan * scale + 8 + _text_width(note, NOTE)
        for timeline in timelines.values()
        for note in _notes(timeline)
    )
    titles = max(_text_width(title, TITLE, bold=True) for title in timelines)
    return _Layout(schedule, unit, left, max(LEAST_WIDTH, left + max(rows, titles) + MARGIN), scale, size)


def _text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Of what shows a text: not less than a wide sans-serif font takes, since the reader's may be any."""

    def ems(letter: str) -> float:
        if letter in "mwMW%@" or letter > "\u1100":
            return 1.0
        if letter in " .,;:'|()ijlft-":
            return 0.42
        return 0.64 if letter.islower() or letter.isdigit() else 0.86

    return sum(map(ems, text)) * size * (1.12 if bold else 1.0)


def _heading(page: _Layout, title: str, timeline: Timeline, y: float) -> tuple[list[str], float]:
    """The title and its facts, in as many lines as they take; where what comes below begins."""
    x, y = f"{page.left:.0f}", y + 32
    out = [f'<text x="{x}" y="{y:.0f}" font-size="{TITLE}" font-weight="bold">{escape(title)}</text>']
    lines = [""]
    for word in _facts(page.schedule, timeline, page.unit).split():
        longer = f"{lines[-1]} {word}".strip()
        if _text_width(longer, FACTS) > page.width - page.left - MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    for line in lines:
        y += 20
        out.append(f'<text x="{x}" y="{y:.0f}" font-size="{FACTS}" fill="#444">{escape(line)}</text>')
    return out, y + 14


def _notes(timeline: Timeline) -> list[str]:
    """By rank, what stands to the right of its row."""
    return [
        f"idle {1 - busy / timeline.makespan:.0%}, holds {held}"
        for busy, held in zip(timeline.busy, timeline.in_flight, strict=True)
    ]


def _panel(page: _Layout, timeline: Timeline, top: float) -> tuple[list[str], float]:
    """The rows of one timeline; where what comes below begins."""
    out: list[str] = []
    wide = timeline.makespan * page.scale
    for rank, note in enumerate(_notes(timeline)):
        y = top + rank * (ROW + GAP)
        out += [
            f'<text x="{page.left - 10:.0f}" y="{y + ROW / 2 + 5}" font-size="{RANK}" text-anchor="end">'
            f"rank {rank}</text>",
            f'<rect x="{page.left:.2f}" y="{y}" width="{wide:.2f}" height="{ROW}" fill="url(#idle)"/>',
            f'<text x="{page.left + wide + 8:.1f}" y="{y + ROW / 2 + 4}" font-size="{NOTE}" fill="#444">{note}</text>',
        ]
    out += [_cell(page, span, top) for span in timeline.spans]
    return out, top + page.schedule.num_ranks * (ROW + GAP)


def _cell(page: _Layout, span: Span, top: float) -> str:
    action, size = span.action, page.number_size
    shade = _chunk(page.schedule, action) % 4
    unit = f" {page.unit}" if page.unit else ""
    x, y = page.left + span.start * page.scale, top + span.rank * (ROW + GAP)
    wide = (span.end - span.start) * page.scale
    cell = (
        f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW}" fill="{SHADES[action.op][shade]}" '
        f'stroke="white" stroke-width="1"><title>{action}: {span.start:.6g} to {span.end:.6g}{unit}</title></rect>'
    )
    number = str(action.microbatch)
    if wide < 0.58 * size * len(number):
        return cell
    return cell + (
        f'<text x="{x + wide / 2:.2f}" y="{y + ROW / 2 + size * 0.36:.2f}" font-size="{size:.1f}" '
        f'text-anchor="middle" fill="{"white" if shade in (0, 2) else "#111"}">{number}</text>'
    )


def _legend(page: _Layout, y: float) -> tuple[list[str], float]:
    """What the colours mean, in columns, as many as there is room for; where the last line ends."""
    stages = _most_stages(page.schedule)
    shown = {(a.op, _chunk(page.schedule, a) % 4) for _, _, a in page.schedule.actions() if a.op in NAMES}
    entries = []
    for op, shade in itertools.product(NAMES, range(4)):
        if (op, shade) in shown:
            mine = range(shade + 1, stages + 1, 4)
            which = f", stage{'s' if len(mine) > 1 else ''} {', '.join(map(str, mine))} of {stages}"
            entries.append((SHADES[op][shade], NAMES[op] + ("" if stages == 1 else which)))
    entries.append(("url(#idle)", "idle"))
    column = 36 + max(_text_width(name, NOTE) for _, name in entries)
    num_columns = max(1, int((page.width - page.left - MARGIN + 14) / column))
    out: list[str] = []
    for number, (fill, name) in enumerate(entries):
        x, top = page.left + number % num_columns * column, y + number // num_columns * 20
        out.append(f'<rect x="{x:.0f}" y="{top}" width="16" height="14" fill="{fill}" stroke="#bbb"/>')
        out.append(f'<text x="{x + 22:.0f}" y="{top + 12}" font-size="{NOTE}" fill="#222">{name}</text>')
    return out, y + (len(entries) - 1) // num_columns * 20 + 14


def legend_line(schedule: Schedule, ops: Sequence[Op] = (Op.F, Op.B, Op.I, Op.W)) -> str:
    """What the letters of the text grid mean."""
    shown = ", ".join(f"{op.value} {NAMES[op]}" for op in ops if op in schedule.ops)
    stages = _most_stages(schedule)
    if stages == 2:
        shown += "; lower case: the rank's second stage"
    elif stages > 2:
        shown += "; the number before the letter is the stage"
    return f"{shown}; the number after it is the microbatch; dots are idle time"
