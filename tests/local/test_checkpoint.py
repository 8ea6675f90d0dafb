"""A checkpoint is boxes of global tensors: any cut is read by any other, and nothing is ever half written."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from parallax import checkpoint
from parallax.checkpoint import Entry
from parallax.checkpoint.store import LocalStore
from parallax.errors import CheckpointError
from tests.local.exchange import Exchange, alone, together

# The package gives this name to the function.
save_file = sys.modules["parallax.checkpoint.save"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 100
    return values.to(dtype)


def grid(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """A random cut of every dim."""
    sides = []
    for size in shape:
        cuts = draw(st.lists(st.integers(1, size - 1), max_size=2, unique=True)) if size > 1 else []
        sides.append(list(itertools.pairwise([0, *sorted(cuts), size])))
    return list(itertools.product(*sides))


@st.composite
def two_cuts(draw: st.DrawFn) -> Any:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    return shape, draw(st.sampled_from(DTYPES)), grid(draw, shape), grid(draw, shape)


def entries(name: str, whole: Tensor, boxes: list[Any], rank: int = 0) -> list[Entry]:
    return [Entry(name, tuple(whole.shape), box, whole[tuple(slice(a, b) for a, b in box)], (rank,)) for box in boxes]


@given(two_cuts())
@settings(max_examples=60)
def test_any_cut_is_read_by_any_other(tmp_path_factory: pytest.TempPathFactory, case: Any):
    shape, dtype, saved, wanted = case
    whole = tensor(shape, dtype)
    path = checkpoint.save(tmp_path_factory.mktemp("c"), 1, entries("w", whole, saved), {"a": [1]}, alone())
    target = torch.zeros(shape, dtype=dtype)
    assert checkpoint.load(path, entries("w", target, wanted), alone()) == {"a": [1]}
    assert torch.equal(target, whole)


def cut_rows(whole: Tensor, size: int, rank: int) -> list[Entry]:
    step = whole.shape[0] // size
    box = ((rank * step, (rank + 1) * step), (0, whole.shape[1]))
    return [Entry("w", tuple(whole.shape), box, whole[rank * step : (rank + 1) * step], (rank,))]


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (2, 4), (4, 2), (4, 3)])
def test_ranks_write_and_read_their_own(tmp_path: Path, before: int, after: int):
    whole = tensor((12, 5))
    (path, *_) = together(before, lambda x: checkpoint.save(tmp_path, 7, cut_rows(whole, before, x.rank), {}, x))
    assert len(list(path.glob("rank-*.safetensors"))) == before
    target = torch.zeros(12, 5)
    assert together(after, lambda x: checkpoint.load(path, cut_rows(target, after, x.rank), x)) == [{}] * after
    assert torch.equal(target, whole)


def test_replicas_are_written_once_and_the_writers_are_spread(tmp_path: Path):
    whole = tensor((6, 4))
    names = [f"w{i}" for i in range(40)]
    everyone = (0, 1, 2, 3)

    def save(x: Exchange) -> Path:
        mine = [Entry(name, (6, 4), ((0, 6), (0, 4)), whole, everyone) for name in names]
        return checkpoint.save(tmp_path, 1, mine, {}, x)

    path = together(4, save)[0]
    manifest = checkpoint.read_manifest(path)
    writers = [manifest.tensors[name].boxes[0].file for name in names]
    assert all(len(manifest.tensors[name].boxes) == 1 for name in names)
    assert min(writers.count(file) for file in set(writers)) >= 3 and len(set(writers)) == 4


def test_a_reader_reads_no_more_than_its_boxes(tmp_path: Path, monkeypatch):
    whole = tensor((64, 32))
    path = checkpoint.save(tmp_path, 1, cut_rows(whole, 1, 0), {}, alone())
    asked = []
    part, into = LocalStore.read_part, LocalStore.read_into

    def spy_part(self: Any, *args: Any) -> Any:
        asked.append((found := part(self, *args)).size)
        return found

    def spy_into(self: Any, path: Path, offset: int, out: memoryview) -> None:
        asked.append(len(out) // 4)
        into(self, path, offset, out)

    monkeypatch.setattr(LocalStore, "read_part", spy_part)
    monkeypatch.setattr(LocalStore, "read_into", spy_into)
    target = torch.zeros(64, 32)
    checkpoint.load(path, entries("w", target, [((3, 5), (0, 32)), ((10, 20), (8, 16))]), alone())
    assert asked == [64, 80]
    assert torch.equal(target[3:5], whole[3:5]) and torch.equal(target[10:20, 8:16], whole[10:20, 8:16])
    assert not target[20:].any()


def test_other_tools_read_the_files(tmp_path: Path):
    whole = tensor((4, 6), torch.bfloat16)
    path = checkpoint.save(tmp_path, 1, entries("w", whole, [((0, 4), (0, 2)), ((0, 4), (2, 6))]), {}, alone())
    (file,) = path.glob("*.safetensors")
    with safe_open(str(file), framework="pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    assert torch.equal(found["w#0:4,0:2"], whole[:, :2]) and torch.equal(found["w#0:4,2:6"], whole[:, 2:])


def test_scalars_and_views_that_are_not_contiguous(tmp_path: Path):
    base = tensor((5, 8))
    saved = [
        Entry("transposed", (8, 5), ((0, 8), (0, 5)), base.t(), (0,)),
        Entry("scalar", (), (), torch.tensor(3.5), (0,)),
    ]
    path = checkpoint.save(tmp_path, 1, saved, {}, alone())
    target, scalar = torch.zeros(5, 8), torch.zeros(())
    wanted = [
        Entry("transposed", (8, 5), ((0, 8), (0, 5)), target.t(), (0,)),
        Entry("scalar", (), (), scalar, (0,)),
    ]
    checkpoint.load(path, wanted, alone())
    assert torch.equal(target, base) and float(scalar) == 3.5


def test_nothing_is_ever_overwritten(tmp_path: Path):
    whole = tensor((4, 4))
    path = checkpoint.save(tmp_path, 3, cut_rows(whole, 1, 0), {}, alone())
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    for error in together(2, lambda x: checkpoint.save(tmp_path, 3, cut_rows(whole + 1, 2, x.rank), {}, x)):
        assert (
            isinstance(error, CheckpointError) and "step-00000003" in str(error) and "never overwritten" in str(error)
        )
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_save_that_fails_leaves_the_last_one_and_tells_every_rank(tmp_path: Path, monkeypatch, failing: int):
    whole = tensor((4, 4))
    first = together(2, lambda x: checkpoint.save(tmp_path, 1, cut_rows(whole, 2, x.rank), {}, x))[0]
    honest = save_file.write_shard

    def full(path: Path, named: Any) -> Any:
        if f"rank-{failing:05d}" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return honest(path, named)

    monkeypatch.setattr(save_file, "write_shard", full)
    errors = together(2, lambda x: checkpoint.save(tmp_path, 2, cut_rows(whole, 2, x.rank), {}, x))
    for error in errors:
        assert isinstance(error, CheckpointError) and "No space left on device" in str(error)
    assert checkpoint.find(tmp_path) == [first] and [p.name for p in tmp_path.iterdir()] == [first.name]
    monkeypatch.undo()
    assert together(2, lambda x: checkpoint.save(tmp_path, 2, cut_rows(whole, 2, x.rank), {}, x))[1].name.endswith("2")


def test_a_directory_that_cannot_be_made_is_an_error_on_every_rank(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for error in together(
        2, lambda x: checkpoint.save(tmp_path / "file/x", 1, cut_rows(tensor((2, 2)), 2, x.rank), {}, x)
    ):
        assert isinstance(error, CheckpointError) and "cannot be saved" in str(error)


def test_what_a_dead_save_left_is_ignored_and_cleared(tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, cut_rows(tensor((2, 2)), 1, 0), {}, alone())
    dead = tmp_path / ".tmp-step-00000009-abcd"
    dead.mkdir()
    (dead / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "step-00000008").mkdir()  # no manifest: not complete
    (tmp_path / "step-00000007x").mkdir()
    assert checkpoint.latest(tmp_path) == path
    checkpoint.save(tmp_path, 2, cut_rows(tensor((2, 2)), 1, 0), {}, alone())
    assert dead.exists(), "it may be another's that is under way: only who has the lock clears"
    checkpoint.clear_leftovers(tmp_path)
    assert not dead.exists() and checkpoint.latest(tmp_path).name == "step-00000002"
    assert checkpoint.find(tmp_path / "nowhere") == [] and checkpoint.latest(tmp_path / "nowhere") is None


def test_keep_lets_the_newest_stay(tmp_path: Path):
    for step in (5, 10, 100000000, 20):
        checkpoint.save(tmp_path, step, cut_rows(tensor((2, 2)), 1, 0), {}, alone(), keep=2)
    assert [path.name for path in checkpoint.find(tmp_path)] == ["step-00000020", "step-100000000"]
    assert len(list(tmp_path.iterdir())) == 2


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch):
    events: list[str] = []
    paths = {}
    opened, synced, renamed = os.open, os.fsync, os.rename

    def spy_open(path: Any, *args: Any, **options: Any) -> int:
        descriptor = opened(path, *args, **options)
        paths[descriptor] = Path(path).name
        return descriptor

    def spy_sync(descriptor: int) -> None:
        events.append(f"fsync {paths[descriptor]}")
        synced(descriptor)

    def spy_rename(source: Any, target: Any) -> None:
        events.append("rename")
        renamed(source, target)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "rename", spy_rename)
    (tmp_path / "c").mkdir()
    checkpoint.save(tmp_path / "c", 1, cut_rows(tensor((2, 2)), 1, 0), {}, alone())
    assert events[:2] == ["fsync rank-00000.safetensors", "fsync manifest.json"]
    assert events[2].startswith("fsync .tmp-step-00000001") and events[3:] == ["rename", "fsync c"]


def test_no_pickle_runs(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
import torch
from parallax import checkpoint
from tests.local.exchange import alone
from tests.local.test_checkpoint import cut_rows, tensor
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event.startswith("pickle") else None)
path = checkpoint.save(Path({str(tmp_path)!r}), 1, cut_rows(tensor((4, 4)), 1, 0), {{"a": 1}}, alone())
checkpoint.load(path, cut_rows(torch.zeros(4, 4), 1, 0), alone())
assert not seen, seen
import pickle
pickle.loads(pickle.dumps(Path))
assert seen, "the hook works"
"""
    root = Path(__file__).parent.parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
