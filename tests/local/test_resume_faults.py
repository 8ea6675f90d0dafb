"""Runs that meet a damaged checkpoint, an older one, another run, or their own end: no work is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallax import checkpoint
from parallax.errors import CheckpointError
from parallax.mesh import init_mesh
from parallax.resume import Checkpoints, prepare_output
from parallax.step import TrainState
from tests.cases import LLAMA, TIED, start

CASE = LLAMA | TIED | {"dtype": "float32", "model.layers": 2, "checkpoint.keep": 0}


def begin(output: Path, **options: object) -> tuple[Checkpoints, TrainState]:
    run, state = start("1x1x1", **CASE | {"output": str(output)} | options)
    return Checkpoints(run, output), state


def steps(output: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.find(output / "checkpoints")]


def test_a_run_that_the_lock_refuses_writes_nothing(tmp_path: Path):
    """The configuration of the run that lives stays what it is."""
    checkpoints, _ = begin(tmp_path)
    checkpoints.take_lock()
    before = (tmp_path / "config.yaml").read_text()
    other, _ = begin(tmp_path, **{"optimizer.lr": 0.5, "resume": "auto"})
    assert prepare_output(other.run.config, init_mesh("1x1x1", device_type="cpu")) == tmp_path
    with pytest.raises(CheckpointError, match="in use by another run"):
        other.take_lock()
    assert (tmp_path / "config.yaml").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "config.yaml"]
    assert checkpoints.lock is not None
    checkpoints.lock.release()
    other.take_lock()
    assert "lr: 0.5" in (tmp_path / "config.yaml").read_text()
