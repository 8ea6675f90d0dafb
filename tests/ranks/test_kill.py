"""kill -9 at any instant of a run that saves every step: what was announced is there, and it ends as it would have."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
from collections import Counter
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
background_file = sys.modules["parallax.checkpoint.background"]
PHASES: dict[str, tuple[Any, str]] = {
    "copy": (background_file, "_copy"),
    "write": (os, "write"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "prune": (os, "unlink"),
    "mkdir": (os, "mkdir"),
    "rmtree": (shutil, "rmtree"),
}
"""What is called in each: prune is in the middle of a deletion, rmtree between the new name and it."""
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
        module, name = PHASES[phase]
        honest, left = getattr(module, name), [nth]

        def deadly(*args: Any, **options: Any) -> Any:
            # Of a checkpoint that goes, not the record of a save in the background.
            left[0] -= phase != "prune" or "dir_fd" in options
            if left[0] == 0:
                if phase == "write":  # half of what was to be written
                    honest(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(*args, **options)

        setattr(module, name, deadly)
    while state.step < STEPS:
        advance(run, state, 1)
        said = [checkpoints.save_or_warn(state, last=state.step == STEPS), *checkpoints.news()]
        if run.mesh.rank == 0:
            with open(Path(output) / "announced", "a") as file:
                for line in "\n".join(said).splitlines():
                    if line.startswith("saved "):
                        print(Path(line.split()[1]).name, file=file)
    return {"said": first, "begun": begun, **{kind: gather_parameters(run, state, kind) for kind in KINDS}}


MOST = {"copy": 36, "write": 52, "fsync": 4, "rename": 7, "prune": 15, "mkdir": 4, "rmtree": 3}
"""How often any rank that may die calls these in a run, at least: rank 0 has more to fsync."""


def instants(count: int, background: bool) -> list[tuple[tuple[int, ...], str, int]]:
    """Who dies, in which phase, at which call: seeded, every phase alike often."""
    dice = random.Random(5)
    phases = [phase for phase in PHASES if background or phase != "copy"]
    found = []
    for number in range(count):
        phase = phases[number % len(phases)]
        # Rank 0 alone makes, renames and deletes directories.
        victims = (dice.randrange(SIZE),) if phase in ("copy", "write", "fsync") else (0,)
        most = 16 if phase == "fsync" and victims == (0,) else MOST[phase]
        if phase in ("write", "fsync") and dice.random() < 0.2:
            victims = tuple(range(SIZE))
        found.append((victims, phase, dice.randint(1, most)))
    return found


def check(ranks: Any, folder: Path, count: int, background: bool = False) -> Counter[str]:
    """Returns how many of the runs were killed in each phase."""
    whole = ranks(SIZE, go, str(folder / "straight"))
    expected = {kind: assemble_whole([part[kind] for part in whole]) for kind in KINDS}
    killed: Counter[str] = Counter()
    for number, (victims, phase, nth) in enumerate(instants(count, background)):
        output = folder / str(number)
        try:
            ranks(SIZE, go, str(output), background, victims, phase, nth)
        except RankFailure as failure:
            assert "the process ended without a word" in str(failure), failure
            killed[phase] += 1
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
    assert check(ranks, tmp_path, 10).total() >= 8


def test_five_instants_of_saves_in_the_background(ranks, tmp_path: Path):
    assert check(ranks, tmp_path, 5, background=True).total() >= 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("background", [False, True])
def test_a_hundred_instants(ranks, tmp_path: Path, background: bool):
    killed = check(ranks, tmp_path, 100, background)
    print(f"{killed.total()} of 100 runs were killed: {dict(killed)}")
    phases = ["write", "fsync", "rename", "prune", *(["copy"] if background else [])]
    assert all(killed[phase] >= 5 for phase in phases) and killed.total() >= 60, killed
