"""Pictures of a played schedule: text for the terminal, SVG, and a trace for Perfetto. Imports no torch.

They are drawn from a Timeline, the same whether it was simulated or measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.simulate import Span, Timeline

__all__ = ["summary", "text_grid", "to_svg", "to_trace"]

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
    """One sentence: how long, how much of it idle, how many activations held."""
    stages = schedule.num_stages // schedule.num_ranks
    of = "" if stages == 1 else f" of {stages} stages a rank"
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches{of}; makespan "
        f"{timeline.makespan:.6g}, bubble {timeline.bubble:.1%} ({timeline.inner_bubble:.1%} between a rank's first "
        f"and last action); activations held at most: {', '.join(map(str, timeline.in_flight))}"
    )


def _chunk(schedule: Schedule, action: Action) -> int:
    """Which of its rank's stages an action is of: 0, 1, ..."""
    return schedule.stages_of(schedule.stage_to_rank[action.stage]).index(action.stage)


def _label(schedule: Schedule, action: Action) -> str:
    """F3; f3 on the second of two stages a rank; 5F3 where there are more."""
    stages = schedule.num_stages // schedule.num_ranks
    if stages > 2:
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


def to_trace(schedule: Schedule, timeline: Timeline, *, unit_s: float = 1e-3) -> str:
    """Chrome's trace format, for ui.perfetto.dev: a process, a thread a rank. unit_s: seconds a unit of time."""
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": schedule.name}},
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


ROW, GAP, LEFT, TOP, RIGHT = 30, 8, 74, 62, 120


def to_svg(schedule: Schedule, timeline: Timeline) -> str:
    """A picture: a row a rank, microbatch numbers in the cells, idle time hatched, what a rank holds on the right."""
    # A low quantile, not the minimum: measured times have outliers.
    lengths = sorted(span.end - span.start for span in timeline.spans if span.end > span.start) or [1.0]
    shortest = lengths[len(lengths) // 20]
    unit = max(17.0 / shortest, min(36.0 / shortest, 1400 / max(timeline.makespan, 1e-9)))
    longest = max((len(str(span.action.microbatch)) for span in timeline.spans), default=1)
    size = min(13.0, (shortest * unit - 3) / (0.58 * longest))
    width = LEFT + timeline.makespan * unit + RIGHT
    height = TOP + schedule.num_ranks * (ROW + GAP) + 62
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="Helvetica, Arial, sans-serif">',
        '<defs><pattern id="idle" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#f4f4f4"/><line x1="0" y1="0" x2="0" y2="6" stroke="#cfcfcf" '
        'stroke-width="2"/></pattern></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        *_heading(schedule, timeline),
    ]
    for rank in range(schedule.num_ranks):
        y = TOP + rank * (ROW + GAP)
        out.append(f'<text x="{LEFT - 10}" y="{y + ROW / 2 + 5}" font-size="14" text-anchor="end">rank {rank}</text>')
        out.append(
            f'<rect x="{LEFT}" y="{y}" width="{timeline.makespan * unit:.2f}" height="{ROW}" fill="url(#idle)"/>'
        )
        idle = 1 - timeline.busy[rank] / timeline.makespan
        out.append(
            f'<text x="{LEFT + timeline.makespan * unit + 8:.1f}" y="{y + ROW / 2 + 4}" font-size="12" fill="#444">'
            f"idle {idle:.0%}, holds {timeline.in_flight[rank]}</text>"
        )
    out += [_cell(schedule, span, unit, size) for span in timeline.spans]
    out += _legend(schedule, timeline, TOP + schedule.num_ranks * (ROW + GAP) + 14)
    return "\n".join([*out, "</svg>"]) + "\n"


def _heading(schedule: Schedule, timeline: Timeline) -> list[str]:
    title, _, rest = summary(schedule, timeline).partition(": ")
    facts = rest.partition("; activations")[0]
    return [
        f'<text x="{LEFT}" y="26" font-size="18" font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT}" y="47" font-size="13" fill="#444">{escape(facts)}</text>',
    ]


def _cell(schedule: Schedule, span: Span, unit: float, size: float) -> str:
    """size: of the microbatch's number; one for all cells, so that none looks more important."""
    action = span.action
    chunk = _chunk(schedule, action)
    x, y, wide = LEFT + span.start * unit, TOP + span.rank * (ROW + GAP), (span.end - span.start) * unit
    dark = chunk % 4 in (0, 2)
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{wide:.2f}" height="{ROW}" fill="{SHADES[action.op][chunk % 4]}" '
        f'stroke="white" stroke-width="1"><title>{action}: {span.start:.6g} to {span.end:.6g}</title></rect>'
        f'<text x="{x + wide / 2:.2f}" y="{y + ROW / 2 + size * 0.36:.2f}" font-size="{size:.1f}" '
        f'text-anchor="middle" fill="{"white" if dark else "#111"}">{action.microbatch}</text>'
    )


def _legend(schedule: Schedule, timeline: Timeline, y: float) -> list[str]:
    out: list[str] = []
    x = float(LEFT)
    stages = schedule.num_stages // schedule.num_ranks
    ops = [op for op in (Op.F, Op.B, Op.I, Op.W) if op in schedule.ops]
    entries: list[tuple[str, str]] = []
    for op in ops:
        for chunk in range(min(stages, 4)):
            which = "" if stages == 1 else f", stage {chunk + 1} of {stages}"
            entries.append((SHADES[op][chunk], NAMES[op] + which))
    for fill, name in [*entries, ("url(#idle)", "idle")]:
        needed = 22 + 6.6 * len(name) + 14
        if x + needed > max(LEFT + 500.0, LEFT + timeline.makespan * 9.0 + RIGHT):
            x, y = float(LEFT), y + 20
        out.append(f'<rect x="{x:.0f}" y="{y}" width="16" height="14" fill="{fill}" stroke="#bbb"/>')
        out.append(f'<text x="{x + 22:.0f}" y="{y + 12}" font-size="12" fill="#222">{name}</text>')
        x += needed
    return out


def legend_line(schedule: Schedule, ops: Sequence[Op] = (Op.F, Op.B, Op.I, Op.W)) -> str:
    """What the letters of the text grid mean."""
    shown = ", ".join(f"{op.value} {NAMES[op]}" for op in ops if op in schedule.ops)
    stages = schedule.num_stages // schedule.num_ranks
    if stages == 2:
        shown += "; lower case: the rank's second stage"
    elif stages > 2:
        shown += "; the number before the letter is the stage"
    return f"{shown}; the number after it is the microbatch; dots are idle time"
