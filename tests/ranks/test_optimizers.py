"""Every optimizer on every mesh: the numbers of one rank, whatever is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.cases import GPT2, LLAMA, TIED, advance, assemble_whole, fit_kv_heads, gather_parameters, start, train, worst

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer.name": "sgd", "optimizer.momentum": 0.9, "optimizer.lr": 0.1},
    "lion": {"optimizer.name": "lion", "optimizer.lr": 1e-3},
    "muon": {"optimizer.name": "muon", "optimizer.lr": 1e-2},
    "adamw": {"optimizer.no_decay": "*embedding*,head.*,layers.2.*"},
}
LEVELS: dict[str, dict[str, Any]] = {str(z): {"data.zero": z} for z in (0, 1, 2, 3)}
SP = {"tensor.sequence_parallel": "true"}
FEW = {"model.layers": 4}


def size_of(mesh: str) -> int:
    return math.prod(map(int, mesh.split("x")))


def train_each(mesh: str, changes: dict[str, Any], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: train(mesh, changes | option) for name, option in options.items()}


@pytest.mark.parametrize("mesh", ["2x2x1", "3x1x2", "1x4x1"])
def test_the_mesh_does_not_show(ranks, mesh: str):
    changes = fit_kv_heads(LLAMA | TIED | SP, int(mesh.split("x")[1])) | FEW
    options = {
        f"{name} {z}": optimizer | level
        for name, optimizer in OPTIMIZERS.items()
        for z, level in LEVELS.items()
        if mesh[0] != "1" or z == "0"
    }
    alone = {name: train("1x1x1", changes | optimizer) for name, optimizer in OPTIMIZERS.items()}
    for rows in ranks(size_of(mesh), train_each, mesh, changes, options):
        differences = {name: worst(rows[name], alone[name.split()[0]]) for name in options}
        assert max(differences.values()) <= 1e-10, differences


def final(mesh: str, changes: dict[str, Any], kinds: tuple[str, ...], num_steps: int = 3) -> dict[str, Any]:
    run, state = start(mesh, **changes)
    advance(run, state, num_steps)
    return {kind: gather_parameters(run, state, kind) for kind in kinds}


def final_each(mesh: str, changes: dict[str, Any], kinds: tuple[str, ...]) -> dict[str, Any]:
    return {name: final(mesh, changes | level, kinds) for name, level in LEVELS.items()}


@pytest.mark.parametrize("optimizer", [{"optimizer.state_dtype": "bfloat16"}, OPTIMIZERS["muon"]], ids=["bf16", "muon"])
def test_every_level_is_copies_bit_for_bit(ranks, optimizer: dict[str, Any]):
    """Rounding by chance too: by what an element is, not by where it lies. Replicas agree in `assemble_whole`."""
    changes = GPT2 | TIED | SP | {"dtype": "float32"} | optimizer
    kinds = ("parameters", "exp_avg", "exp_avg_sq")
    parts = ranks(8, final_each, "2x2x2", changes, kinds)
    for kind in kinds:
        copies = assemble_whole([part["0"][kind] for part in parts])
        for name in LEVELS:
            found = assemble_whole([part[name][kind] for part in parts])
            assert found.keys() == copies.keys()
            assert all(values.equal(copies[key]) for key, values in found.items()), (name, kind)


def go(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str) -> Any:
    from parallax.resume import Checkpoints

    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    rows = advance(run, state, num_steps)
    checkpoints.save(state)
    return rows


@pytest.mark.parametrize("optimizer", ["muon", "bf16"])
def test_a_resumed_run_is_the_same_run(ranks, tmp_path: Path, optimizer: str):
    changes = LLAMA | TIED | FEW | {"dtype": "float32", "data.zero": 2}
    changes |= OPTIMIZERS.get(optimizer, {"optimizer.state_dtype": "bfloat16"})
    straight = ranks(4, go, "2x2x1", changes, str(tmp_path / "a"), 4, "none")[0]
    first = ranks(4, go, "2x2x1", changes, str(tmp_path / "b"), 2, "none")[0]
    second = ranks(4, go, "2x2x1", changes, str(tmp_path / "b"), 2, "auto")[0]
    assert first + second == straight
    elsewhere = ranks(2, go, "1x1x2", changes | {"data.zero": 0}, str(tmp_path / "b"), 1, "auto")[0]
    assert math.isfinite(elsewhere[0][0])
