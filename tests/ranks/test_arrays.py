"""Arrays of every kind that NumPy has: averaged, or refused with what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh


def kinds(shared: str) -> dict[str, Any]:
    import os

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
