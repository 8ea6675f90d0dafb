"""Runs that meet a damaged checkpoint, an older one, another run, or their own end: no work is lost."""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.checkpoint import Place
from parallax.checkpoint.place import file_system
from parallax.errors import CheckpointError, ConfigError
from parallax.mesh import init_mesh
from parallax.resume import Checkpoints, prepare_output
from parallax.step import TrainState
from tests.cases import LLAMA, TIED, advance, make_config, start
from tests.local.test_checkpoint_damage import edit

CASE = LLAMA | TIED | {"dtype": "float32", "model.layers": 2, "checkpoint.keep": 0}


def begin(output: Path, **options: object) -> tuple[Checkpoints, TrainState]:
    run, state = start("1x1x1", **CASE | {"output": str(output)} | options)
    return Checkpoints(run, output), state


def steps(checkpoints: Checkpoints) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.find(checkpoints.directory)]


def train(checkpoints: Checkpoints, state: TrainState, num_steps: int) -> None:
    """Steps, each of them saved."""
    for _ in range(num_steps):
        advance(checkpoints.run, state, 1)
        checkpoints.save_or_warn(state, last=True)


def damage(path: Place) -> None:
    """A bit of a tensor flips."""
    where = str(path) if isinstance(path, Path) else file_system(path)[1]
    shard = next(Path(where).glob("rank-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_a_run_that_the_lock_refuses_writes_nothing(tmp_path: Path):
    """The configuration of the run that lives stays what it is."""
    checkpoints, state = begin(tmp_path)
    checkpoints.take_lock()
    checkpoints.resume(state)
    before = (tmp_path / "config.yaml").read_text()
    other, its = begin(tmp_path, **{"optimizer.lr": 0.5, "resume": "auto"})
    assert prepare_output(other.run.config, init_mesh("1x1x1", device_type="cpu")) == tmp_path
    with pytest.raises(CheckpointError, match="in use by another run"):
        other.take_lock()
    assert (tmp_path / "config.yaml").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoints", "config.yaml"]
    while checkpoints.locks:
        checkpoints.locks.pop().release()
    other.take_lock()
    assert (tmp_path / "config.yaml").read_text() == before, "it is not accepted yet"
    other.resume(its)
    assert "lr: 0.5" in (tmp_path / "config.yaml").read_text()


OTHERS = {
    "heads": (
        {"model.heads": 12, "model.kv_heads": 3},
        "another model .model.heads was 24, is 12; model.kv_heads was 6, is 3; model.head_dim was 2, is 4",
    ),
    "norm": ({"model.norm": "layernorm"}, "another model .*model.norm was rmsnorm, is layernorm"),
    "rope_theta": ({"model.rope_theta": 5}, r"another model \(model.rope_theta was 10000.0, is 5.0\)"),
    "norm_eps": ({"model.norm_eps": 0.5}, "model.norm_eps was 1e-05, is 0.5"),
    "samples": ({"seed": 7}, "other samples .seed was 1234, is 7"),
    "optimizer": ({"optimizer.name": "lion"}, "another optimizer's state .optimizer.name was adamw, is lion"),
    "moments": (
        {"optimizer.state_dtype": "bfloat16"},
        "as F32, this run wants BF16; set dtype and optimizer.state_dtype as",
    ),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_s_checkpoint_is_refused_and_its_configuration_stays(tmp_path: Path, what: str):
    """Of the same shapes, so that its tensors would fit."""
    first, state = begin(tmp_path)
    first.take_lock()
    first.resume(state)
    train(first, state, 1)
    before = (tmp_path / "config.yaml").read_text()
    while first.locks:
        first.locks.pop().release()
    changes, message = OTHERS[what]
    other, its = begin(tmp_path, **changes, resume="auto")
    other.take_lock()
    with pytest.raises(CheckpointError, match=message):
        other.resume(its)
    assert its.step == 0 and (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "changes", [{"model.dropout": 0.5}, {"model.kv_heads": None}, {"model.init_std": 1}, {"model.head_dim": 2}]
)
def test_the_same_model_in_other_words_goes_on(tmp_path: Path, changes: dict[str, Any]):
    first, state = begin(tmp_path, **{"model.kv_heads": 24})
    train(first, state, 1)
    other, its = begin(tmp_path, **{"model.kv_heads": 24} | changes, resume="auto")
    assert "at step 1 of" in other.resume(its)


def test_a_key_that_this_version_does_not_know_is_no_difference(tmp_path: Path):
    first, state = begin(tmp_path)
    train(first, state, 1)
    path = checkpoint.find(first.directory)[-1]
    for change in ({"of_a_later_version": 1}, {"qk_norm": ...}):
        edit(path, lambda manifest, change=change: _change(manifest["state"]["config"]["model"], change))
        other, its = begin(tmp_path, resume="auto")
        assert "at step 1 of" in other.resume(its)


def _change(keys: dict[str, Any], change: dict[str, Any]) -> None:
    for key, value in change.items():
        if value is ...:
            del keys[key]
        else:
            keys[key] = value


def test_a_checkpoint_that_is_not_there_makes_no_directory(tmp_path: Path):
    config = make_config("1x1x1", output=str(tmp_path / "new"), resume=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=f"{tmp_path / 'nothing'}"):
        prepare_output(config, init_mesh("1x1x1", device_type="cpu"))
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_done_says_so(tmp_path: Path):
    first, state = begin(tmp_path)
    train(first, state, 2)
    other, its = begin(tmp_path, resume="auto", steps=2)
    assert other.resume(its).endswith("at step 2 of 2: nothing is left to do; a larger steps goes on")


def test_runs_of_one_output_with_checkpoints_elsewhere_do_not_mix(tmp_path: Path):
    """The output's config.yaml and metrics are one run's, whatever directory each has for its checkpoints."""
    output = tmp_path / "output"
    checkpoints, _ = begin(output, **{"checkpoint.directory": str(tmp_path / "a")})
    checkpoints.take_lock()
    for wish in (str(tmp_path / "b"), f"file://{tmp_path}/c", None):
        other, _ = begin(output, **{"checkpoint.directory": wish})
        with pytest.raises(CheckpointError, match=f"{output} is in use by another run"):
            other.take_lock()
    same, _ = begin(tmp_path / "another", **{"checkpoint.directory": str(tmp_path / "a")})
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'a'} is in use by another run"):
        same.take_lock()
    assert not same.locks  # what it had taken it let go
    once, _ = begin(tmp_path / "once", **{"checkpoint.directory": str(tmp_path / "once")})
    once.take_lock()


@pytest.mark.parametrize("url", [False, True])
def test_the_step_of_a_damaged_checkpoint_can_be_saved_again(tmp_path: Path, url: bool):
    """It is passed over and gets another name; the run that comes to that step again saves it, and does not end."""
    where = {"checkpoint.directory": f"file://{tmp_path}/bucket"} if url else {}
    checkpoints, state = begin(tmp_path / "a", **where)
    train(checkpoints, state, 3)
    saved = checkpoint.find(checkpoints.directory)
    for path in saved[1:]:
        damage(path)
    again, other = begin(tmp_path / "a", resume="auto", **where)
    again.take_lock()
    first, second, last = again.resume(other).splitlines()
    for line, path in ((first, saved[2]), (second, saved[1])):
        assert line.startswith(f"WARNING: passed over: {path}/rank-00000"), line
        aside = path.parent / line.rpartition("it is kept as ")[2]
        assert aside.name.startswith(f"damaged-{path.name}-")
        with pytest.raises(CheckpointError, match="altered"):
            checkpoint.load(aside, again._entries(other), again._exchange)
    assert last.startswith(f"resumed from {saved[0]} at step 1") and steps(again) == [1]
    train(again, other, 2)
    assert steps(again) == [1, 2, 3]
    checkpoint.clear_leftovers(again.directory)
    checkpoint.prune(again.directory, 1)
    assert checkpoint.load(saved[2], again._entries(other), again._exchange)["step"] == 3
    with pytest.raises(CheckpointError, match="altered"):  # it is never deleted
        checkpoint.load(aside, again._entries(other), again._exchange)


def test_where_none_is_sound_all_keep_their_names(tmp_path: Path):
    """Or the next resume=auto would begin anew without a word."""
    checkpoints, state = begin(tmp_path)
    train(checkpoints, state, 2)
    for path in checkpoint.find(checkpoints.directory):
        damage(path)
    again, other = begin(tmp_path, resume="auto")
    again.take_lock()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is sound"):
            again.resume(other)
    assert steps(again) == [1, 2]


def test_going_back_passes_over_a_damaged_checkpoint(tmp_path: Path):
    checkpoints, state = begin(tmp_path, on_nan="rollback")
    checkpoints.take_lock()
    train(checkpoints, state, 2)
    damage(checkpoint.find(checkpoints.directory)[1])
    advance(checkpoints.run, state, 1)
    passed, said = checkpoints.roll_back(state).splitlines()
    assert passed.startswith("WARNING: passed over: ") and "it is kept as damaged-step-00000002-" in passed
    assert said.startswith("step 3 went wrong: back at step 1, ") and state.step == 1
    train(checkpoints, state, 1)
    assert steps(checkpoints) == [1, 2]


def full(path: Path, named: Any) -> Any:
    time.sleep(0.1)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_going_back_tells_of_a_save_that_failed_beside_it(tmp_path: Path, monkeypatch):
    checkpoints, state = begin(tmp_path, on_nan="rollback", **{"checkpoint.background": "true"})
    train(checkpoints, state, 1)
    monkeypatch.setattr(sys.modules["parallax.checkpoint.save"], "write_shard", full)
    for last in (False, True):
        advance(checkpoints.run, state, 1)
        assert checkpoints.save_or_warn(state, last=False).startswith("saving ")
        if last:  # nor is it forgotten where the run ends
            with pytest.raises(CheckpointError, match="(?s)00002 cannot.* space .*00002 cannot.* space "):
                checkpoints.save_or_warn(state, last=True)
        else:
            said = checkpoints.roll_back(state).splitlines()
            assert said[0].startswith("WARNING: ") and "No space left on device" in said[0]
            assert said[1].startswith("step 2 went wrong: back at step 1, ")


def test_a_run_does_not_go_on_below_what_is_there(tmp_path: Path):
    """Resumed from step 1 with step 3 beside it, it would save step 2, and resume=auto would take step 3."""
    checkpoints, state = begin(tmp_path / "a")
    train(checkpoints, state, 3)
    first = checkpoint.find(checkpoints.directory)[0]
    again, other = begin(tmp_path / "a", resume=first)
    with pytest.raises(CheckpointError, match="holds .*step-00000003: .* lie below it.*another output"):
        again.resume(other)
    assert other.step == 0
    elsewhere, other = begin(tmp_path / "b", resume=first)
    assert elsewhere.resume(other).startswith(f"resumed from {first} at step 1")
    train(elsewhere, other, 1)
    assert steps(elsewhere) == [2]
