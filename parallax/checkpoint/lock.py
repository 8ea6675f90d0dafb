"""One run a directory: a lock that says who holds it, and that a dead run cannot keep."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path

from parallax.checkpoint.store import make_directories
from parallax.errors import CheckpointError

__all__ = ["DirectoryLock"]

NAME = ".lock"


class DirectoryLock:
    """Held from its making to `release`, or to the end of the process, however that ends: the kernel lets go.

    Raises CheckpointError that names the holder where another process has it; OSError where the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        make_directories(directory)
        self.path = directory / NAME
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._descriptor, 4096).decode(errors="replace")
            self.release()
            raise CheckpointError(
                f"{directory} is in use by another run ({_shown(holder)}); choose another output, or end that run"
            ) from None
        os.ftruncate(self._descriptor, 0)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(self._descriptor, json.dumps(who).encode())

    def release(self) -> None:
        """Let go. The file stays: removing it would let two others hold two files of that name."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def __del__(self) -> None:
        self.release()


def _shown(text: str) -> str:
    try:
        who = json.loads(text)
        return f"process {who['pid']} on {who['host']}, since {who['since']}"
    except (ValueError, KeyError, TypeError):
        return "which did not say who it is"
