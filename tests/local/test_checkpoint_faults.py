"""What must not take a complete checkpoint away: an error after it, another run, a damaged neighbour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.checkpoint import BackgroundSave, place, remote_store
from parallax.cli import main
from tests.local.exchange import alone
from tests.local.test_checkpoint import cut_rows, tensor

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
