"""`parallax checkpoint` as a user calls it: tables, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax import checkpoint, checkpoint_command
from parallax.checkpoint import files
from parallax.cli import main
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, start


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3."""
    run, state = start("1x1x1", **LLAMA | TIED | {"dtype": "float32", "model.layers": 2, "checkpoint.keep": 0})
    checkpoints = Checkpoints(run, tmp_path)
    for _ in range(3):
        advance(run, state, 1)
        checkpoints.save(state)
    return tmp_path


def answer(capsys: Any, *words: object) -> tuple[int, str]:
    code = main(["checkpoint", *map(str, words)])
    return code, capsys.readouterr().out


def damage(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 4
    shard.write_bytes(data)


def test_ls_and_show(saved: Path, capsys):
    code, out = answer(capsys, "ls", saved)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["step", "1", "2", "3"]
    assert "data1xtensor1xpipeline1" in out or "1x1x1" in out
    path = checkpoint.find(saved / "checkpoints")[-1]
    code, out = answer(capsys, "show", path)
    assert code == 0 and out.startswith("step 3, ") and "parameters/embedding.token.weight" in out and "101x48" in out
    code, out = answer(capsys, "show", path, "--json")
    assert json.loads(out)["tensors"]["exp_avg/final_norm.weight"] == {"shape": [48], "dtype": "F32", "boxes": 1}
    (path / "manifest.json").write_text("{}")
    code, out = answer(capsys, "ls", saved)
    assert code == 1 and "DAMAGED" in out.splitlines()[-1]


def test_verify(saved: Path, capsys):
    paths = checkpoint.find(saved / "checkpoints")
    assert answer(capsys, "verify", *paths) == (0, "".join(f"{path} is sound\n" for path in paths))
    damage(paths[1])
    code, out = answer(capsys, "verify", *paths, "--json")
    problems = [row["problems"] for row in json.loads(out)]
    assert code == 1 and not problems[0] and not problems[2] and "was altered" in problems[1][0]


@pytest.mark.parametrize("block", [100, 1 << 22])
def test_diff(saved: Path, tmp_path: Path, capsys, monkeypatch, block: int):
    monkeypatch.setattr(files, "BLOCK_ELEMENTS", block)
    first, second, _ = checkpoint.find(saved / "checkpoints")
    assert answer(capsys, "diff", first, first) == (0, "the same tensors, bit for bit\n")
    code, out = answer(capsys, "diff", first, second, "--json")
    found = json.loads(out)
    assert code == 1 and not found["only"]
    one, two = (read(path, "parameters/final_norm.weight") for path in (first, second))
    row = found["different"]["parameters/final_norm.weight"]
    assert row["elements"] == int((one != two).sum()) > 0
    assert row["max_abs"] == pytest.approx(float((one - two).abs().max()), rel=1e-12)
    assert row["relative"] == pytest.approx(row["max_abs"] / float(one.abs().max()), rel=1e-12)
    run, state = start("1x1x1", **LLAMA | {"dtype": "float32", "model.layers": 2})
    Checkpoints(run, tmp_path / "other").save(state)
    code, out = answer(capsys, "diff", first, tmp_path / "other/checkpoints/step-00000000")
    lines = [line.split() for line in out.splitlines() if "only in" in line]
    assert (
        code == 1 and ["parameters/head.weight", "only", "in", f"{tmp_path}/other/checkpoints/step-00000000"] in lines
    )


def read(path: Path, name: str) -> torch.Tensor:
    manifest = checkpoint.read_manifest(path)
    shape = manifest.tensors[name].global_shape
    return checkpoint_command._read(manifest, name, tuple((0, size) for size in shape))


def test_prune_and_mistakes(saved: Path, capsys):
    for words in (
        ["prune", saved],
        ["prune", saved, "keep=0"],
        ["prune", saved, "kep=1"],
        [],
        ["lst"],
        ["diff", saved],
    ):
        assert answer(capsys, *words)[0] == 2
    assert answer(capsys, "ls", saved / "nowhere")[0] == 2
    lock = checkpoint.DirectoryLock(saved / "checkpoints")
    assert answer(capsys, "prune", saved, "keep=1")[0] == 2, "a run is writing there"
    lock.release()
    code, out = answer(capsys, "prune", saved, "keep=1", "keep_every=2")
    assert code == 0 and out.splitlines() == [f"deleted {saved}/checkpoints/step-00000001"]
    assert [checkpoint.step_of(path) for path in checkpoint.find(saved / "checkpoints")] == [2, 3]
    assert main(["checkpoint", "--help"]) == 0


def test_reshard_leaves_a_save_under_way_alone(saved: Path, tmp_path: Path, capsys):
    """Into the directory of a run that lives nothing is written, and of what others have begun nothing is deleted."""
    path = checkpoint.find(saved / "checkpoints")[0]
    out = tmp_path / "out"
    with checkpoint.DirectoryLock(out / "checkpoints"):
        assert answer(capsys, "reshard", path, "--mesh", "1x2x1", out)[0] == 2, "a run is writing there"
    under_way = out / "checkpoints/.tmp-step-00000009-0000"
    under_way.mkdir()
    assert answer(capsys, "reshard", path, "--mesh", "1x2x1", out)[0] == 0
    assert under_way.is_dir() and [checkpoint.step_of(one) for one in checkpoint.find(out / "checkpoints")] == [1]


def test_a_reader_that_has_enough_is_no_error(saved: Path):
    path = checkpoint.find(saved / "checkpoints")[0]
    program = "import sys; from parallax.cli import main; sys.exit(main())"
    line = f"{sys.executable} -c '{program}' checkpoint show {path} --json | head -c 10"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout == '{"step": 1' and done.stderr == ""
