"""kill -9 at any instant of a run that saves every step: what was announced is there, and it ends as it would have."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, assemble_whole, gather_parameters, start
from tests.ranks.workers import RankFailure

STEPS = 4
MESH, SIZE = "2x1x2", 4
CASE = LLAMA | TIED | {"dtype": "float32", "model.layers": 2, "data.zero": 1, "checkpoint.keep": 1}
PHASES = {"mkdir": os, "write": os, "fsync": os, "rename": os, "rmtree": shutil}
KINDS = ("parameters", "exp_avg", "exp_avg_sq")


def go(
    output: str, background: bool = False, victims: tuple[int, ...] = (), phase: str = "", nth: int = 0
) -> dict[str, Any]:
    """Train to the end from the newest checkpoint. The victims kill themselves at the nth call of a function."""
    options = {"output": output, "resume": "auto", "checkpoint.background": str(background).lower()}
    run, state = start(MESH, **CASE | options)
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.take_lock()
    first = checkpoints.resume(state)
    begun = state.step
    if run.mesh.rank in victims:
        honest, left = getattr(PHASES[phase], phase), [nth]

        def deadly(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if phase == "write":  # half of what was to be written
                    honest(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **options)

        setattr(PHASES[phase], phase, deadly)
    while state.step < STEPS:
        advance(run, state, 1)
        said = [checkpoints.save_or_warn(state, last=state.step == STEPS), *checkpoints.news()]
        if run.mesh.rank == 0:
            with open(Path(output) / "announced", "a") as file:
                for line in "\n".join(said).splitlines():
                    if line.startswith("saved "):
                        print(Path(line.split()[1]).name, file=file)
    return {"said": first, "begun": begun, **{kind: gather_parameters(run, state, kind) for kind in KINDS}}


def instants(count: int) -> list[tuple[tuple[int, ...], str, int]]:
    """Who dies, in which function, at which call: seeded, every phase alike often."""
    dice = random.Random(5)
    found = []
    for number in range(count):
        phase = list(PHASES)[number % len(PHASES)]
        # Rank 0 alone makes, renames and deletes directories.
        victims = (0,) if phase in ("mkdir", "rename", "rmtree") else (dice.randrange(SIZE),)
        if phase in ("write", "fsync") and dice.random() < 0.2:
            victims = tuple(range(SIZE))
        most = {"mkdir": 5, "write": 60, "fsync": 8, "rename": 8, "rmtree": 3}[phase]
        found.append((victims, phase, dice.randint(1, most)))
    return found


def check(ranks: Any, folder: Path, count: int, background: bool = False) -> int:
    """Returns how many of the runs were killed: a late instant may lie after the end."""
    whole = ranks(SIZE, go, str(folder / "straight"))
    expected = {kind: assemble_whole([part[kind] for part in whole]) for kind in KINDS}
    killed = 0
    for number, (victims, phase, nth) in enumerate(instants(count)):
        output = folder / str(number)
        try:
            ranks(SIZE, go, str(output), background, victims, phase, nth)
        except RankFailure as failure:
            assert "the process ended without a word" in str(failure), failure
            killed += 1
        announced = output / "announced"
        last = (announced.read_text().split() if announced.is_file() else [""])[-1:]
        parts = ranks(SIZE, go, str(output))
        where = (victims, phase, nth)
        assert "WARNING" not in parts[0]["said"], (
            where,
            "a save that died left something that looks like a checkpoint",
        )
        assert parts[0]["begun"] >= max((checkpoint.step_of(Path(name)) for name in last), default=0), where
        for kind in KINDS:
            found = assemble_whole([part[kind] for part in parts])
            assert all(values.equal(expected[kind][name]) for name, values in found.items()), (where, kind)
        left = [path.name for path in (output / "checkpoints").iterdir() if path.name != ".lock"]
        if parts[0]["begun"] == STEPS:  # the last save was whole and had not thinned out yet; none came after it
            left = [name for name in left if name != f"step-{STEPS - 1:08d}"]
        assert left == [f"step-{STEPS:08d}"], (where, "leftovers are cleaned")
    return killed


def test_ten_instants(ranks, tmp_path: Path):
    assert check(ranks, tmp_path, 10) >= 6


def test_five_instants_of_saves_in_the_background(ranks, tmp_path: Path):
    assert check(ranks, tmp_path, 5, background=True) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True])
def test_a_hundred_instants(ranks, tmp_path: Path, background: bool):
    killed = check(ranks, tmp_path, 100, background)
    print(f"{killed} of 100 runs were killed")
    assert killed >= 60
