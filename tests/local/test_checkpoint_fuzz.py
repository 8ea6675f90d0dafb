"""Any bytes in place of a checkpoint's: refused in one clear error, or loaded as its manifest says; little memory."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallax import checkpoint
from parallax.checkpoint import Entry
from parallax.checkpoint.manifest import seal, unseal
from parallax.errors import CheckpointError
from tests.local.exchange import alone, together
from tests.local.test_checkpoint import tensor

DTYPES = {"w": torch.float32, "b": torch.bfloat16, "n": torch.int64}
SHAPES: dict[str, tuple[int, ...]] = {"w": (300, 500), "b": (64, 7, 3), "n": ()}
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "U8": 1}


def entries(rank: int = 0, size: int = 1) -> list[Entry]:
    """A rank's rows of each tensor; the scalar is rank 0's."""
    found = []
    for name, shape in SHAPES.items():
        whole = tensor(shape, DTYPES[name])
        if not shape and rank:
            continue
        rows = slice(rank * shape[0] // size, (rank + 1) * shape[0] // size) if shape else ()
        box = ((rows.start, rows.stop), *((0, n) for n in shape[1:])) if isinstance(rows, slice) else ()
        found.append(Entry(name, shape, box, whole[rows].clone(), (rank,)))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    return together(2, lambda x: checkpoint.save(folder, 1, entries(x.rank, 2), {"step": 1, "note": "a"}, x))[0]


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the nodes of a JSON value are."""
    yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_of(inner, (*at, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_of(inner, (*at, index))


NUMBERS = st.one_of(
    st.integers(-2, 600), st.sampled_from([1 << 31, 1 << 40, 1 << 61, 1 << 63, 1 << 70, -(1 << 63)]), st.floats()
)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        NUMBERS,
        st.text(max_size=8),
        st.sampled_from(["../x", "/etc/passwd", "rank-00001.safetensors", "F32", "F64", "BF16", "U8", "w", "\0"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def edit(data: st.DataObject, text: bytes) -> bytes:
    """Replace, remove, double or rename a random node; the seal is made anew, as somebody with ill will would."""
    manifest = json.loads(unseal(text))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(list(paths_of(manifest))[1:] or [()]))
        if not at:
            break
        parent = manifest
        for key in at[:-1]:
            parent = parent[key]
        how = data.draw(st.sampled_from(["value", "near", "remove", "double", "rename"]))
        old = parent[at[-1]]
        if how == "near" and isinstance(old, int):
            parent[at[-1]] = old + data.draw(st.integers(-20, 20))
        elif how == "remove":
            del parent[at[-1]]
        elif how == "double" and isinstance(parent, list):
            parent.append(old)
        elif how == "rename" and isinstance(parent, dict):
            parent[data.draw(st.sampled_from(["w", "b", "n", "box", "../w", "rank-00002.safetensors", ""]))] = old
        else:
            parent[at[-1]] = data.draw(VALUES)
    return seal(json.dumps(manifest).encode())


def damage(data: st.DataObject, path: Path) -> None:
    """One change of one file, or of the manifest with a new seal."""
    file = path / data.draw(st.sampled_from(["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]))
    content = bytearray(file.read_bytes())
    how = data.draw(st.sampled_from(["edit", "edit", "edit", "flip", "cut", "longer", "splice", "replace"]))
    if how == "edit":
        file, content = path / "manifest.json", bytearray(edit(data, (path / "manifest.json").read_bytes()))
    elif how == "flip":
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif how == "longer":
        content += data.draw(st.binary(min_size=1, max_size=50))
    elif how == "splice":
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=30))
    else:
        content = bytearray(data.draw(st.binary(max_size=200)))
    file.write_bytes(content)


def reference(path: Path, entry: Entry) -> torch.Tensor:
    """What the manifest says, read in the plainest way."""
    manifest = json.loads(unseal((path / "manifest.json").read_bytes()))
    for name, file in manifest["files"].items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == file["sha256"]
    found = manifest["tensors"][entry.name]
    assert tuple(found["global_shape"]) == entry.global_shape
    out = torch.full(entry.global_shape, 77).to(entry.tensor.dtype)
    for part in found["boxes"]:
        shape = [b - a for a, b in part["box"]]
        count = math.prod(shape) * SIZES[found["dtype"]]
        raw = (path / part["file"]).read_bytes()[part["offset"] : part["offset"] + count]
        values = torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).view(entry.tensor.dtype).reshape(shape)
        out[tuple(slice(a, b) for a, b in part["box"])] = values
    return out


def check(data: st.DataObject, saved: Path, folder: Path) -> None:
    path = folder / saved.name
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(saved, path)
    damage(data, path)
    targets = entries()
    for entry in targets:
        entry.tensor.fill_(77)
    size = sum(file.stat().st_size for file in path.iterdir())
    refused = False
    tracemalloc.start()
    try:
        checkpoint.load(path, targets, alone())
    except CheckpointError as error:
        refused = True
        assert saved.name in str(error), "it says which"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak <= 2 * max(size, 200_000), f"{peak} bytes for {size}"  # a traceback takes some
    for entry in targets:
        if refused:
            assert bool((entry.tensor == 77).all()), "a refused one changes nothing"
        else:
            assert entry.tensor.view(torch.uint8 if entry.global_shape else entry.tensor.dtype).equal(
                reference(path, entry).view(torch.uint8 if entry.global_shape else entry.tensor.dtype)
            )


LOOSE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@pytest.mark.parametrize("value", [None, 7, "", "A" * 64, "0" * 63, ["0" * 64]])
def test_a_file_without_a_hash_is_refused(saved: Path, tmp_path: Path, value: object):
    path = tmp_path / saved.name
    shutil.copytree(saved, path)
    manifest = json.loads(unseal((path / "manifest.json").read_bytes()))
    manifest["files"]["rank-00000.safetensors"]["sha256"] = value
    (path / "manifest.json").write_bytes(seal(json.dumps(manifest).encode()))
    with pytest.raises(CheckpointError, match="is no sha256"):
        checkpoint.load(path, entries(), alone())


@given(st.data())
@settings(max_examples=200, deadline=5000, suppress_health_check=LOOSE)
def test_two_hundred_damages(saved: Path, tmp_path: Path, data: st.DataObject):
    check(data, saved, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@given(st.data())
@settings(max_examples=5000, deadline=5000, suppress_health_check=LOOSE)
def test_five_thousand_damages(saved: Path, tmp_path: Path, data: st.DataObject):
    check(data, saved, tmp_path)
