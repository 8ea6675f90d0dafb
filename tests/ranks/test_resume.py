"""A resumed run is an uninterrupted one: bit for bit on one mesh, to rounding on another."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.errors import CheckpointError
from parallax.resume import Checkpoints
from tests.cases import GPT2, LLAMA, SEQUENCE_PARALLEL, TIED, advance, assemble_whole, gather_parameters, start, worst

KINDS = ("parameters", "exp_avg", "exp_avg_sq")
FEW = {"model.layers": 3}
WHAT = GPT2 | TIED | SEQUENCE_PARALLEL | FEW | {"model.dropout": 0.1, "optimizer.warmup_steps": 4}
OTHER = LLAMA | FEW | {"model.kv_heads": 2, "batch.num_microbatches": 3}


def size_of(mesh: str) -> int:
    return math.prod(map(int, mesh.split("x")))


def go(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str = "none", save: bool = True) -> Any:
    """Resume as wished, advance, save. Returns the rows, and this rank's boxes before and after."""
    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    begun = state.step, state.tokens
    before = {kind: gather_parameters(run, state, kind) for kind in KINDS}
    rows = advance(run, state, num_steps)
    after = {kind: gather_parameters(run, state, kind) for kind in KINDS}
    if save:
        checkpoints.save(state)
    return {"rows": rows, "begun": begun, "before": before, "after": after, "tokens": state.tokens}


def whole(every: list[Any], when: str) -> dict[str, Any]:
    return {kind: assemble_whole([found[when][kind] for found in every]) for kind in KINDS}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    for kind in KINDS:
        assert left[kind].keys() == right[kind].keys()
        for name, values in left[kind].items():
            assert values.equal(right[kind][name]), f"{kind}/{name}"


@pytest.mark.parametrize(("dtype", "mesh"), [("float32", "2x2x2"), ("bfloat16", "1x2x1")])
def test_three_and_three_steps_are_six_bit_for_bit(ranks, tmp_path: Path, dtype: str, mesh: str):
    changes, size = WHAT | {"dtype": dtype}, size_of(mesh)
    straight = ranks(size, go, mesh, changes, str(tmp_path / "a"), 6)
    first = ranks(size, go, mesh, changes, str(tmp_path / "b"), 3)
    second = ranks(size, go, mesh, changes, str(tmp_path / "b"), 3, "auto")
    assert first[0]["rows"] + second[0]["rows"] == straight[0]["rows"]
    assert second[0]["begun"] == (3, first[0]["tokens"]) and second[0]["tokens"] == straight[0]["tokens"]
    assert_equal(whole(first, "after"), whole(second, "before"))
    assert_equal(whole(straight, "after"), whole(second, "after"))
    names = [path.name for path in checkpoint.find(tmp_path / "b/checkpoints")]
    assert names == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(
    ("changes", "meshes"),
    [(WHAT, ["2x2x2", "1x1x1", "4x2x1", "1x4x2", "2x2x2"]), (OTHER, ["2x2x2", "1x4x1", "1x2x3"])],
    ids=["gpt2-tied-sp-dropout", "llama-gqa"],
)
def test_another_mesh_takes_up_the_same_run(ranks, tmp_path: Path, changes: dict[str, Any], meshes: list[str]):
    """Each mesh goes on from what the one before it saved."""
    alone = ranks(1, go, "1x1x1", changes, str(tmp_path / "alone"), 2 * len(meshes))[0]["rows"]
    rows: list[Any] = []
    before: list[Any] = []
    for mesh in meshes:
        found = ranks(size_of(mesh), go, mesh, changes, str(tmp_path / "run"), 2, "auto")
        if before:
            assert_equal(whole(before, "after"), whole(found, "before"))
        before = found
        rows += found[0]["rows"]
        assert worst(rows, alone[: len(rows)]) <= 1e-10, mesh


def fail(mesh: str, changes: dict[str, Any], output: str, wish: str) -> str:
    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    before = gather_parameters(run, state)
    try:
        Checkpoints(run, Path(output)).resume(state)
    except CheckpointError as error:
        after = gather_parameters(run, state)
        same = all(a[1].equal(b[1]) for name in before for a, b in zip(before[name], after[name], strict=True))
        assert same and state.step == 0, "a refused checkpoint changes nothing"
        return str(error)
    return ""


def test_a_damaged_or_foreign_checkpoint_is_refused_on_every_rank(ranks, tmp_path: Path):
    output = str(tmp_path / "run")
    ranks(4, go, "1x2x2", OTHER, output, 1)
    path = tmp_path / "run/checkpoints/step-00000001"
    for changes, text in (
        ({"seed": 1}, "seed was 1234, is 1"),
        ({"model.hidden": 96}, "another model .model.hidden was 48, is 96"),
        ({"model.tie_embeddings": "true"}, "another model .model.tie_embeddings was False, is True"),
        ({"dtype": "float32"}, "as F64, this run wants F32"),
        ({"batch.global_size": 12}, "batch.global_size was 24, is 12"),
    ):
        answers = ranks(4, fail, "2x1x2", OTHER | changes, output, str(path))
        for answer in answers:
            assert re.search(text, answer), (changes, answer)
    shard = sorted(path.glob("*.safetensors"))[-1]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    for answer in ranks(4, fail, "2x1x2", OTHER, output, "auto"):
        assert shard.name in answer and "altered" in answer
    shard.write_bytes(data[:-8])
    for answer in ranks(4, fail, "2x1x2", OTHER, output, "auto"):
        assert shard.name in answer and "truncated" in answer


def written(mesh: str, changes: dict[str, Any], output: str) -> int:
    """Bytes of tensors in the shard files of one checkpoint."""
    go(mesh, changes, output, 1)
    total = 0
    for path in Path(output).rglob("*.safetensors"):
        with open(path, "rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def test_replicas_are_written_once(ranks, tmp_path: Path):
    """Parameters and two moments in float64: no mesh writes a byte more."""
    sizes = {
        mesh: max(ranks(size_of(mesh), written, mesh, OTHER, str(tmp_path / mesh)))
        for mesh in ("1x1x1", "2x2x1", "1x1x3")
    }
    assert set(sizes.values()) == {3 * 8 * num_parameters()}


def num_parameters() -> int:
    run, _ = start("1x1x1", **OTHER)
    return run.plan.num_parameters
