"""Saves beside the training: the same bytes, a short wait, and errors that are told."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.cli import main
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, start
from tests.ranks.test_torchrun import ROOT, SMALL
from tests.ranks.test_torchrun import run as torchrun

CASE = LLAMA | TIED | {"dtype": "float32", "model.layers": 3, "checkpoint.keep": 0, "data.zero": 2}


def train(output: str, background: bool, fails_at: int = 0) -> dict[str, Any]:
    """Four steps, each saved; files are written when a gate opens, and one save may fail on rank 1.

    In the background the gate opens after the training has gone on, so a save that waited would wait for good.
    """
    run, state = start("2x1x2", **CASE | {"output": output, "checkpoint.background": str(background).lower()})
    checkpoints = Checkpoints(run, Path(output))
    module = sys.modules["parallax.checkpoint.save"]
    honest, gate = module.write_shard, threading.Event()  # type: ignore[attr-defined]

    def gated(path: Path, named: Any) -> Any:
        if fails_at and run.mesh.rank == 1 and f"step-{fails_at:08d}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        assert gate.wait(30), "the training waits for a file"
        return honest(path, named)

    module.write_shard = gated  # type: ignore[attr-defined]
    said, went_on = [], []
    for step in range(1, 5):
        advance(run, state, 1)
        if background and step < 4:
            gate.clear()
        elif background:  # the last one must wait for the third, which is still under way
            threading.Timer(0.3, gate.set).start()
        else:
            gate.set()
        said.append(checkpoints.save_or_warn(state, last=step == 4))
        went_on.append(not gate.is_set())
        advance_nothing(run)
        if step < 3:
            gate.set()
            end = time.monotonic() + 30
            while run.mesh.rank == 0 and background and time.monotonic() < end:
                if news := checkpoints.news():
                    said += news
                    break
                time.sleep(0.01)
            advance_nothing(run)
    return {"said": said, "went_on": went_on}


def advance_nothing(run: Any) -> None:
    """Keep the ranks together."""
    from parallax.comm import barrier

    barrier(run.mesh.world, run.mesh.device)


def test_it_saves_what_a_save_that_is_waited_for_does(ranks, tmp_path: Path, capsys):
    """The parameters change while the file is being written; what is saved does not."""
    plain = ranks(4, train, str(tmp_path / "a"), False)
    found = ranks(4, train, str(tmp_path / "b"), True)
    paths = [checkpoint.find(tmp_path / name / "checkpoints") for name in "ab"]
    assert [path.name for path in paths[0]] == [path.name for path in paths[1]] and len(paths[0]) == 4
    for left, right in zip(*paths, strict=True):
        assert main(["checkpoint", "diff", str(left), str(right)]) == 0, capsys.readouterr().out
        assert sorted(os.listdir(left)) == sorted(os.listdir(right)), "no record is left"
    for rank in range(4):
        assert plain[rank]["went_on"] == [False] * 4
        assert found[rank]["went_on"] == [True, True, True, False], "the last one waits, for the one before too"
    said = found[0]["said"]
    assert said[0].startswith("saving ") and "in the background; the training waited 0." in said[0]
    assert said[1].startswith(f"saved {paths[1][0]} in ")
    assert said[-1].splitlines()[0].startswith(f"saved {paths[1][2]}"), "what was not told yet"
    assert said[-1].splitlines()[1].startswith(f"saved {paths[1][3]}")


def test_an_error_in_the_background_is_told_and_ends_no_run(ranks, tmp_path: Path):
    found = ranks(4, train, str(tmp_path), True, 2)[0]["said"]
    assert [path.name[-1] for path in checkpoint.find(tmp_path / "checkpoints")] == ["1", "3", "4"]
    (warning,) = [line for line in found if line.startswith("WARNING")]
    assert "step-00000002 cannot be saved: No space left on device" in warning and "the run goes on" in warning
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


PROGRAM = """
import sys, time
sys.path.insert(0, {recipes!r})
import gpt
import parallax.step
from parallax.launch import entrypoint
module = sys.modules["parallax.checkpoint.save"]
write, step = module.write_shard, parallax.step._train_step
def slow(path, named):
    time.sleep(1.5)
    return write(path, named)
def broken(run, state, batch, stop):
    if state.step == 3 and {where}:
        raise FloatingPointError("the step went wrong")
    return step(run, state, batch, stop)
module.write_shard, parallax.step._train_step = slow, broken
entrypoint(gpt.main)
"""


@pytest.mark.parametrize("where", ["True", "run.mesh.rank == 1"])
def test_a_run_that_fails_completes_the_save_under_way(tmp_path: Path, where: str):
    """Whether all ranks stop alike or one of them does; and it says so."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(recipes=str(ROOT / "recipes"), where=where))
    small = [option for option in SMALL if not option.startswith("checkpoint.every")]
    options = [*small, "mesh=2x1x1", "steps=9", "checkpoint.every=3", "checkpoint.background=true", "output=out"]
    done = torchrun(2, *options, cwd=tmp_path, program=str(program))
    assert done.returncode == 1 and "the step went wrong" in done.stderr
    (path,) = checkpoint.find(tmp_path / "out/checkpoints")
    assert path.name == "step-00000003" and main(["checkpoint", "verify", str(path)]) == 0
    assert "saved out/checkpoints/step-00000003 in " in done.stdout
    assert not list((tmp_path / "out/checkpoints").glob(".tmp-*"))
