"""A run that is told to end, cannot write, or finds its newest checkpoint damaged: no work is lost."""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.errors import CheckpointError
from parallax.resume import Checkpoints
from parallax.step import evaluate, train_step
from parallax.stop import Stop
from tests.cases import LLAMA, TIED, advance, assemble_whole, gather_parameters, make_batch, start
from tests.ranks.test_torchrun import ENVIRONMENT, SMALL, command, rows

CASE = LLAMA | TIED | {"dtype": "float32", "model.layers": 3}


class OnlyHere(Stop):
    """A wish of one rank."""

    here = False

    @property
    def wished(self) -> bool:
        return self.here


def told(where: int) -> list[tuple[bool, ...]]:
    run, state = start("2x1x2", **CASE)
    found = []
    for when in ("step", "validation"):
        stop = OnlyHere()
        train_step(run, state, make_batch(run.config, run.mesh, state.step), stop)
        before = stop.agreed
        stop.here = run.mesh.rank == where
        if when == "step":
            train_step(run, state, make_batch(run.config, run.mesh, state.step), stop)
        else:
            batches = iter([make_batch(run.config, run.mesh, 90), make_batch(run.config, run.mesh, 91)])
            assert math.isnan(evaluate(run, batches, stop))
            stop.here = len(list(batches)) == 1  # the second one was not looked at
        found.append((before, stop.agreed, stop.here if when == "validation" else True))
    return found


@pytest.mark.parametrize("where", [0, 3])
def test_the_wish_of_one_rank_is_agreed_by_all_in_one_step(ranks, where: int):
    for found in ranks(4, told, where):
        assert found == [(False, True, True), (False, True, True)]


def test_a_clock_and_a_reason():
    now = [0.0]
    stop = Stop(10.0, clock=lambda: now[0])
    assert not stop.wished and stop.reason == "another rank was told to end"
    now[0] = 10.0
    assert stop.wished and stop.reason == "time_limit=10 s is over"


def test_the_time_limit_counts_from_the_start_of_the_process():
    """What imports, assembling and resuming took is part of a job's time."""
    code = "import time; time.sleep(0.5); from parallax.stop import Stop; print(Stop(0.4).wished, Stop(60).wished)"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr


@pytest.fixture
def started(tmp_path: Path):
    """Start the recipe; whatever is still there at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def begin(size: int, *arguments: str, **more: str) -> subprocess.Popen[str]:
        given = {argument.partition("=")[0] for argument in arguments}
        line = command(size, *(one for one in SMALL if one.partition("=")[0] not in given), *arguments)
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        pipes |= {"cwd": tmp_path, "env": ENVIRONMENT | more, "text": True}
        process = subprocess.Popen(line, **pipes, start_new_session=True)
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(path: Path, num_lines: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if path.is_file() and len(path.read_text().splitlines()) >= num_lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"no {num_lines} steps; exit code {process.poll()}")


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"recipes/gpt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_signal_to_one_rank_saves_and_the_run_goes_on_as_if_nothing_had_been(started, tmp_path: Path):
    options = ["mesh=2x1x1", "steps=400", "dtype=float32", "checkpoint.every=1000", "output=told"]
    process = started(2, *options)
    wait_for(tmp_path / "told/metrics.jsonl", 3, process)
    os.kill(workers_of(process)[1], signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    go_on = "go on with config=told/config.yaml output=told resume=auto"
    match = re.search(rf"another rank was told to end: ended after step (\d+); {go_on}", out)
    assert match, out
    step = int(match[1])
    assert [path.name for path in checkpoint.find(tmp_path / "told/checkpoints")] == [f"step-{step:08d}"]
    assert len(rows(tmp_path / "told")) == step
    limit = str(step + 2)
    again = started(2, *options[:1], f"steps={limit}", *options[2:], "optimizer.decay_steps=400", "resume=auto")
    assert again.wait(60) == 0
    whole = started(2, *options[:1], f"steps={limit}", *options[2:4], "optimizer.decay_steps=400", "output=whole")
    assert whole.wait(60) == 0
    keys = ("loss", "grad_norm", "lr", "tokens")
    ours, theirs = ([[row[key] for key in keys] for row in rows(tmp_path / name)] for name in ("told", "whole"))
    assert ours == theirs


def test_time_is_up_and_a_second_signal_ends_at_once(started, tmp_path: Path):
    process = started(1, "steps=100000", "output=timed", "time_limit=2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "time_limit=2 s is over: ended after step" in out, err
    assert checkpoint.find(tmp_path / "timed/checkpoints")
    # One step takes long, so that both signals come in one.
    process = started(1, "steps=100000", "output=twice", "batch.global_size=4096", "checkpoint.every=0")
    wait_for(tmp_path / "twice/metrics.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM


def test_a_signal_to_every_process_of_a_job_is_one_wish(started, tmp_path: Path):
    """As Slurm delivers it: each worker gets it from the scheduler and, milliseconds later, from torchrun again."""
    process = started(2, "mesh=2x1x1", "steps=100000", "checkpoint.every=100000", "output=job")
    wait_for(tmp_path / "job/metrics.jsonl", 3, process)
    for pid in (*workers_of(process), process.pid):
        os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert "SIGTERM came: ended after step" in out, err
    assert len(checkpoint.find(tmp_path / "job/checkpoints")) == 1


@pytest.mark.parametrize("shared_memory", ["0", "1"])
def test_a_second_signal_ends_a_rank_that_waits_for_another(started, tmp_path: Path, shared_memory: str):
    """Python runs no handler while gloo waits in C."""
    process = started(2, "mesh=2x1x1", "steps=100000", "output=stuck", PARALLAX_SHARED_MEMORY=shared_memory)
    wait_for(tmp_path / "stuck/metrics.jsonl", 3, process)
    waiting, stuck = workers_of(process)
    os.kill(stuck, signal.SIGSTOP)
    time.sleep(1)
    os.kill(waiting, signal.SIGTERM)
    time.sleep(1.2)
    assert Path(f"/proc/{waiting}").exists(), "the first one alone ends nothing"
    os.kill(waiting, signal.SIGTERM)
    time.sleep(1)
    os.kill(stuck, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert "SIGTERM is the second signal: ended at once" in err


def test_a_validation_that_is_cut_short_leaves_no_val_loss(started, tmp_path: Path):
    """The mean of its first batches is another number than that of all."""
    options = ["steps=100000", "output=cut", "validation.every=2", "validation.batches=100000", "checkpoint.every=0"]
    process = started(1, *options)
    wait_for(tmp_path / "cut/metrics.jsonl", 1, process)
    time.sleep(1)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "ended after step 2" in out, err
    assert [row.get("val_loss", "none") for row in rows(tmp_path / "cut")] == ["none", "none"]


def test_two_runs_in_one_directory_are_refused_and_a_dead_one_is_no_run(started, tmp_path: Path):
    first = started(1, "steps=100000", "output=shared", "checkpoint.every=1000")
    wait_for(tmp_path / "shared/metrics.jsonl", 1, first)
    second = started(2, "mesh=2x1x1", "steps=4", "output=shared")
    _, err = second.communicate(timeout=60)
    assert second.returncode != 0
    assert re.search(rf"in use by another run \(process {first.pid} on .*, since .*\); choose another output", err), err
    first.kill()
    first.wait()
    third = started(1, "steps=2", "output=shared")
    assert third.wait(60) == 0


def go(output: str, wish: str, num_steps: int = 1) -> dict[str, Any]:
    run, state = start("2x1x1", **CASE | {"output": output, "resume": wish, "checkpoint.keep": 0})
    checkpoints = Checkpoints(run, Path(output))
    try:
        said = checkpoints.resume(state)
    except CheckpointError as error:
        return {"error": str(error)}
    advance(run, state, num_steps)
    checkpoints.save(state)
    return {"said": said, "step": state.step, "parameters": gather_parameters(run, state)}


def test_a_damaged_checkpoint_is_passed_over(ranks, tmp_path: Path):
    output = str(tmp_path)
    straight = [ranks(2, go, output, wish) for wish in ("none", "auto", "auto")]
    steps = checkpoint.find(tmp_path / "checkpoints")
    shard = next(steps[2].glob("rank-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for found in ranks(2, look, output):
        assert found["step"] == 2
        assert re.search(rf"^WARNING: passed over: .*{shard.name} was altered", found["said"])
        assert found["said"].splitlines()[-1].startswith(f"resumed from {steps[1]} at step 2")
    parts = [found["parameters"] for found in ranks(2, look, output)]
    expected = assemble_whole([found["parameters"] for found in straight[1]])
    assert all(values.equal(expected[name]) for name, values in assemble_whole(parts).items())
    for path in steps[:2]:
        (path / "manifest.json").write_text("{}")
    for found in ranks(2, look, output):
        assert found["error"].startswith(f"no checkpoint in {tmp_path}/checkpoints is sound")
        assert found["error"].count("WARNING") == 3


def look(output: str) -> dict[str, Any]:
    run, state = start("2x1x1", **CASE | {"output": output, "resume": "auto"})
    try:
        said = Checkpoints(run, Path(output)).resume(state)
    except CheckpointError as error:
        return {"error": str(error)}
    return {"said": said, "step": state.step, "parameters": gather_parameters(run, state)}


def full_disk(output: str) -> dict[str, Any]:
    """The second of three saves fails on rank 1."""
    run, state = start("2x1x1", **CASE | {"output": output})
    checkpoints = Checkpoints(run, Path(output))
    honest, said = sys.modules["parallax.checkpoint.save"].write_shard, []

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    for number in range(3):
        advance(run, state, 1)
        if number == 1 and run.mesh.rank == 1:
            sys.modules["parallax.checkpoint.save"].write_shard = full
        said.append(checkpoints.save_or_warn(state, last=False))
        if number == 1:
            try:
                checkpoints.save_or_warn(state, last=True)
            except CheckpointError as error:
                said.append(f"raised {error}")
        sys.modules["parallax.checkpoint.save"].write_shard = honest
    return {"said": said, "parameters": gather_parameters(run, state)}


def test_a_full_disk_ends_no_run_but_the_last_save(ranks, tmp_path: Path):
    every = ranks(2, full_disk, str(tmp_path))
    for found in every:
        first, second, raised, third = found["said"]
        assert first.startswith("saved") and third.startswith("saved")
        assert second.startswith("WARNING") and "No space left on device" in second and "the run goes on" in second
        assert raised.startswith("raised") and "No space left on device" in raised
    names = [path.name for path in checkpoint.find(tmp_path / "checkpoints")]
    assert names == ["step-00000001", "step-00000003"]
    assert not list((tmp_path / "checkpoints").glob(".tmp-*")), "nothing is left behind"
    expected = assemble_whole([found["parameters"] for found in every])
    found = assemble_whole([found["parameters"] for found in ranks(2, look, str(tmp_path))])
    assert all(values.equal(expected[name]) for name, values in found.items())


def kept(output: str) -> None:
    run, state = start("1x1x1", **CASE | {"output": output, "checkpoint.keep": 1, "checkpoint.keep_every": 2})
    checkpoints = Checkpoints(run, Path(output))
    for _ in range(5):
        advance(run, state, 1)
        checkpoints.save(state)


def test_some_checkpoints_are_kept_for_good(ranks, tmp_path: Path):
    ranks(1, kept, str(tmp_path))
    assert [checkpoint.step_of(path) for path in checkpoint.find(tmp_path / "checkpoints")] == [2, 4, 5]
    assert (tmp_path / "checkpoints").stat().st_mode & 0o777 == 0o700
