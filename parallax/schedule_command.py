"""`parallax schedule list | show | export`: tables without a process group. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from parallax.errors import ConfigError
from parallax.pipeline.draw import legend_line, summary, text_grid, to_svg, to_trace
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Schedule
from parallax.pipeline.schedules import SCHEDULES
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.table import get_schedule, to_text
from parallax.pipeline.validate import Wire, validate

__all__ = ["run_schedule"]

USAGE = (
    "parallax schedule list | show NAME [--svg FILE] [--trace FILE] | export NAME FILE.csv [--messages]; with "
    "pipeline=4 num_microbatches=8 [stages_per_rank=2] [forward=1 input_grad=1 weight_grad=1 send=0]"
)


@dataclass(slots=True)
class _Request:
    """What the arguments say: key=value pairs, --options with a file, and bare words."""

    pipeline: int = 4
    num_microbatches: int = 8
    stages_per_rank: int | None = None
    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    send: float = 0.0
    svg: str | None = None
    trace: str | None = None
    messages: bool = False
    words: list[str] = field(default_factory=list)

    @property
    def cost(self) -> Cost:
        return Cost(self.forward, self.input_grad, self.weight_grad, self.send)

    def table(self, name: str) -> Schedule:
        return get_schedule(name, self.pipeline, self.num_microbatches, self.stages_per_rank)


def _read(argv: Sequence[str]) -> _Request:
    request = _Request()
    kinds: dict[str, Any] = {f.name: f.type for f in fields(_Request)}
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.lstrip("-").partition("=")
        if argument == "--messages":
            request.messages = True
        elif argument.startswith("--") and name in ("svg", "trace"):
            if not equals and not rest:
                raise ConfigError(f"{argument} needs a file, as in {argument} schedule.{name}")
            setattr(request, name, value if equals else rest.pop(0))
        elif equals and not argument.startswith("-") and name in kinds and name not in ("words", "svg", "trace"):
            setattr(request, name, _number(name, value, whole="int" in kinds[name]))
        elif equals or argument.startswith("-"):
            raise ConfigError(f"{argument!r} is not understood; usage: {USAGE}")
        else:
            request.words.append(argument)
    return request


def _number(name: str, text: str, *, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: expected {'an integer' if whole else 'a number'}") from None
    if not 0 <= value < 1e9 or (value == 0 and name != "send" and not name.endswith("_grad")):
        raise ConfigError(f"{name}={text} is out of range")
    return value


def run_schedule(argv: Sequence[str]) -> int:
    """List, show or export pipeline schedules."""
    request = _read(argv)
    command, *words = request.words or ["list"]
    if command == "list" and not words:
        return _list(request)
    if command == "show" and len(words) == 1:
        return _show(request, words[0])
    if command == "export" and len(words) == 2:
        return _export(request, *words)
    raise ConfigError(f"usage: {USAGE}")


def _list(request: _Request) -> int:
    print(f"{request.pipeline} ranks, {request.num_microbatches} microbatches; times of a rank's whole share are 1")
    print(f"{'schedule':<12} {'stages':>6} {'makespan':>9} {'bubble':>7} {'inside':>7} {'holds':>6}")
    for name in SCHEDULES:
        schedule = get_schedule(name, request.pipeline, request.num_microbatches)
        each = schedule.num_stages // schedule.num_ranks
        share = Cost(request.forward / each, request.input_grad / each, request.weight_grad / each, request.send)
        timeline = simulate(schedule, share)
        held = max(timeline.in_flight) / each / min(request.pipeline, request.num_microbatches)
        print(
            f"{name:<12} {each:>6} {timeline.makespan:>9.4g} {timeline.bubble:>7.1%} {timeline.inner_bubble:>7.1%} "
            f"{held:>6.2f}"
        )
    print("bubble: idle share of the makespan, mean over ranks")
    print("inside: the idle share between its own first and last action of the rank where that is largest")
    print("holds: activations held at most, 1F1B's first rank = 1")
    return 0


def _show(request: _Request, name: str) -> int:
    schedule = request.table(name)
    validate(lower(schedule), wire=Wire.ORDERED)
    timeline = simulate(schedule, request.cost)
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(summary(schedule, timeline))
    print(text_grid(schedule, timeline, color=color))
    print(legend_line(schedule))
    if request.svg is not None:
        _write(request.svg, to_svg(schedule, {schedule.name: timeline}))
    if request.trace is not None:
        _write(request.trace, to_trace(schedule, timeline))
    return 0


def _export(request: _Request, name: str, file: str) -> int:
    if not file.endswith(".csv"):
        raise ConfigError(f"{file}: a table's name ends in .csv, so that pipeline.schedule={file}.csv can find it")
    schedule = request.table(name)
    _write(file, to_text(lower(schedule) if request.messages else schedule))
    return 0


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    print(f"wrote {file}", file=sys.stderr)
