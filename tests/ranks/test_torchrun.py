"""The recipe as a user starts it: python, torchrun, resume, mistakes, and a rank that dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
RECIPE = str(ROOT / "recipes/gpt.py")
SMALL = [
    "device=cpu",
    "model.layers=2",
    "model.hidden=32",
    "model.heads=4",
    "corpus.sequence_length=32",
    "batch.global_size=8",
    "validation.batches=1",
    "checkpoint.every=2",
    "optimizer.warmup_steps=2",
    "pipeline.split=none",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(size: int, *arguments: str, program: str = RECIPE) -> list[str]:
    if size == 1:
        return [sys.executable, program, *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(size)]
    return [*launcher, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", program, *arguments]


def run(size: int, *arguments: str, cwd: Path, program: str = RECIPE) -> subprocess.CompletedProcess[str]:
    line = command(size, *arguments, program=program)
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_python_and_torchrun_train_the_same_model_and_resume_each_other(tmp_path: Path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(4):
        text = "".join(f"line {i} of file {number}, {i * i % 97}\n" for i in range(400))
        (corpus / f"{number}.txt").write_text(text)
    options = [*SMALL, f"corpus.source={corpus}", "dtype=float64"]
    alone = run(1, *options, "output=alone", "steps=4", "optimizer.decay_steps=4", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    first = run(4, *options, "output=mesh", "steps=2", "optimizer.decay_steps=4", "mesh=1x2x2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    lines = [line for line in first.stdout.splitlines() if line.startswith("step ")]
    assert len([line for line in lines if "loss" in line]) == 2, "one line a step from one rank"
    assert "MFU n/a" in first.stdout and "mesh data=1 tensor=2 pipeline=2 (4 ranks)" in first.stdout
    on = run(
        2, *options, "output=mesh", "steps=4", "optimizer.decay_steps=4", "mesh=2x1x1", "resume=auto", cwd=tmp_path
    )
    assert on.returncode == 0, on.stderr
    assert re.search(r"resumed from mesh/checkpoints/step-00000002 at step 2 of 4", on.stdout)
    ours, theirs = rows(tmp_path / "mesh"), rows(tmp_path / "alone")
    assert [row["step"] for row in ours] == [1, 2, 3, 4]
    for row, other in zip(ours, theirs, strict=True):
        assert row["tokens"] == other["tokens"] and row["lr"] == other["lr"]
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-10)
    assert (tmp_path / "mesh/config.yaml").read_text().startswith("# mesh data=2")
    # A run that is finished has nothing to do, and says so.
    told = run(2, "config=mesh/config.yaml", "output=mesh", "resume=auto", cwd=tmp_path)
    assert told.returncode == 0 and "at step 4 of 4: nothing is left to do" in told.stdout
    done = run(1, *options, "output=mesh", "steps=3", "optimizer.decay_steps=4", "resume=auto", cwd=tmp_path)
    assert done.returncode == 0 and "at step 4 of 3" in done.stdout and len(rows(tmp_path / "mesh")) == 4
    again = run(1, *options, "output=mesh", "steps=4", cwd=tmp_path)
    assert again.returncode == 2 and "already holds mesh/checkpoints/step-00000004" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh=2x2x2"], "mesh=2x2x2 needs 8 ranks, torchrun started 2; start 8"),
        (["mesh=2x1x1", "model.layrs=3"], "did you mean model.layers"),
        (["mesh=2x1x1", "corpus.source=/nowhere/*.txt"], "corpus.source=/nowhere/.*: there is no such file"),
        (["mesh=1x1x2", "optimizer.no_decay=layers.1.attention.q.weight"], r"layers\.1\.attention.* must decay alike"),
        (
            ["mesh=2x1x1", "optimizer.no_decay=layer.1.*"],
            r"no_decay=layer\.1\.\* is no parameter's name.* such as ",
        ),
        (["mesh=1x2x1", "optimizer.lr=1e30", "steps=9"], r"the gradient norm is (nan|inf).*on_nan=skip goes on"),
    ],
)
def test_a_mistake_is_one_line_and_ends_every_rank(tmp_path: Path, arguments: list[str], message: str):
    begun = time.monotonic()
    done = run(2, *SMALL, *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert len(re.findall(r"^error: ", done.stderr, re.MULTILINE)) == 1
    assert re.search(message, done.stderr)
    assert not re.search(r'File ".*/parallax/\w+\.py"', done.stderr), "no traceback for a mistake of the user's"
    assert time.monotonic() - begun < 60


FAULTY = """
import os, sys, time
sys.path.insert(0, {folder!r})
import gpt
import parallax.step
from parallax.errors import ConfigError
honest = parallax.step._train_step

def faulty(run, state, batch, stop):
    if state.step == 1 and run.mesh.rank == 3:
        raise {error}("the disk of rank 3 is gone")
    return honest(run, state, batch, stop)

parallax.step._train_step = faulty
from parallax.launch import entrypoint
entrypoint(gpt.main)
"""


@pytest.mark.parametrize("error", ["OSError", "ConfigError"])
def test_an_exception_on_one_rank_ends_all_with_its_text_and_place(tmp_path: Path, error: str):
    """One of the user's making too, which all ranks ought to have: who has it alone says it."""
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY.format(folder=str(ROOT / "recipes"), error=error))
    begun = time.monotonic()
    done = run(4, *SMALL, "mesh=1x2x2", "steps=50", cwd=tmp_path, program=str(program))
    assert done.returncode != 0
    if error == "ConfigError":
        assert "[rank 3 of 4] error: the disk of rank 3 is gone" in done.stderr
    else:
        assert "OSError: the disk of rank 3 is gone" in done.stderr
        assert "[rank 3 pipeline1 data0 tensor1] in step 2" in done.stderr
    assert time.monotonic() - begun < 90


def children(pid: int) -> list[int]:
    """Process ids whose parent is pid, in the order of their start."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(after_name[1]) == pid:
                found.append(int(entry.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_killed_rank_ends_the_run_within_seconds(tmp_path: Path):
    line = command(4, *SMALL, "mesh=2x1x2", "steps=100000", "validation.every=0")
    process = subprocess.Popen(
        line, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        assert any(text.startswith("step") and "loss" in text for text in process.stdout)
        ranks = children(process.pid)
        assert len(ranks) == 4
        os.kill(ranks[2], signal.SIGKILL)
        begun = time.monotonic()
        rest, _ = process.communicate(timeout=60)
        assert process.returncode != 0
        assert time.monotonic() - begun < 45
        assert re.search(r"local_rank: 2|rank *: 2", rest), rest[-2000:]
    finally:
        process.kill()


def parallax(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "import sys; from parallax.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(line, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


def test_the_parity_command_compares_meshes(tmp_path: Path):
    options = [option for option in SMALL if not option.startswith(("validation", "checkpoint"))]
    done = parallax("parity", "mesh=1x1x1", "mesh=1x2x2", *options, "steps=2", "dtype=float64", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if re.match(r" +\d", line)]
    assert len(table) == 4
    assert "the same model: largest relative difference" in done.stdout
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"


def test_verify_resume_sees_no_restart(tmp_path: Path):
    options = [option for option in SMALL if not option.startswith(("validation", "checkpoint"))]
    options += ["model.dropout=0.1", "dtype=float64"]
    done = parallax("verify-resume", "mesh=2x1x1", "mesh=1x2x1", "steps=2", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same tensors, bit for bit" in done.stdout and "difference 0, bound 0" in done.stdout
    assert "restarted on mesh 1x2x1 after step 2" in done.stdout and "the restart shows nowhere" in done.stdout
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
    wrong = parallax("verify-resume", "output=here", cwd=tmp_path)
    assert wrong.returncode == 2 and "leave output=here out" in wrong.stderr
