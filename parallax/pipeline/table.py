"""Schedules as files, and the schedule that a configuration asks for. Imports no torch.

The file is torch's text form: one row a rank, cells such as 0F0, 1B2, 0SEND_F1 divided by commas, empty cells ignored.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from parallax.errors import ScheduleError
from parallax.pipeline.schedule import Action, Schedule
from parallax.pipeline.schedules import make_schedule
from parallax.pipeline.validate import validate

__all__ = ["from_text", "get_schedule", "is_file", "read_table", "to_text"]

MAX_BYTES = 1 << 28


def is_file(name: str) -> bool:
    """Whether pipeline.schedule names a file."""
    return name.endswith(".csv")


def get_schedule(name: str, num_ranks: int, num_microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """The registered schedule of this name, or the table in this .csv file. Raises ScheduleError."""
    if not is_file(name):
        return make_schedule(name, num_ranks, num_microbatches, stages_per_rank)
    schedule = read_table(Path(name))
    for what, has, wanted in (
        ("ranks", schedule.num_ranks, num_ranks),
        ("microbatches", schedule.num_microbatches, num_microbatches),
        ("stages a rank", schedule.num_stages / schedule.num_ranks, stages_per_rank),
    ):
        if wanted is not None and has != wanted:
            raise ScheduleError(f"{name} is a table of {has:g} {what}, the run has {wanted}; export one that fits")
    return schedule


def read_table(path: Path) -> Schedule:
    """A table from a file, complete and free of deadlocks. Raises ScheduleError that names file, row and column."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_BYTES)
    except OSError as error:
        raise ScheduleError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ScheduleError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    return from_text(text, str(path))


def from_text(text: str, name: str) -> Schedule:
    """`read_table` of a text; name is for the messages."""
    programs: list[tuple[Action, ...]] = []
    places: dict[int, int] = {}
    for row, cells in enumerate(row for row in csv.reader(io.StringIO(text)) if any(cell.strip() for cell in row)):
        program = []
        for column, cell in enumerate(cells):
            if not cell.strip():
                continue
            try:
                action = Action.parse(cell)
            except ScheduleError as error:
                raise ScheduleError(f"{name}, row {row}, column {column}: {error}") from None
            if places.setdefault(action.stage, row) != row:
                raise ScheduleError(
                    f"{name}, row {row}, column {column}: {action} is of stage {action.stage}, which row "
                    f"{places[action.stage]} has too; a stage is on one rank"
                )
            program.append(action)
        programs.append(tuple(program))
    microbatches = [a.microbatch for program in programs for a in program if a.microbatch is not None]
    if not microbatches:
        raise ScheduleError(f"{name} has no action; write one row a rank, as in 0F0,0F1,0B0,0B1")
    if missing := [number for number, stage in enumerate(sorted(places)) if number != stage]:
        raise ScheduleError(f"{name} has no row with stage {missing[0]}; stages are 0 to {max(places)}")
    stage_to_rank = tuple(places[stage] for stage in range(len(places)))
    schedule = Schedule(Path(name).stem, max(microbatches) + 1, stage_to_rank, tuple(programs))
    try:
        validate(schedule)
    except ScheduleError as error:
        where = re.sub(r"rank (\d+), column", r"row \1, column", str(error).removeprefix(f"{schedule.name}: "))
        raise ScheduleError(f"{name}: {where}") from None
    return schedule


def to_text(schedule: Schedule) -> str:
    """The table as text that `from_text` and torch read."""
    return "".join(",".join(map(str, program)) + "\n" for program in schedule.programs)
