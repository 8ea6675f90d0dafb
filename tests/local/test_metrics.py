"""The step log: one line from one rank, the same numbers in full precision on disk."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from pathlib import Path

import torch

from parallax.memory import format_bytes
from parallax.mesh import init_mesh
from parallax.metrics import Metrics, format_duration, peak_flops
from parallax.step import StepResult

MESH = init_mesh("1x1x1", device_type="cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def result(step: int) -> StepResult:
    return StepResult(step=step, loss=2.345678901234567, grad_norm=0.98765432101, lr=3e-4, tokens=4096)


def make(output: Path | None, clock: Clock, stream: io.StringIO, rank: int = 0, log_every: int = 1) -> Metrics:
    mesh = dataclasses.replace(MESH, rank=rank)
    options = {"num_steps": 10, "flops_per_token": 1e6, "dtype": torch.float32, "log_every": log_every}
    return Metrics(mesh, output, clock=clock, stream=stream, **options)


def test_a_step_is_one_line_with_every_column(tmp_path: Path):
    clock, stream = Clock(), io.StringIO()
    metrics = make(tmp_path, clock, stream)
    clock.now += 0.5
    metrics.record(result(1))
    clock.now += 2.0
    metrics.record(result(2), val_loss=1.5)
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"step  1/10 \| loss 2\.3457 \| grad_norm 0\.9877 \| lr 3\.00e-04 \| 8,192 tokens/s \| 500 ms \| "
        r"memory [\d.]+ [MG]B \| MFU n/a \| ETA \d+s",
        first,
    )
    assert "2,048 tokens/s | 2000 ms" in second and second.endswith("ETA 16s | val_loss 1.5000")


def test_the_file_has_full_precision(tmp_path: Path):
    clock = Clock()
    metrics = make(tmp_path / "new", clock, io.StringIO())
    clock.now += 0.5
    metrics.record(result(1))
    metrics.close()
    again = make(tmp_path / "new", clock, io.StringIO())
    clock.now += 0.25
    again.record(result(2))
    rows = [json.loads(line) for line in (tmp_path / "new/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2], "a resumed run goes on in the same file"
    row = rows[0]
    assert (row["loss"], row["grad_norm"], row["lr"], row["tokens"]) == (2.345678901234567, 0.98765432101, 3e-4, 4096)
    assert (row["step_s"], row["tokens_per_s"], row["mfu"]) == (0.5, 8192.0, None)
    assert row["peak_memory_bytes"] > 1e7


def test_validation_and_checkpoints_are_not_step_time(tmp_path: Path):
    clock = Clock()
    metrics = make(tmp_path, clock, io.StringIO())
    clock.now += 1.0
    metrics.lap()
    clock.now += 30.0  # validation
    metrics.record(result(1))
    clock.now += 30.0  # checkpoint
    metrics.resume()
    clock.now += 2.0
    metrics.lap()
    metrics.record(result(2))
    times = [json.loads(line)["step_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times == [1.0, 2.0]


def test_other_ranks_say_and_write_nothing(tmp_path: Path):
    stream = io.StringIO()
    metrics = make(tmp_path / "x", Clock(), stream, rank=1)
    metrics.say("hello")
    metrics.record(result(1))
    assert not stream.getvalue() and not (tmp_path / "x").exists()


def test_log_every_thins_the_lines_but_not_the_file(tmp_path: Path):
    stream, clock = io.StringIO(), Clock()
    metrics = make(tmp_path, clock, stream, log_every=4)
    for step in range(1, 11):
        clock.now += 1
        metrics.record(result(step))
    shown = re.findall(r"step +(\d+)/10", stream.getvalue())
    assert shown == ["1", "4", "8", "10"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10


def test_units():
    assert [format_bytes(n) for n in (12, 3_400, 387_000_000, 2.5e12)] == ["12 B", "3.4 KB", "387 MB", "2.5 TB"]
    assert [format_bytes(n) for n in (999_600, 999, 5e15)] == ["1 MB", "999 B", "5,000 TB"]
    assert [format_duration(s) for s in (0.4, 59, 61, 3600, 7325)] == ["0s", "59s", "1m01s", "1h00m", "2h02m"]
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_validation_is_not_charged_to_the_next_step(tmp_path: Path):
    clock = Clock()
    metrics = make(tmp_path, clock, io.StringIO())
    clock.now += 1.0
    metrics.lap()
    clock.now += 30.0
    metrics.record(result(1))
    clock.now += 2.0
    metrics.record(result(2))
    times = [json.loads(line)["step_s"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert times == [1.0, 2.0]


def test_a_slow_first_step_is_not_in_the_eta():
    clock, stream = Clock(), io.StringIO()
    metrics = make(None, clock, stream)
    for step, seconds in ((1, 100.0), (2, 1.0)):
        clock.now += seconds
        metrics.record(result(step))
    assert stream.getvalue().splitlines()[1].endswith("ETA 8s")


def test_what_is_not_finite_is_null_in_the_file(tmp_path: Path):
    metrics = make(tmp_path, Clock(), io.StringIO())
    metrics.record(result(1), val_loss=float("nan"))
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=None)["val_loss"] is None
