"""What test_checkpoint.py and test_checkpoint_damage.py let through: order, races, and errors that must reach all."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from parallax import checkpoint
from parallax.checkpoint import Entry, files
from parallax.checkpoint.store import store_of
from parallax.errors import CheckpointError
from tests.local.exchange import alone, together
from tests.local.test_checkpoint import DTYPES, cut_rows, entries, tensor

load_file, save_file = (sys.modules[f"parallax.checkpoint.{name}"] for name in ("load", "save"))


def full(name: str, values: Tensor) -> Entry:
    return Entry(name, tuple(values.shape), tuple((0, size) for size in values.shape), values, (0,))


def small(directory: Path, step: int, **options: Any) -> Path:
    return checkpoint.save(directory, step, cut_rows(tensor((2, 2)), 1, 0), {}, alone(), **options)


def test_nine_digits_come_after_eight(tmp_path: Path):
    """As text, 100000000 sorts before 20000000."""
    for step in (100_000_000, 20_000_000):
        small(tmp_path, step)
    latest = checkpoint.latest(tmp_path)
    assert latest is not None and latest.name == "step-100000000"


def test_a_name_taken_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch):
    """An empty directory is what rename would replace without a word."""
    honest = save_file.write_shard

    def slow(path: Path, named: Any) -> Any:
        (tmp_path / "step-00000001").mkdir()
        return honest(path, named)

    monkeypatch.setattr(save_file, "write_shard", slow)
    with pytest.raises(CheckpointError, match="meanwhile"):
        small(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and not list(
        (tmp_path / "step-00000001").iterdir()
    )


def test_dtypes_of_odd_sizes_in_one_file(tmp_path: Path):
    """A tensor of 6 bytes leaves the next one unaligned: we and safetensors read it all the same."""
    values = {f"w{i}": tensor((3,), dtype, seed=i) for i, dtype in enumerate([torch.bfloat16, *DTYPES])}
    path = checkpoint.save(tmp_path, 1, [full(k, v) for k, v in values.items()], {}, alone())
    found = {name: torch.zeros_like(value) for name, value in values.items()}
    checkpoint.load(path, [full(k, v) for k, v in found.items()], alone())
    with safe_open(str(path / "rank-00000.safetensors"), framework="pt") as opened:
        for name, value in values.items():
            assert torch.equal(found[name], value) and torch.equal(opened.get_tensor(f"{name}#0:3"), value)


def test_only_the_bytes_of_the_slice_leave_the_file(tmp_path: Path, monkeypatch):
    """read_box makes no copy of the whole box: a megabyte lies there, two kilobytes are taken."""
    path = checkpoint.save(tmp_path, 1, [full("w", tensor((1024, 256)))], {}, alone())
    copied: list[int] = []
    honest = np.array

    def spy(part: Any, *args: Any, **options: Any) -> Any:
        copied.append(part.nbytes)
        return honest(part, *args, **options)

    monkeypatch.setattr(np, "array", spy)
    target = torch.zeros(2, 255)
    checkpoint.load(path, [Entry("w", (1024, 256), ((7, 9), (0, 255)), target, (0,))], alone())
    assert copied == [2040] and torch.equal(target, tensor((1024, 256))[7:9, :255])


def test_no_bit_of_the_manifest_flips_into_other_numbers(tmp_path: Path):
    """The manifest says where each box lies: a flipped offset must not load a neighbour's bytes."""
    values = {"w": tensor((12, 5)), "v": tensor((12, 5), seed=1)}
    path = checkpoint.save(tmp_path, 1, [full(k, v) for k, v in values.items()], {}, alone())
    text = (path / "manifest.json").read_bytes()
    silent = []
    for at in range(text.index(b'"tensors"'), len(text)):
        for bit in range(8):
            (path / "manifest.json").write_bytes(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
            found = {name: torch.zeros(12, 5) for name in values}
            try:
                checkpoint.load(path, [full(k, v) for k, v in found.items()], alone())
            except CheckpointError:
                continue
            if not all(torch.equal(found[name], values[name]) for name in values):
                silent.append((text[at - 12 : at + 4], bit))
    assert not silent


def test_keep_never_deletes_what_was_just_saved(tmp_path: Path):
    """A run resumed from step 100 beside an old step 200 saves 150: that is the newest, and the one it returned."""
    small(tmp_path, 200)
    assert small(tmp_path, 150, keep=1).is_dir()


@pytest.mark.parametrize("fault", ["state", "dtype"])
def test_what_cannot_be_written_is_an_error_on_every_rank(tmp_path: Path, monkeypatch, fault: str):
    """Not an exception on one rank while the other waits, nor a temporary directory left behind."""
    state = {"n": torch.ones(1)} if fault == "state" else {}
    monkeypatch.setattr("tests.local.exchange.threading.Barrier", _impatient())

    def save(x: Any) -> Path:
        whole = tensor((2, 2)).bool() if fault == "dtype" and x.rank else tensor((2, 2))
        return checkpoint.save(tmp_path, 1, cut_rows(whole, 2, x.rank), state, x)

    assert [type(error) for error in together(2, save)] == [CheckpointError] * 2
    assert not list(tmp_path.iterdir())


def _impatient() -> Any:
    import threading

    honest = threading.Barrier
    return lambda size, timeout: honest(size, timeout=1)


def test_a_dtype_that_nothing_was_saved_in_is_an_error_on_every_rank(tmp_path: Path, monkeypatch):
    path = small(tmp_path, 1)
    monkeypatch.setattr("tests.local.exchange.threading.Barrier", _impatient())
    whole = torch.zeros(2, 2)
    found = together(2, lambda x: checkpoint.load(path, cut_rows(whole.bool() if x.rank else whole, 2, x.rank), x))
    assert [type(error) for error in found] == [CheckpointError] * 2


@pytest.mark.parametrize("case", ["gap", "overlap", "empty"])
def test_what_is_saved_can_be_loaded(tmp_path: Path, case: str):
    """Boxes that load would refuse are refused by save, before older checkpoints are pruned for them."""
    whole = tensor((4, 3))
    rows = {"gap": [(0, 2)], "overlap": [(0, 3), (2, 4)], "empty": [(0, 0)]}[case]
    shape = (0, 3) if case == "empty" else (4, 3)
    try:
        path = checkpoint.save(
            tmp_path, 1, [Entry("w", shape, (r, (0, 3)), whole[slice(*r)], (0,)) for r in rows], {}, alone()
        )
    except CheckpointError:
        return
    checkpoint.load(path, [full("w", torch.zeros(shape))], alone())


def test_ranks_that_disagree_on_a_dtype_are_refused(tmp_path: Path):
    """Else the second rank's bytes are read as the first rank's dtype."""

    def save(x: Any) -> Path:
        return checkpoint.save(
            tmp_path, 1, cut_rows(tensor((4, 3)).to(torch.int32 if x.rank else torch.float32), 2, x.rank), {}, x
        )

    assert all(isinstance(error, CheckpointError) for error in together(2, save))


@pytest.mark.parametrize("locked", [False, True])
def test_a_new_directory_s_own_name_is_durable(tmp_path: Path, monkeypatch, locked: bool):
    """A first save, or the lock of a run before it, makes OUTPUT/checkpoints: OUTPUT must be synced too, and what it
    lies in, or a crash loses them all.
    """
    synced: list[str] = []
    honest = os.fsync

    def spy(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    with checkpoint.DirectoryLock(tmp_path / "run/checkpoints") if locked else contextlib.nullcontext():
        small(tmp_path / "run/checkpoints", 1)
    assert {str(tmp_path / "run/checkpoints"), str(tmp_path / "run"), str(tmp_path)} <= set(synced)


def test_a_file_is_no_directory_to_lock(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        checkpoint.DirectoryLock(tmp_path / "file")


def test_a_box_beyond_the_tensor_changes_nothing(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, cut_rows(tensor((12, 5)), 1, 0), {}, alone())
    target = torch.zeros(14, 5)
    with pytest.raises(CheckpointError):
        checkpoint.load(path, [Entry("w", (12, 5), ((0, 14), (0, 5)), target, (0,))], alone())
    assert not target.any()


@pytest.mark.parametrize("shape", [(1, 5, 3), (1, 1, 9), (4, 6, 5), (3, 40), (50,), (), (2, 1, 1, 20), (7, 2)])
def test_a_block_is_no_larger_than_it_may_be_whatever_the_shape(monkeypatch, shape: tuple[int, ...]):
    """One data rank's owed gradient is of shape (1, rows, columns): its one row was one block of 205 M elements."""
    monkeypatch.setattr(files, "BLOCK_ELEMENTS", 8)
    box = tuple((10 + dim, 10 + dim + size) for dim, size in enumerate(shape))
    seen = torch.zeros(shape)
    for part, places in files.row_blocks(box):
        assert math.prod(stop - start for start, stop in part) <= 8
        assert seen[places].shape == tuple(stop - start for start, stop in part)
        seen[places] += 1
    assert bool((seen == 1).all())
    monkeypatch.undo()
    assert [math.prod(b - a for a, b in part) for part, _ in files.row_blocks(((0, 1), (0, 50_000), (0, 4096)))][
        0
    ] <= 1 << 22


@pytest.mark.parametrize("where", ["path", "url"])
def test_long_rows_are_read_in_parts(tmp_path: Path, monkeypatch, where: str):
    """Each part by what lies in the file, and not the whole row again and again."""
    monkeypatch.setattr(files, "BLOCK_ELEMENTS", 16)
    whole = tensor((2, 6, 10))
    folder = tmp_path / "c" if where == "path" else checkpoint.place(f"memory://long/{tmp_path.name}")
    boxes = [((0, 1), (0, 6), (0, 10)), ((1, 2), (0, 4), (0, 10)), ((1, 2), (4, 6), (0, 10))]
    path = checkpoint.save(folder, 1, entries("w", whole, boxes), {}, alone())
    manifest = checkpoint.read_manifest(path)
    asked: list[int] = []
    store = type(store_of(path))
    honest = store.read_into
    monkeypatch.setattr(store, "read_into", lambda self, p, at, out: (asked.append(len(out)), honest(self, p, at, out)))
    target = torch.zeros(2, 6, 10)
    checkpoint.load(path, [full("w", target)], alone())
    assert torch.equal(target, whole) and sum(asked) == 4 * 120 and max(asked) <= 4 * 16
    for box, _ in files.row_blocks(((0, 2), (1, 5), (2, 9))):
        cut = tuple(slice(a, b) for a, b in box)
        assert torch.equal(files.read_global(manifest, "w", box), whole[cut])
