"""One run a directory, whatever is done to the file of the lock, and on whatever file system."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from pathlib import Path

import pytest

from parallax.checkpoint import DirectoryLock
from parallax.errors import CheckpointError


def test_the_holder_is_named_until_it_lets_go(tmp_path: Path):
    first = DirectoryLock(tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"in use by another run \(process {os.getpid()} on .*, since"):
        DirectoryLock(tmp_path / "a")
    first.release()
    DirectoryLock(tmp_path / "a").release()


def test_deleting_the_file_of_a_lock_that_is_held_lets_nobody_in(tmp_path: Path):
    first = DirectoryLock(tmp_path)
    (tmp_path / ".lock").unlink()
    with pytest.raises(CheckpointError, match="in use by another run"):
        DirectoryLock(tmp_path)
    first.release()
    DirectoryLock(tmp_path).release()


@pytest.mark.parametrize("files_too", [True, False])
def test_a_file_system_without_locks_is_said_with_what_to_do(tmp_path: Path, monkeypatch, files_too: bool):
    honest = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        if files_too or stat.S_ISDIR(os.fstat(descriptor).st_mode):  # NFS locks files, and no directories
            raise OSError(errno.ENOLCK if files_too else errno.EBADF, "No locks available")
        honest(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    if files_too:
        with pytest.raises(CheckpointError, match=r"\.lock cannot be locked: No locks available; choose an output on"):
            DirectoryLock(tmp_path)
        return
    lock = DirectoryLock(tmp_path)
    with pytest.raises(CheckpointError, match="in use by another run"):
        DirectoryLock(tmp_path)
    lock.release()


def test_a_lock_that_could_not_be_made_ends_without_noise(tmp_path: Path, monkeypatch):
    """Its __del__ found no descriptor."""
    noise: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", noise.append)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="exists"):
        DirectoryLock(tmp_path / "file")
    assert not noise
