"""`parallax schedule list | show | export`: tables without a process group. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from parallax.arguments import suggestion
from parallax.errors import ConfigError
from parallax.pipeline.draw import legend_line, summary, text_grid, to_svg, to_trace
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Schedule
from parallax.pipeline.schedules import SCHEDULES, leaves_stages
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.table import get_schedule, is_file, to_text
from parallax.pipeline.validate import Wire, validate

__all__ = ["run_schedule"]

USAGE = (
    "parallax schedule list | show NAME [--svg FILE] [--trace FILE] | export NAME FILE.csv [--messages]; with "
    "pipeline=4 num_microbatches=8 [stages_per_rank=2] [forward=1 input_grad=1 weight_grad=1 send=0]"
)


# Which commands each key and option is for, and the words that a command takes.
SIZES, TIMES = ("pipeline", "num_microbatches", "stages_per_rank"), ("forward", "input_grad", "weight_grad", "send")
TAKEN_BY: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(SIZES, ("list", "show", "export")),
    **dict.fromkeys(TIMES, ("list", "show")),
    **dict.fromkeys(("--svg", "--trace"), ("show",)),
    "--messages": ("export",),
}
WORDS: Mapping[str, tuple[str, ...]] = {"list": (), "show": ("NAME",), "export": ("NAME", "FILE.csv")}
FILES = {"--svg": "svg", "--trace": "json"}
LIMIT = 10**9


@dataclass(slots=True)
class _Request:
    """What the arguments say: numbers and files by their names, and bare words. given: by name, the argument itself."""

    sizes: dict[str, int] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    given: dict[str, str] = field(default_factory=dict)

    @property
    def pipeline(self) -> int:
        return self.sizes.get("pipeline", 4)

    @property
    def num_microbatches(self) -> int:
        return self.sizes.get("num_microbatches", 8)

    @property
    def stages_per_rank(self) -> int | None:
        return self.sizes.get("stages_per_rank")

    def cost(self, num_parts: int = 1) -> Cost:
        """num_parts: of a rank's share, one of which the cost is for."""
        forward, input_grad, weight_grad = (self.times.get(name, 1.0) / num_parts for name in TIMES[:3])
        return Cost(forward, input_grad, weight_grad, self.times.get("send", 0.0))

    def table(self, name: str) -> Schedule:
        if name == "auto":
            raise ConfigError(
                "pipeline.schedule=auto has no table until a run has costs to search with: those of its model, mesh "
                "and pipeline.memory_cap; see what it finds with `parallax check mesh=1x1x4 pipeline.schedule=auto "
                "[key=value ...]`, and drawn with trace=N in a run"
            )
        if not is_file(name) and name not in SCHEDULES:
            hint = suggestion(name.lower().replace("_", "-"), SCHEDULES)
            raise ConfigError(
                f"there is no schedule {name!r}; {hint}choose one of {', '.join(SCHEDULES)}, or a table's FILE.csv"
            )
        return get_schedule(name, self.pipeline, self.num_microbatches, self.stages_per_rank)


def _read(argv: Sequence[str]) -> _Request:
    request = _Request()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not equals and not argument.startswith("-"):
            request.words.append(argument)
            continue
        if name not in TAKEN_BY or (name == "--messages" and equals):
            raise ConfigError(f"{argument!r} is not understood; {suggestion(name, TAKEN_BY)}usage: {USAGE}")
        if name in FILES and not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("-") else ""
            argument = f"{name} {value}"
        if name in request.given:
            raise ConfigError(f"{name} is given twice: {request.given[name]} and {argument}; keep one")
        request.given[name] = argument
        if name in FILES:
            if not value:
                raise ConfigError(f"{name} needs a file, as in {name} schedule.{FILES[name]}")
            request.files[name] = value
        elif name in SIZES:
            request.sizes[name] = int(_number(name, value))
        elif name in TIMES:
            request.times[name] = _number(name, value)
    return request


def _number(name: str, text: str) -> float:
    whole = name in SIZES
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"{name}={text}: expected {'an integer' if whole else 'a number'}") from None
    if whole:
        fits, least = value >= 1, "at least 1"
    elif name == "forward":
        fits, least = value > 0, "more than 0"
    else:
        fits, least = value >= 0, "at least 0"
    if not fits or not value < LIMIT:
        raise ConfigError(f"{name}={text} is out of range; choose {least} and less than {LIMIT:,}")
    return value


def run_schedule(argv: Sequence[str]) -> int:
    """List, show or export pipeline schedules."""
    request = _read(argv)
    command, *words = request.words or ["list"]
    if command not in WORDS:
        is_table = command in SCHEDULES or is_file(command)
        hint = f"did you mean show {command}? " if is_table else suggestion(command, WORDS)
        raise ConfigError(f"there is no command {command!r} of parallax schedule; {hint}usage: {USAGE}")
    if len(words) != len(WORDS[command]):
        takes, given = " ".join(WORDS[command]) or "no name", " ".join(words) or "nothing"
        raise ConfigError(f"schedule {command} takes {takes}, and was given {given}; usage: {USAGE}")
    for name, argument in request.given.items():
        if command not in TAKEN_BY[name]:
            raise ConfigError(f"{argument} is for schedule {' and '.join(TAKEN_BY[name])}, not {command}; leave it out")
    if command == "list":
        return _list(request)
    return _show(request, *words) if command == "show" else _export(request, *words)


def _list(request: _Request) -> int:
    chosen, times = "", "times of a rank's whole share are 1"
    if request.stages_per_rank is not None:
        chosen = f", {request.given['stages_per_rank']} where a schedule leaves it open"
    if request.times:
        times = (
            f"times of a rank's whole share are 1, but for {' '.join(request.given[name] for name in request.times)}"
        )
    print(f"{request.pipeline} ranks, {request.num_microbatches} microbatches{chosen}; {times}")
    print(f"{'schedule':<12} {'stages':>6} {'makespan':>9} {'bubble':>7} {'inside':>7} {'holds':>6}")
    for name in SCHEDULES:
        stages = request.stages_per_rank if leaves_stages(name) else None
        schedule = get_schedule(name, request.pipeline, request.num_microbatches, stages)
        each = schedule.num_stages // schedule.num_ranks
        timeline = simulate(schedule, request.cost(each))
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
    timeline = simulate(schedule, request.cost())
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(summary(schedule, timeline))
    print(text_grid(schedule, timeline, color=color))
    print(legend_line(schedule))
    if file := request.files.get("--svg"):
        _write(file, to_svg(schedule, {schedule.name: timeline}))
    if file := request.files.get("--trace"):
        _write(file, to_trace(schedule, timeline))
    return 0


def _export(request: _Request, name: str, file: str) -> int:
    if not file.endswith(".csv"):
        raise ConfigError(f"{file}: a table's name ends in .csv, so that pipeline.schedule={file}.csv can find it")
    schedule = request.table(name)
    _write(file, to_text(lower(schedule) if "--messages" in request.given else schedule))
    return 0


def _write(file: str, text: str) -> None:
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    print(f"wrote {file}", file=sys.stderr)
