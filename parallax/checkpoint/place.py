"""Where a checkpoint lies: a path on this machine's file systems, or the URL of any store that fsspec knows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax.errors import CheckpointError

__all__ = ["Place", "RemotePath", "file_system", "place"]


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A place in a remote store, as `s3://bucket/run`. Has what is used of pathlib's Path; no input or output."""

    url: str

    def __truediv__(self, name: str | RemotePath) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rstrip("/").rpartition("/")[0])

    def __str__(self) -> str:
        return self.url


Place = Path | RemotePath


def place(where: str | Path | RemotePath) -> Place:
    """A path, or, of a text with `://` in it, a place in a remote store."""
    if isinstance(where, str) and "://" in where:
        return RemotePath(where)
    return Path(where) if isinstance(where, str) else where


def file_system(at: RemotePath) -> tuple[Any, str]:
    """fsspec's file system of a place, and the place's path in it.

    Raises CheckpointError where no such store is known, its package is missing, or it cannot be set up, as without
    credentials.
    """
    import fsspec

    protocol = at.url.partition("://")[0]
    try:
        system = fsspec.filesystem(protocol)
        return system, str(system._strip_protocol(at.url))
    except Exception as error:  # each store has its own
        said = str(error) or type(error).__name__
        raise CheckpointError(f"{at}: no store of {protocol}:// can be reached: {said}") from error
