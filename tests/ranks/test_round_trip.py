"""What any mesh saves any other mesh loads, bit for bit, and goes on with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.checkpoint.files import read_global
from parallax.checkpoint.reshard import check_hashes
from parallax.cli import main
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, gather_parameters, start, worst
from tests.ranks.test_resume import KINDS, size_of

MESHES = ("1x1x1", "2x2x2", "4x2x1", "1x4x2", "2x1x4", "1x8x1", "1x1x8", "8x1x1", "3x2x1")
# A low rate: Adam divides by small moments, and after five steps at 0.01 rounding has grown to 1.5e-10.
CASE = LLAMA | TIED | {"model.kv_heads": 8, "model.qk_norm": "true", "batch.global_size": 48, "optimizer.lr": 0.001}
STEPS = 2


def options(mesh: str, turn: int) -> dict[str, Any]:
    """The pairs go through all levels of ZeRO on both sides, where there is a data axis to cut."""
    return CASE | ({"data.zero": turn % 4} if not mesh.startswith("1x") else {})


def as_saved(run: Any, state: Any, path: Path) -> bool:
    """Whether this rank's parameters and moments are what lies in a checkpoint, bit for bit."""
    manifest = checkpoint.read_manifest(path)
    count = 0
    for kind in KINDS:
        for name, boxes in gather_parameters(run, state, kind).items():
            for box, values in boxes:
                assert values.equal(read_global(manifest, f"{kind}/{name}", box)), f"{kind}/{name} {box}"
                count += 1
    return count > 0


def leave(mesh: str, turn: int, output: str) -> bool:
    run, state = start(mesh, **options(mesh, turn))
    advance(run, state, STEPS)
    return as_saved(run, state, Checkpoints(run, Path(output)).save(state))


def take_up(mesh: str, turn: int, paths: list[str]) -> list[Any]:
    """Each of these checkpoints, and three steps on from it."""
    found = []
    for index, path in enumerate(paths):
        run, state = start(mesh, **options(mesh, turn + index) | {"resume": path})
        Checkpoints(run, Path("unused")).resume(state)
        assert as_saved(run, state, Path(path)) and state.step == STEPS
        found.append(advance(run, state, 3))
    return found


def alone() -> list[Any]:
    run, state = start("1x1x1", **CASE)
    return advance(run, state, STEPS + 3)


def round_trips(ranks: Any, folder: Path, sources: tuple[str, ...], targets: tuple[str, ...]) -> None:
    expected = ranks(1, alone)[0][STEPS:]
    paths = []
    for turn, mesh in enumerate(sources):
        assert all(ranks(size_of(mesh), leave, mesh, turn, str(folder / mesh)))
        paths.append(str(folder / mesh / f"checkpoints/step-{STEPS:08d}"))
    for turn, mesh in enumerate(targets):
        for source, rows in zip(sources, ranks(size_of(mesh), take_up, mesh, turn, paths)[0], strict=True):
            assert worst(rows, expected) <= 1e-10, (source, mesh)


def test_a_sample_of_the_pairs(ranks, tmp_path: Path):
    round_trips(ranks, tmp_path, ("1x4x2", "3x2x1", "8x1x1"), ("1x1x8", "2x2x2"))


@pytest.mark.slow
def test_all_ordered_pairs(ranks, tmp_path: Path):
    round_trips(ranks, tmp_path, MESHES, MESHES)


@pytest.mark.parametrize("mesh", ["2x2x2", "1x4x1"])
def test_resharding_writes_what_that_mesh_would_have_saved(ranks, tmp_path: Path, capsys, mesh: str):
    """The same boxes in the same files; the numbers are those of the one that is cut anew."""
    name = f"checkpoints/step-{STEPS:08d}"
    assert all(ranks(1, leave, "1x1x1", 0, str(tmp_path / "one")))
    assert all(ranks(size_of(mesh), leave, mesh, 0, str(tmp_path / "many")))
    assert main(["checkpoint", "reshard", str(tmp_path / "one" / name), "--mesh", mesh, str(tmp_path / "new")]) == 0
    new, many, one = (checkpoint.read_manifest(tmp_path / who / name) for who in ("new", "many", "one"))
    check_hashes(new)

    def cut(manifest: Any) -> Any:
        return {n: (t.dtype, sorted((b.box, b.file) for b in t.boxes)) for n, t in manifest.tensors.items()}

    assert cut(new) == cut(many) and len(new.files) == size_of(mesh)
    assert new.state["mesh"] == mesh and new.step == STEPS
    for tensor, saved in one.tensors.items():
        everything = tuple((0, size) for size in saved.global_shape)
        assert read_global(new, tensor, everything).equal(read_global(one, tensor, everything)), tensor
    expected = ranks(1, alone)[0][STEPS:]
    rows = ranks(size_of(mesh), take_up, mesh, 0, [str(tmp_path / "new" / name)])[0][0]
    assert worst(rows, expected) <= 1e-10
    capsys.readouterr()
    assert main(["checkpoint", "reshard", str(tmp_path / "one" / name), "--mesh", mesh, str(tmp_path / "new")]) == 2
    assert "never overwritten" in capsys.readouterr().err
