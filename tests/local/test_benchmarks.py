"""What the benchmarks are told and cannot read is one line and exit code 2, before anything is measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MISTAKES = [
    ("startup.py round=3", "there is no argument round=3; did you mean rounds?"),
    ("startup.py mesh=2x2", "mesh=2x2: expected data x tensor x pipeline"),
    ("kernels.py foo=1", "there is no argument foo=1; there are model=, batch=, dtype=, append="),
    ("kernels.py model=2B", "model=2B: 2B is none of tiny, 124M"),
    ("gpu.py steps=x", "steps=x: expected an integer of at least 1"),
    ("gpu.py dtype=bf16", "dtype=bf16: bf16 is none of float32"),
    ("training.py mesh=foo", "mesh=foo: expected data x tensor x pipeline"),
    ("training.py peers=native,fdsp", "fdsp is none of native, fsdp"),
    ("training.py +optimizer.lr=fast", "+optimizer.lr=fast: expected a finite number"),
    ("training.py +num_layers=3", "unknown key num_layers; did you mean model.layers"),
    ("training.py rounds", "rounds: expected an integer of at least 1"),
    ("memory.py sp=maybe", "sp=maybe: maybe is none of false, true, both"),
    ("memory.py rounds=3", "there is no argument rounds=3"),
    ("limit.py mesh=1x1x1,", "mesh=1x1x1,: expected data x tensor x pipeline"),
    ("limit.py +foo", "there is no argument +foo"),
    ("communication.py ranks=3", "ranks=3: 3 ranks do not go in pairs"),
    ("communication.py sizes=4", "sizes=4: expected sizes as in 64K,1M"),
    ("checkpoint.py million=1", "there is no argument million=1; did you mean millions?"),
    ("checkpoint.py millions=-1", "millions=-1: expected a number above 0"),
    ("schedules.py only=zbv", "only=zbv: zbv is none of gpipe"),
    ("data.py timing", "timing is none of time, overlap, memory"),
    ("data.py memory many", "memory many: expected an integer"),
    ("data.py time 3", "time 3: time takes nothing more"),
]
PROGRAM = """
import contextlib, io, json, runpy, sys
for line in json.load(sys.stdin):
    script, *sys.argv[1:] = line.split()
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            runpy.run_path(f"benchmarks/{script}", run_name="__main__")
        except SystemExit as end:
            code = end.code
    print(json.dumps([said.getvalue(), code]), flush=True)
"""


@pytest.fixture(scope="module")
def answers() -> list[tuple[str, int]]:
    """Of one process, since most of each script's time is torch's import."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'benchmarks'}:{ROOT}"}
    lines = [arguments for arguments, _ in MISTAKES] + ["gpu.py"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(lines),
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line(answers: list[tuple[str, int]], number: int):
    said, code = answers[number]
    assert code == 2 and MISTAKES[number][1] in said and said.startswith("error: ") and said.count("\n") == 1


def test_without_a_gpu_the_one_for_gpus_says_so(answers: list[tuple[str, int]]):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert answers[-1][1] == 2 and "torch sees no GPU here" in answers[-1][0]
