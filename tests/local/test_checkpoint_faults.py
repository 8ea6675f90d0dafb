"""What must not take a complete checkpoint away: an error after it, another run, a damaged neighbour."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax import checkpoint
from parallax.checkpoint import BackgroundSave, place, remote_store, store
from parallax.checkpoint.store import LocalStore
from parallax.cli import main
from parallax.errors import CheckpointError
from tests.local.exchange import alone, together
from tests.local.test_checkpoint import cut_rows, tensor

save_file = sys.modules["parallax.checkpoint.save"]
WHOLE = tensor((12, 5))


def save(directory: Any, step: int, **options: Any) -> Any:
    return checkpoint.save(directory, step, cut_rows(WHOLE, 1, 0), {"step": step}, alone(), **options)


def steps(directory: Any) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.find(directory)]


@pytest.mark.parametrize("background", [False, True])
def test_a_listing_that_fails_after_the_commit_fails_no_save(tmp_path: Path, monkeypatch, background: bool):
    """Only older checkpoints could not be looked for: that is told, and nothing is given up."""
    bucket = place(f"file://{tmp_path}/bucket/run")
    for step in (1, 2):
        save(bucket, step)
    honest = remote_store.RemoteStore.sizes

    def failing(self: Any, directory: Any) -> Any:
        if directory.name == "run":
            raise OSError(None, "503 Slow Down", str(directory))
        return honest(self, directory)

    with monkeypatch.context() as broken:
        broken.setattr(remote_store.RemoteStore, "sizes", failing)
        if background:
            under_way = BackgroundSave(bucket, 3, cut_rows(WHOLE, 1, 0), {}, alone(), keep=1)
            under_way.thread.join()
            assert under_way.error is None
            told = [under_way.warning or ""]
        else:
            told = []
            save(bucket, 3, keep=1, told=told)
    assert "is saved, but older checkpoints could not be deleted" in told[0] and "503 Slow Down" in told[0]
    assert steps(bucket) == [1, 2, 3]


def truncate(path: Path) -> None:
    shard = path / "rank-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])


def flip(path: Path) -> None:
    shard = path / "rank-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip])
def test_prune_on_the_command_line_counts_what_is_sound(tmp_path: Path, capsys, damage: Any):
    """Not the only sound checkpoint goes for the sake of a newer one that no run can load."""
    paths = [save(tmp_path / "checkpoints", step) for step in (1, 2, 3)]
    damage(paths[2])
    assert main(["checkpoint", "prune", str(tmp_path), "keep=1"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{paths[2]} is damaged, so it stays and does not count: ")
    assert said[1:] == [f"deleted {paths[0]}"] and steps(tmp_path / "checkpoints") == [2, 3]
    damage(paths[1])
    assert main(["checkpoint", "prune", str(tmp_path), "keep=1"]) == 1
    assert steps(tmp_path / "checkpoints") == [2, 3], "none is sound, so none goes"


def test_a_run_that_thins_out_counts_what_is_sound(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    truncate(tmp_path / "step-00000003")
    save(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [2, 3, 4]
    save(tmp_path, 5, keep=2)
    assert steps(tmp_path) == [4, 5], "the damaged one is older than all that are kept"


def test_the_loser_of_a_race_leaves_the_winner_s_checkpoint(tmp_path: Path, monkeypatch):
    """Two runs save one step into a store without rename: neither writes into, nor deletes, what is the other's."""
    bucket = place(f"file://{tmp_path}/bucket/run")
    honest = save_file.write_shard

    def slow(path: Any, named: Any) -> Any:
        """Another run begins later and is done earlier."""
        monkeypatch.setattr(save_file, "write_shard", honest)
        save(bucket, 1)
        return honest(path, named)

    monkeypatch.setattr(save_file, "write_shard", slow)
    with pytest.raises(CheckpointError, match="another run saved it meanwhile"):
        checkpoint.save(bucket, 1, cut_rows(-WHOLE, 1, 0), {"step": -1}, alone())
    target = torch.zeros(12, 5)
    assert checkpoint.load(bucket / "step-00000001", cut_rows(target, 1, 0), alone()) == {"step": 1}
    assert torch.equal(target, WHOLE)
    assert len(list((tmp_path / "bucket/run/step-00000001").iterdir())) == 2, "the loser's own files are gone"


def test_a_save_that_begins_leaves_the_files_of_one_under_way(tmp_path: Path, monkeypatch):
    bucket = place(f"file://{tmp_path}/bucket/run")
    honest = save_file.write_shard

    def slow(path: Any, named: Any) -> Any:
        """Another run begins later and dies."""
        written = honest(path, named)
        monkeypatch.setattr(save_file, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(bucket, 1)
        return written

    monkeypatch.setattr(save_file, "write_shard", slow)
    save(bucket, 1)
    target = torch.zeros(12, 5)
    checkpoint.load(bucket / "step-00000001", cut_rows(target, 1, 0), alone())
    assert torch.equal(target, WHOLE)


def test_a_manifest_that_arrived_though_the_store_failed_keeps_its_files(tmp_path: Path, monkeypatch):
    bucket = place(f"file://{tmp_path}/bucket/run")
    honest = remote_store.RemoteStore.write

    def failing(self: Any, path: Any, *args: Any) -> None:
        honest(self, path, *args)
        if path.name == "manifest.json":
            raise OSError(None, "timed out", str(path))

    monkeypatch.setattr(remote_store.RemoteStore, "write", failing)
    with pytest.raises(CheckpointError, match="timed out"):
        save(bucket, 1)
    checkpoint.load(bucket / "step-00000001", cut_rows(torch.zeros(12, 5), 1, 0), alone())


@pytest.mark.parametrize("url", [False, True])
def test_a_file_that_rank_0_does_not_see_makes_no_checkpoint(tmp_path: Path, monkeypatch, url: bool):
    """As where each machine has its own disk under the same name."""
    directory = place(f"file://{tmp_path}/run") if url else tmp_path / "run"
    honest = save_file.write_shard

    def elsewhere(path: Any, named: Any) -> Any:
        return honest(tmp_path / "elsewhere" if "rank-00001" in path.name else path, named)

    monkeypatch.setattr(save_file, "write_shard", elsewhere)
    for error in together(2, lambda x: checkpoint.save(directory, 1, cut_rows(WHOLE, 2, x.rank), {}, x)):
        assert isinstance(error, CheckpointError) and "and nothing is there" in str(error)
    assert steps(directory) == []


@pytest.mark.parametrize("kind", [LocalStore, remote_store.RemoteStore])
@pytest.mark.parametrize("background", [False, True])
def test_ranks_that_do_not_share_the_store_are_told_so(tmp_path: Path, monkeypatch, kind: Any, background: bool):
    """memory:// of two processes, or a disk of each machine."""
    directory = tmp_path / "run" if kind is LocalStore else place(f"file://{tmp_path}/run")
    monkeypatch.setattr(kind, "sees", lambda self, draft: threading.current_thread() is not blind[0])
    blind: list[Any] = [None]

    def saving(x: Any) -> Any:
        if x.rank == 1:
            blind[0] = threading.current_thread()
        how = BackgroundSave if background else checkpoint.save
        return how(directory, 1, cut_rows(WHOLE, 2, x.rank), {}, x)

    for error in together(2, saving):
        assert isinstance(error, CheckpointError) and "take a place that all ranks share" in str(error)
    assert steps(directory) == [] and not list((tmp_path / "run").glob("*")) + list((tmp_path / "run").glob(".tmp*"))


FAULTS = {
    "no space for the file and the record": ("_write_all", "put", OSError(errno.ENOSPC, "No space left on device")),
    "no space for the record": ("", "put", OSError(errno.ENOSPC, "No space left on device")),
    "nothing can be written": ("_write_all", "put, failed", OSError(errno.ENOSPC, "No space left on device")),
    "not an error of the system": ("write_shard", "", RuntimeError("device lost")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_rank_that_cannot_write_ends_the_save_in_the_background(tmp_path: Path, monkeypatch, fault: str):
    """Not even the record that says so: nobody waits for it for good, and the next save works."""
    writing, putting, error = FAULTS[fault]
    honest_write, honest_put, honest_shard = store._write_all, LocalStore.put, save_file.write_shard

    def write_all(descriptor: int, piece: Any) -> None:
        if "-00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise error
        honest_write(descriptor, piece)

    def put(self: Any, path: Path, data: bytes) -> None:
        if "-00001" in path.name and (data or "failed" in putting):
            raise error
        honest_put(self, path, data)

    def write_shard(path: Path, named: Any) -> Any:
        if "-00001" in path.name:
            raise error
        return honest_shard(path, named)

    def saving(x: Any) -> Any:
        under_way = BackgroundSave(tmp_path, 1, cut_rows(WHOLE, 2, x.rank), {}, x)
        if "failed" not in putting:  # then rank 0 need not be told by the training
            under_way.thread.join(20)
            assert under_way.done
        return under_way.wait(x)

    with monkeypatch.context() as broken:
        if writing:
            broken.setattr(store if writing == "_write_all" else save_file, writing, locals()[writing.lstrip("_")])
        if putting:
            broken.setattr(LocalStore, "put", put)
        found = together(2, saving)
    assert found[0] == found[1] and str(error.args[-1]) in found[0], found
    assert not list(tmp_path.iterdir())
    assert together(2, saving) == [None, None] and steps(tmp_path) == [1]


def test_a_record_that_is_no_record_ends_the_save_in_the_background(tmp_path: Path, monkeypatch):
    honest = LocalStore.put
    monkeypatch.setattr(LocalStore, "put", lambda self, path, data: honest(self, path, data[: len(data) // 2]))

    def saving(x: Any) -> Any:
        return BackgroundSave(tmp_path, 1, cut_rows(WHOLE, 2, x.rank), {}, x).wait(x)

    for error in together(2, saving):
        assert "cannot be saved" in error
    assert not list(tmp_path.iterdir())


def test_a_record_that_gets_its_name_while_the_names_are_listed_fails_no_save(tmp_path: Path, monkeypatch):
    """Rank 0's thread looks for the records of the others at any time: once it has seen `.part`, that may be gone."""
    honest, renamed = os.scandir, threading.Event()

    class Listing(list[Any]):
        def __enter__(self) -> Listing:
            return self

        def __exit__(self, *error: object) -> None: ...

    def scandir(path: Any) -> Any:
        with honest(path) as entries:
            found = Listing(entries)
        for part in (entry for entry in found if entry.name.endswith(".part")):
            os.rename(part.path, part.path.removesuffix(".part"))
            renamed.set()
        return found

    def put(self: Any, path: Path, data: bytes) -> None:
        path.with_name(f"{path.name}.part").write_bytes(data)
        assert renamed.wait(20)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(LocalStore, "put", put)

    def saving(x: Any) -> Any:
        return BackgroundSave(tmp_path, 1, cut_rows(WHOLE, 2, x.rank), {}, x).wait(x)

    assert together(2, saving) == [None, None] and steps(tmp_path) == [1]
