"""The promise: the mesh is invisible in the numbers. Float64, four optimizer steps, loss and gradient norm."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest

from tests.cases import (
    VARIANTS,
    assemble_whole,
    fit_kv_heads,
    gather_parameters,
    start,
    train,
    train_all,
    worst,
)

MESHES = ["2x2x2", "4x2x1", "4x1x2", "2x1x4", "1x8x1", "1x2x4", "2x4x1", "1x4x2", "1x1x8", "3x2x1", "1x3x2"]
BOUND = 1e-10
# Each shape with sequence parallelism and without, tied and untied; a prime vocabulary, layers that no stage count
# divides, another share of ignored targets in every sample.
PARITY = {name: VARIANTS[name] for name in ("gpt2-tied-dropout", "gpt2-dropout-sp", "llama-padded", "llama-tied-sp")}


@functools.cache
def reference(name: str, kv_heads: int | None) -> list[Any]:
    """What one rank says: four steps, then the validation loss."""
    changes = VARIANTS[name] if kv_heads is None else VARIANTS[name] | {"model.kv_heads": kv_heads}
    return train("1x1x1", changes)


@pytest.mark.parametrize("mesh", MESHES)
def test_any_mesh_trains_as_one_rank(ranks, mesh: str):
    data, tensor, pipeline = map(int, mesh.split("x"))
    variants = {name: fit_kv_heads(changes, tensor) for name, changes in PARITY.items()}
    every = ranks(data * tensor * pipeline, train_all, mesh, variants)
    assert all(rows == every[0] for rows in every), "the ranks do not agree bit for bit"
    differences = {
        name: worst(every[0][name], reference(name, changes.get("model.kv_heads")))
        for name, changes in variants.items()
    }
    assert max(differences.values()) <= BOUND, differences


@pytest.mark.parametrize(("mesh", "changes"), [("1x2x2", {}), ("1x4x1", {}), ("2x2x1", {"data.zero": 3})])
def test_norms_of_queries_and_keys_know_no_mesh(ranks, mesh: str, changes: dict[str, Any]):
    """Each rank has its own heads' part of their gradient; at tensor=4 two ranks share a key head."""
    size = math.prod(map(int, mesh.split("x")))
    small = {"model.layers": 2, "batch.global_size": 8, "model.heads": 12, "model.kv_heads": 2}
    variants = {name: VARIANTS[name] | small for name in ("qwen3", "qwen3-tied-sp")}
    alone = train_all("1x1x1", variants, 2)
    rows = ranks(size, train_all, mesh, {name: kind | changes for name, kind in variants.items()}, 2)[0]
    differences = {name: worst(rows[name], alone[name]) for name in variants}
    assert max(differences.values()) <= BOUND, differences


@pytest.mark.parametrize("split", ["3,1,3", "0,7,0", "5,1,1"])
def test_an_explicit_split_changes_nothing(ranks, split: str):
    variants = {name: VARIANTS[name] for name in ("gpt2-tied", "llama")}
    with_split = {name: v | {"pipeline.split": split} for name, v in variants.items()}
    rows = ranks(3, train_all, "1x1x3", with_split)[0]
    for name in variants:
        assert rows[name] == reference(name, VARIANTS[name].get("model.kv_heads")), (
            "a pipeline equals no pipeline bit for bit"
        )


def initial(mesh: str, changes: dict[str, Any]) -> Any:
    return gather_parameters(*start(mesh, **changes))


@pytest.mark.parametrize("mesh", ["1x2x1", "2x2x2", "1x3x2", "1x8x1", "1x1x4"])
@pytest.mark.parametrize("variant", ["gpt2-tied", "llama-padded"])
def test_initial_weights_do_not_know_the_mesh(ranks, mesh: str, variant: str):
    size = math.prod(map(int, mesh.split("x")))
    changes = fit_kv_heads(VARIANTS[variant], int(mesh.split("x")[1]))
    alone = assemble_whole([initial("1x1x1", changes)])
    whole = assemble_whole(ranks(size, initial, mesh, changes))
    assert whole.keys() == alone.keys()
    for name, values in alone.items():
        assert values.equal(whole[name]), name


def test_the_norm_of_every_rank_is_the_same_bits_in_float32(ranks):
    every = ranks(8, train_all, "2x2x2", {"llama-tied-sp": VARIANTS["llama-tied-sp"] | {"dtype": "float32"}})
    assert all(rows == every[0] for rows in every)
