"""Arrays of every kind that NumPy has: averaged, or refused with what to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh


def kinds(shared: str) -> dict[str, Any]:
    os.environ["PARALLAX_SHARED_MEMORY"] = shared
    mesh = init_mesh("2x1x1", device_type="cpu")
    rank, reduce = mesh.rank, parallax.allreduce
    grid = np.arange(6.0).reshape(2, 3)
    found = {
        "0-d": reduce(np.array(1.0 + rank), mesh),
        "0-d int": reduce(np.array(3 + rank), mesh, "sum"),
        "transposed": reduce(grid.T, mesh),
        "fortran": reduce(np.asfortranarray(grid), mesh),
        "reversed": reduce(np.arange(4.0)[::-1], mesh),
        "big endian": reduce(np.arange(4).astype(">f4"), mesh),
        "half": reduce(np.array([40000.0, 1.0], np.float16), mesh),
        "bool": reduce(np.array([bool(rank), False]), mesh, "sum"),
        "complex": reduce(np.array([1 + 2j * rank]), mesh),
        "scalar": reduce(np.int32(3), mesh, "sum"),
    }
    for name in ("int16", "uint16", "uint32", "uint64"):
        found[name] = reduce(np.array([1, 200 + rank], name), mesh, "sum")
    found["gathered"] = parallax.allgather(np.array([rank], np.uint16), mesh)
    found["source"] = parallax.broadcast(np.array([7 * rank], np.uint64), mesh, source=1)
    return found


@pytest.mark.parametrize("shared", ["0", "1"])
def test_numpy_arrays_of_every_layout_and_dtype(ranks, shared: str):
    grid = np.arange(6.0).reshape(2, 3)
    expected = {
        "0-d": np.array(1.5),
        "0-d int": np.array(7),
        "transposed": grid.T,
        "fortran": grid,
        "reversed": np.arange(4.0)[::-1],
        "big endian": np.arange(4, dtype=np.float32),
        "half": np.array([40000.0, 1.0], np.float16),
        "bool": np.array([True, False]),
        "complex": np.array([1 + 1j]),
        "scalar": np.int32(6),
        "int16": np.array([2, 401], np.int16),
        "uint16": np.array([2, 401], np.uint16),
        "uint32": np.array([2, 401], np.uint32),
        "uint64": np.array([2, 401], np.uint64),
        "gathered": np.array([0, 1], np.uint16),
        "source": np.array([7], np.uint64),
    }
    for found in ranks(2, kinds, shared):
        for name, values in expected.items():
            assert type(found[name]) is type(values) and found[name].dtype == values.dtype, name
            assert found[name].shape == values.shape and (found[name] == values).all(), name


@pytest.mark.parametrize(
    ("array", "op", "text"),
    [
        (np.array(["a"]), "sum", "array of <U1 cannot be sent; convert it"),
        (np.ones(2, np.longdouble), "sum", "cannot be sent; convert it"),
        (np.zeros(2, [("a", "f4")]), "sum", "cannot be sent; convert it"),
        (np.array([1j]), "max", "no order for torch.complex128"),
        (np.array([1], np.uint64), "max", "no order for torch.uint64"),
        (np.ma.masked_array([1.0, 2.0], [0, 1]), "sum", "array.filled"),
    ],
)
def test_an_array_that_cannot_be_sent_is_refused(array: np.ndarray, op: str, text: str):
    with pytest.raises(ConfigError, match=text):
        parallax.allreduce(array, init_mesh("1x1x1", device_type="cpu"), op)


DIFFERENT: dict[str, Callable[[Any, int], Any]] = {
    "shape": lambda mesh, rank: parallax.allreduce(np.ones((2, 3) if rank == 0 else (3, 2)), mesh, "sum"),
    "size": lambda mesh, rank: parallax.allreduce(np.ones(3 + rank), mesh, "sum"),
    "dtype": lambda mesh, rank: parallax.allreduce(np.ones(4, np.int32 if rank else np.float32), mesh, "sum"),
    "carried": lambda mesh, rank: parallax.allreduce(np.ones(4, np.float16 if rank else np.float32), mesh),
    "op": lambda mesh, rank: parallax.allreduce(np.ones(2), mesh, "sum" if rank else "max"),
    "call": lambda mesh, rank: (parallax.allgather if rank else parallax.allreduce)(np.ones(2), mesh),
    "gathered": lambda mesh, rank: parallax.allgather(np.ones((1 + rank, 2)), mesh),
    "sent size": lambda mesh, rank: parallax.broadcast(np.ones(2 + rank), mesh),
    "sent dtype": lambda mesh, rank: parallax.broadcast(np.ones(2, np.int32 if rank else np.float32), mesh),
    "source": lambda mesh, rank: parallax.broadcast(np.ones(2), mesh, rank),
    "one has none": lambda mesh, rank: parallax.allreduce("x" if rank else np.ones(2), mesh),
    "no source": lambda mesh, rank: parallax.broadcast(np.ones(2), mesh, 0.5),  # type: ignore[arg-type]
}


def disagree(shared: str) -> dict[str, Any]:
    os.environ["PARALLAX_SHARED_MEMORY"] = shared
    mesh = init_mesh("2x1x1", device_type="cpu")
    found = {}
    for name, call in DIFFERENT.items():
        with pytest.raises(ConfigError) as error:
            call(mesh, mesh.rank)
        found[name] = str(error.value)
    mesh.data.traffic.clear()
    parallax.allreduce(np.ones(4), mesh)
    return found | {"traffic": dict(mesh.data.traffic)}


@pytest.mark.parametrize("shared", ["0", "1"])
def test_ranks_that_give_different_arrays_hear_the_same_error(ranks, shared: str):
    first, second = ranks(2, disagree, shared)
    assert first == second
    assert "rank 0: allreduce (sum) of float64 (2, 3); rank 1: allreduce (sum) of float64 (3, 2)" in first["shape"]
    assert "rank 1: str is no array" in first["one has none"]
    assert first["no source"].startswith("source=0.5 is no rank")
    assert first["traffic"] == {"all_gather": 520, "all_reduce": 32}, "what the docstring says"
    for name in DIFFERENT.keys() - {"no source"}:
        assert first[name].startswith("all ranks must make the same call"), name


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (torch.eye(2).to_sparse(), "of layout torch.sparse_coo cannot be sent; give a dense one"),
        (torch.zeros(2, device="meta"), "on the meta device cannot be sent"),
    ],
)
def test_a_tensor_without_values_in_order_is_refused(array: torch.Tensor, text: str):
    mesh = init_mesh("1x1x1", device_type="cpu")
    with pytest.raises(ConfigError, match=text):
        parallax.allreduce(array, mesh)
    with pytest.raises(ConfigError, match="over=None is no mesh"):
        parallax.allreduce(np.ones(2), None)  # type: ignore[arg-type]
