"""`parallax checkpoint` as a user calls it: tables, JSON, exit codes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax import checkpoint
from parallax.checkpoint import Entry, files
from parallax.cli import main
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, start
from tests.local.exchange import alone
from tests.local.test_checkpoint_damage import edit


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


def test_ls_calls_one_of_a_newer_version_no_damage(saved: Path, capsys):
    edit(checkpoint.find(saved / "checkpoints")[-1], lambda manifest: manifest.update(version=2))
    code, out = answer(capsys, "ls", saved)
    assert code == 1 and "install the parallax that wrote it" in out and "DAMAGED" not in out


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
    return files.read_global(manifest, name, tuple((0, size) for size in shape))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "takes one of ls, show, verify, diff, prune, reshard, export, and got nothing"),
        (["lst"], "and got lst; did you mean ls?"),
        (["--jsn", "ls", "RUN"], "and got --jsn; did you mean --json?"),
        (["ls", "RUN", "--jsn"], "--jsn is no option of ls; did you mean --json?"),
        (["show", "--foo"], "--foo is no option of show; there is --json"),
        (["verify", "--foo"], "--foo is no option of verify"),
        (["verify", "RUN/checkpoints/step-00000001", "RUN/nowhere"], "nowhere is no directory; give a checkpoint"),
        (["diff", "RUN", "RUN", "--jsonn"], "--jsonn is no option of diff; did you mean --json?"),
        (["diff", "RUN"], "diff takes two checkpoints, got 1"),
        (["ls", "RUN/nowhere"], "is no directory; give a run's output"),
        (["prune", "RUN", "keep=1", "--dry-run"], "--dry-run is no option of prune; there is --json"),
        (["prune", "RUN"], "prune needs keep=K"),
        (["prune", "RUN", "kep=5"], "prune has no kep; did you mean keep?"),
        (["prune", "RUN", "foo=5"], "prune has no foo; it takes keep=K and keep_every=N"),
        (["prune", "RUN", "keep=x"], "keep=x: expected an integer of at least 1"),
        (["prune", "RUN", "keep=0"], "keep=0: expected an integer of at least 1"),
        (["prune", "RUN", "keep=1", "keep_every=-2"], "keep_every=-2: expected an integer of at least 0"),
        (["prune", "RUN", "keep=1", "keep=2"], "keep is given twice"),
        (["prune", "keep=1"], "expected one run, got 0"),
        (["reshard", "RUN", "--msh", "1x1x1", "OUT"], "--msh is no option of reshard; did you mean --mesh?"),
        (["reshard", "RUN", "OUT", "--mesh"], "--mesh has no value"),
        (["reshard", "RUN", "OUT", "mesh=1x1x1"], "reshard takes the mesh as --mesh 1x1x1"),
        (["reshard", "RUN", "OUT"], "reshard takes CHECKPOINT --mesh MESH OUT"),
    ],
)
def test_a_mistake_is_named_and_touches_nothing(saved: Path, capsys, words: list[str], message: str):
    assert main(["checkpoint", *(word.replace("RUN", str(saved)) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out
    assert len(checkpoint.find(saved / "checkpoints")) == 3


def test_prune(saved: Path, capsys):
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


def test_damage_is_1_and_a_mistake_2_for_every_command(saved: Path, tmp_path: Path, capsys):
    sound, damaged, _ = checkpoint.find(saved / "checkpoints")
    commands: list[list[object]] = [
        ["show", damaged],
        ["diff", sound, damaged],
        ["verify", damaged],
        ["export", damaged, "--to", "hf", tmp_path / "hf"],
        ["reshard", damaged, "--mesh", "1x1x1", tmp_path / "other"],
    ]
    damage(damaged)  # which only the hashes show
    assert [answer(capsys, *words)[0] for words in commands[2:]] == [1, 1, 1]
    shard = next(damaged.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    assert [answer(capsys, *words)[0] for words in commands] == [1, 1, 1, 1, 1]
    assert answer(capsys, "show", saved / "nowhere")[0] == 2
    assert answer(capsys, "diff", sound)[0] == 2


def one(folder: Path, values: torch.Tensor) -> Path:
    box = tuple((0, size) for size in values.shape)
    return checkpoint.save(folder, 1, [Entry("w", tuple(values.shape), box, values, (0,))], {}, alone())


def test_diff_compares_bits_and_writes_json(tmp_path: Path, capsys):
    """0.0 equals -0.0 and NaN equals nothing: neither is what `bit for bit` means. Infinity is no JSON."""
    zero, nan = torch.zeros(3, 4), torch.full((3, 4), math.nan)
    paths = [one(tmp_path / name, v) for name, v in (("a", zero), ("b", -zero), ("c", nan), ("d", zero + 1))]
    plus, minus, odd, ones = paths
    assert answer(capsys, "diff", odd, odd) == (0, "the same tensors, bit for bit\n")
    assert answer(capsys, "diff", plus, minus) == (1, "w  12 elements, at most 0 (0.0e+00)\n")

    def refuse(text: str) -> Any:
        raise AssertionError(f"{text} is no JSON")

    for other, most in ((odd, None), (ones, 1.0)):
        code, out = answer(capsys, "diff", plus, other, "--json")
        row = json.loads(out, parse_constant=refuse)["different"]["w"]
        assert code == 1 and row == {"elements": 12, "dtypes": ["F32", "F32"], "max_abs": most, "relative": None}


def test_nothing_that_a_terminal_would_obey_is_printed(saved: Path, capsys):
    path = checkpoint.find(saved / "checkpoints")[0]
    edit(path, lambda manifest: manifest["state"].update({"mesh": "\x1b[31m", "a\x1b]0;title\x07": 1}))
    (path / "\x1b[2J").write_text("")
    assert main(["checkpoint", "show", str(path)]) == 1
    assert "\\x1b[2J is not in the manifest" in capsys.readouterr().err
    (path / "\x1b[2J").unlink()
    for words in (["show", path], ["ls", saved]):
        code, out = answer(capsys, *words)
        assert code == 0 and "\x1b" not in out and "\\x1b[31m" in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["model"].update(layers=10**9), "tensors for 1000000000 layers"),
        (
            lambda config: config["batch"].update(global_size=10**9, num_microbatches=10**9),
            "has 1000000000 microbatches",
        ),
        (lambda config: config["pipeline"].update(schedule="/dev/zero.csv"), "a file outside of the checkpoint"),
        (lambda config: config.update(model=[]), "model is a section"),
    ],
    ids=["layers", "microbatches", "file", "list"],
)
def test_reshard_does_not_believe_a_stranger_s_configuration(saved: Path, tmp_path: Path, capsys, change, message: str):
    path = checkpoint.find(saved / "checkpoints")[0]
    edit(path, lambda manifest: change(manifest["state"]["config"]))
    begun = time.monotonic()
    assert main(["checkpoint", "reshard", str(path), "--mesh", "1x1x1", str(tmp_path / "out")]) in (1, 2)
    assert message in capsys.readouterr().err and time.monotonic() - begun < 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers=1", "cannot set model.layers=1 (it is 2); what may change with the mesh: batch.microbatch_size"),
        ("model.hidden=96", "cannot set model.hidden=96 (it is 48)"),
        ("model.rope_theta=5", "cannot set model.rope_theta=5.0 (it is"),
        ("model.norm_eps=0.1", "cannot set model.norm_eps=0.1"),
        ("optimizer.name=sgd", "cannot set optimizer.name=sgd"),
        ("corpus.sequence_length=3", "cannot set corpus.sequence_length=3"),
        ("batch.global_size=1000", "cannot set batch.global_size=1000"),
        ("steps=77", "cannot set steps=77"),
        ("model.layer=1", "unknown key model.layer; did you mean model.layers"),
    ],
)
def test_reshard_cannot_make_it_another_model(saved: Path, tmp_path: Path, capsys, override: str, message: str):
    path = checkpoint.find(saved / "checkpoints")[0]
    words = ["reshard", str(path), "--mesh", "1x1x1", str(tmp_path / "out"), override]
    assert main(["checkpoint", *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_reshard_changes_the_cut_alone(saved: Path, tmp_path: Path, capsys):
    """Padding is in no file; a key that says what is so already is no change. Every tensor is there, bit for bit."""
    path = checkpoint.find(saved / "checkpoints")[0]
    allowed = ["model.vocab_multiple=8", "model.layers=2", "pipeline.schedule=gpipe", "data.zero=1"]
    assert answer(capsys, "reshard", path, "--mesh", "1x2x1", tmp_path / "out", *allowed)[0] == 0
    there = tmp_path / "out/checkpoints" / path.name
    new = checkpoint.read_manifest(there)
    old = checkpoint.read_manifest(path)
    assert new.tensors.keys() == old.tensors.keys()
    rows = [box.box[0] for box in new.tensors["parameters/embedding.token.weight"].boxes]
    assert sorted(rows) == [(0, 56), (56, 101)], "51 without the padding"
    assert answer(capsys, "diff", path, there) == (0, "the same tensors, bit for bit\n")
    assert new.state["config"]["model"] == old.state["config"]["model"] | {"vocab_multiple": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 1}, "holds parameters/layers.1."),
        ({"layers": 3}, "has no parameters/layers.2."),
        ({"ffn": 16}, "of shape (48, 48), the model of its configuration one of (16, 48)"),
    ],
    ids=["fewer", "more", "narrower"],
)
def test_reshard_drops_no_tensor(saved: Path, tmp_path: Path, capsys, change: dict[str, int], message: str):
    """A configuration that is not the tensors' is refused: what it does not have would be kept, and be in no model."""
    path = checkpoint.find(saved / "checkpoints")[0]
    edit(path, lambda manifest: manifest["state"]["config"]["model"].update(change))
    assert main(["checkpoint", "reshard", str(path), "--mesh", "1x1x1", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "another model" in error and not list(tmp_path.glob("out/checkpoints/step*"))
