"""One run a directory: a lock that says who holds it, and that a dead run cannot keep."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from parallax.checkpoint.store import make_directories
from parallax.errors import CheckpointError
from parallax.plain_files import open_regular

__all__ = ["DirectoryLock"]

NAME = ".lock"


class DirectoryLock:
    """Held from its making to `release`, or to the end of the process, however that ends: the kernel lets go.

    Raises CheckpointError that names the holder where another process has it, or that says that the file system has no
    locks; OSError where the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._descriptors: list[int] = []
        self.path = directory / NAME
        make_directories(directory)
        try:
            # The directory itself too, so that nobody gets in by deleting the file. NFS can lock files alone.
            with contextlib.suppress(_NoLocks):
                self._lock(directory, os.O_RDONLY | os.O_DIRECTORY)
            self._lock(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        except CheckpointError:
            self.release()
            raise
        os.ftruncate(self._descriptors[-1], 0)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(self._descriptors[-1], json.dumps(who).encode())

    def _lock(self, path: Path, flags: int) -> None:
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        self._descriptors.append(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path.parent} is in use by another run ({_holder(self.path)}); choose another output, or end "
                "that run"
            ) from None
        except OSError as error:
            self._descriptors.remove(descriptor)
            os.close(descriptor)
            raise _NoLocks(
                f"{path} cannot be locked: {error.strerror}; choose an output on a file system that has locks, or "
                "mount it with them (NFS: its lock service; Lustre: -o flock)"
            ) from None

    def release(self) -> None:
        """Let go. The file stays: removing it would let two others hold two files of that name."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


class _NoLocks(CheckpointError):
    """This kind of file cannot be locked here."""


def _holder(path: Path) -> str:
    """Who has the lock, as far as its file says."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            who = json.loads(file.read(4096))
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "which did not say who it is"
