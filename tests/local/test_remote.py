"""Stores that have neither rename nor fsync: memory:// of this process, file:// as a stand-in between processes."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from parallax import checkpoint
from parallax.checkpoint import BackgroundSave, Entry, place, remote_store
from parallax.checkpoint.place import RemotePath, file_system
from parallax.cli import main
from parallax.errors import CheckpointError, DamagedCheckpoint
from tests.local.exchange import alone, together
from tests.local.test_checkpoint import cut_rows, tensor

WHOLE = tensor((12, 5))


@pytest.fixture(params=["memory", "file"])
def bucket(request: Any, tmp_path: Path) -> RemotePath:
    """A directory nobody has used."""
    url = f"memory://{uuid.uuid4().hex}/run" if request.param == "memory" else f"file://{tmp_path}/bucket/run"
    found = place(url)
    assert isinstance(found, RemotePath)
    return found


def save(bucket: Any, step: int, ranks: int = 2, **options: Any) -> Any:
    return together(
        ranks, lambda x: checkpoint.save(bucket, step, cut_rows(WHOLE, ranks, x.rank), {"n": step}, x, **options)
    )


def names(bucket: RemotePath) -> list[str]:
    return [path.name for path in checkpoint.find(bucket)]


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 4)])
def test_ranks_write_and_read_their_own(bucket: RemotePath, before: int, after: int):
    (path, *_) = save(bucket, 7, before)
    assert path == bucket / "step-00000007" and checkpoint.latest(bucket) == path
    target = torch.zeros(12, 5)
    assert together(after, lambda x: checkpoint.load(path, cut_rows(target, after, x.rank), x)) == [{"n": 7}] * after
    assert torch.equal(target, WHOLE)


def test_scalars_and_columns(bucket: RemotePath, monkeypatch):
    """By whole rows, a block at a time, cut in memory."""
    wide, scalar = tensor((64, 48)), torch.tensor(2.5)
    mine = [Entry("w", (64, 48), ((0, 64), (0, 48)), wide, (0,)), Entry("s", (), (), scalar, (0,))]
    path = checkpoint.save(bucket, 1, mine, {}, alone())
    monkeypatch.setattr(remote_store, "BLOCK_BYTES", 1000)
    asked = []
    system = type(fsspec.filesystem(str(bucket).partition(":")[0]))
    honest = system.cat_file

    def spy(self: Any, name: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        asked.append(end - start)
        return honest(self, name, start, end, **options)

    monkeypatch.setattr(system, "cat_file", spy)
    part, found = torch.zeros(30, 8), torch.zeros(())
    entries = [Entry("w", (64, 48), ((10, 40), (8, 16)), part, (0,)), Entry("s", (), (), found, (0,))]
    checkpoint.load(path, entries, alone())
    assert torch.equal(part, wide[10:40, 8:16]) and found == 2.5
    assert max(asked) <= 1000, "a block at a time"
    hashed = 64 * 48 * 4 + 4
    assert sum(asked) <= hashed + 30 * 48 * 4 + 4 + 1000, "once for the hash, and the rows that are wanted"


def test_the_manifest_comes_last(bucket: RemotePath, monkeypatch):
    written = []
    honest = remote_store.RemoteStore.write

    def spy(self: Any, path: RemotePath, *args: Any) -> None:
        honest(self, path, *args)
        written.append(path.name)

    monkeypatch.setattr(remote_store.RemoteStore, "write", spy)
    save(bucket, 1)
    assert [re.sub("-[0-9a-f]{8}", "", name) for name in sorted(written[:-1])] == [
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert written[-1] == "manifest.json"


def test_half_a_save_is_none_and_goes(bucket: RemotePath, monkeypatch):
    save(bucket, 1)
    with monkeypatch.context() as broken:
        broken.setattr(remote_store.RemoteStore, "commit", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(bucket, 2, cut_rows(WHOLE, 1, 0), {}, alone())
    assert names(bucket) == ["step-00000001"]
    with pytest.raises(DamagedCheckpoint, match=r"no manifest\.json"):
        checkpoint.load(bucket / "step-00000002", cut_rows(torch.zeros(12, 5), 1, 0), alone())
    checkpoint.clear_leftovers(bucket)
    store = remote_store.RemoteStore()
    assert "step-00000002" in store.sizes(bucket), "it may be a save under way"
    save(bucket, 3)
    checkpoint.clear_leftovers(bucket)
    assert sorted(store.sizes(bucket)) == ["step-00000001", "step-00000003"]
    with monkeypatch.context() as broken:
        broken.setattr(remote_store.RemoteStore, "commit", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(bucket, 4, cut_rows(WHOLE, 1, 0), {}, alone())
    save(bucket, 4)
    target = torch.zeros(12, 5)
    checkpoint.load(bucket / "step-00000004", cut_rows(target, 1, 0), alone())
    assert torch.equal(target, WHOLE), "what the dead one had left is not in it"


def test_nothing_is_overwritten(bucket: RemotePath):
    save(bucket, 1)
    for error in save(bucket, 1):
        assert isinstance(error, CheckpointError) and "never overwritten" in str(error)


def test_keep(bucket: RemotePath):
    for step in (1, 2, 3, 4):
        save(bucket, step, keep=2, keep_every=3)
    assert names(bucket) == ["step-00000003", "step-00000004"]
    save(bucket, 5, keep=1, keep_every=3)
    assert names(bucket) == ["step-00000003", "step-00000005"]
    assert sorted(remote_store.RemoteStore().sizes(bucket)) == ["step-00000003", "step-00000005"]


def test_a_store_that_fails_is_an_error_on_every_rank(bucket: RemotePath, monkeypatch):
    class Refused(Exception):
        """As botocore has its own."""

    save(bucket, 1)
    system = type(fsspec.filesystem(str(bucket).partition(":")[0]))
    honest = system.open

    def failing(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if "rank-00001" in path and "w" in mode:
            raise Refused("quota exceeded")
        return honest(self, path, mode, **options)

    with monkeypatch.context() as broken:
        broken.setattr(system, "open", failing)
        errors = save(bucket, 2)
    for error in errors:
        assert isinstance(error, CheckpointError) and "quota exceeded" in str(error), error
    assert names(bucket) == ["step-00000001"] and list(remote_store.RemoteStore().sizes(bucket)) == ["step-00000001"]


def test_damage_is_found(bucket: RemotePath):
    (path, _) = save(bucket, 1)
    system, name = file_system(path)
    (shard,) = (f"{name}/{found}" for found in remote_store.RemoteStore().sizes(path) if "rank-00001" in found)
    data = system.cat_file(shard)
    for bad, word in ((data[:-1], "truncated"), (data[:-1] + b"\1", "altered")):
        system.pipe_file(shard, bad)
        for error in together(2, lambda x: checkpoint.load(path, cut_rows(torch.zeros(12, 5), 2, x.rank), x)):
            assert isinstance(error, DamagedCheckpoint) and word in str(error), error
    system.rm_file(shard)
    with pytest.raises(DamagedCheckpoint, match="missing"):
        checkpoint.load(path, cut_rows(torch.zeros(12, 5), 1, 0), alone())


def test_in_the_background(bucket: RemotePath):
    def saving(x: Any) -> BackgroundSave:
        under_way = BackgroundSave(bucket, 1, cut_rows(WHOLE, 3, x.rank), {}, x)
        under_way.thread.join()
        return under_way

    assert [under_way.error for under_way in together(3, saving)] == [None] * 3
    target = torch.zeros(12, 5)
    checkpoint.load(bucket / "step-00000001", cut_rows(target, 1, 0), alone())
    assert torch.equal(target, WHOLE)


def test_the_tool_reads_urls(bucket: RemotePath, capsys):
    save(bucket, 1)
    save(bucket, 2)
    assert main(["checkpoint", "ls", str(bucket), "--json"]) == 0
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [1, 2]
    one, two = (f"{bucket}/step-{step:08d}" for step in (1, 2))
    assert main(["checkpoint", "verify", one, two]) == 0
    assert main(["checkpoint", "diff", one, two]) == 0
    assert main(["checkpoint", "show", one]) == 0
    assert main(["checkpoint", "prune", str(bucket), "keep=1"]) == 0
    assert names(bucket) == ["step-00000002"]
    assert main(["checkpoint", "verify", one]) == 2


def test_a_store_that_nobody_knows_is_one_clear_error(capsys):
    assert main(["checkpoint", "show", "nosuch://bucket/step-00000001"]) == 2
    assert "no store of nosuch:// can be reached" in capsys.readouterr().err


def test_steps_of_nine_digits_come_after_those_of_eight(bucket: RemotePath):
    """As text, step-100000000 comes before step-99999999, and so did what died between them seem to be under way."""
    for step in (99_999_998, 100_000_000):
        save(bucket, step)
    dead = bucket / "step-99999999"
    remote_store.RemoteStore().write(dead / "rank-00000.safetensors", [b"x"])
    checkpoint.clear_leftovers(bucket)
    system, path = file_system(bucket)
    system.invalidate_cache()
    assert sorted(name.rpartition("/")[2] for name in system.ls(path, detail=False)) == [
        "step-100000000",
        "step-99999998",
    ]


def test_a_store_that_cannot_be_set_up_is_one_error(monkeypatch):
    """Stores raise what they like: google's and botocore's own, where there are no credentials."""

    def fail(protocol: str) -> Any:
        raise RuntimeError("Unable to locate credentials")

    monkeypatch.setattr(fsspec, "filesystem", fail)
    with pytest.raises(CheckpointError, match="no store of s3:// can be reached: Unable to locate credentials"):
        checkpoint.find(place("s3://bucket/run"))
