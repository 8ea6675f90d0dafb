"""What saving and loading ask of a store; here for directories of this machine, in remote_store.py for the others."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from parallax.checkpoint.place import Place
from parallax.errors import CheckpointError
from parallax.plain_files import open_regular

__all__ = [
    "MANIFEST",
    "Draft",
    "LocalStore",
    "Store",
    "aside_name",
    "clear_leftovers",
    "make_directories",
    "set_aside",
    "store_of",
    "sync_directory",
]

MANIFEST = "manifest.json"
STEP = re.compile(r"step-(\d{8,})")
TEMPORARY = ".tmp-"
BLOCK_BYTES = 1 << 22


class Draft(NamedTuple):
    """Where the files of a save lie until it is complete. mark: in the names of all of them, and in those of no other
    save's that may lie beside them.
    """

    place: Any
    mark: str = ""

    def file(self, kind: str, rank: int, ending: str = "") -> Any:
        return self.place / f"{kind}-{rank:05d}{self.mark}{ending}"


class Store(Protocol):
    """A store of checkpoints. What fails raises OSError with a filename and a strerror, FileNotFoundError where nothing
    is there.
    """

    def sizes(self, directory: Any) -> dict[str, int | None]:
        """The names directly in a directory, with the bytes of the files; None for what is no regular file.
        Others may be writing there: what is renamed meanwhile is in it once, under both names, or under neither.
        """
        ...

    def read(self, path: Any, limit: int) -> bytes:
        """A file, or its first `limit` bytes and one more."""
        ...

    def blocks(self, path: Any) -> Iterator[bytes | memoryview]:
        """A file, block by block; a block is gone when the next one comes."""
        ...

    def read_part(
        self, path: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], cut: tuple[slice, ...]
    ) -> np.ndarray[Any, Any]:
        """A part of the row-major array at `offset` of a file, in memory of its own; little more than it is read."""
        ...

    def read_into(self, path: Any, offset: int, out: memoryview) -> None:
        """Fill `out` with the bytes at `offset` of a file."""
        ...

    def write(
        self,
        path: Any,
        pieces: Iterable[bytes | memoryview],
        seen: Callable[[bytes | memoryview], object] = ...,
    ) -> None:
        """Write a new file of these pieces; it is durable on return. seen: told of every block."""
        ...

    def delete(self, path: Any) -> None:
        """Delete a file."""
        ...

    def put(self, path: Any, data: bytes) -> None:
        """Write a small new file that is there whole or not at all; an empty one takes no space. It need not last."""
        ...

    def start(self, directory: Any, target: Any) -> Draft:
        """Make the place where the files of a save go. Raises CheckpointError where the target is there already."""
        ...

    def sees(self, draft: Draft) -> bool:
        """Whether what `start` made on some rank is there on this one: so until the save is complete or given up."""
        ...

    def commit(self, draft: Draft, target: Any, manifest: bytes) -> str | None:
        """Make a checkpoint of the files, once all of them are there. Returns what went wrong after that. Raises
        CheckpointError or OSError: then there is none.
        """
        ...

    def give_up(self, draft: Draft) -> None:
        """Delete what this save has written, and nothing else. Not for one that is complete."""
        ...

    def set_aside(self, path: Any) -> Any:
        """Give a checkpoint a name that is no checkpoint's; returns its new place."""
        ...

    def remove(self, path: Any) -> None:
        """Delete a checkpoint's directory; a checkpoint stops being one before anything of it is gone."""
        ...

    def clear(self, directory: Any) -> None:
        """Delete what saves and deletions that died have left. Nobody else may be writing there."""
        ...


def store_of(place: Place) -> Store:
    if isinstance(place, Path):
        return LocalStore()
    from parallax.checkpoint.remote_store import RemoteStore

    return RemoteStore()


def clear_leftovers(directory: Place) -> None:
    """Delete what saves and deletions that died have left. Nobody else may be writing there."""
    store_of(directory).clear(directory)


def set_aside(path: Place) -> Place:
    """Keep a damaged checkpoint under a name that no run takes for a checkpoint, or deletes; returns its new place."""
    found: Place = store_of(path).set_aside(path)
    return found


def aside_name(name: str) -> str:
    return f"damaged-{name}-{secrets.token_hex(4)}"


class LocalStore:
    """Directories of 0700, new files of 0600, fsynced, no links; a checkpoint appears by rename."""

    def sizes(self, directory: Path) -> dict[str, int | None]:
        found: dict[str, int | None] = {}
        with os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # renamed or deleted since it was listed
                    regular = entry.is_file(follow_symlinks=False)
                    found[entry.name] = entry.stat(follow_symlinks=False).st_size if regular else None
        return found

    def read(self, path: Path, limit: int) -> bytes:
        with os.fdopen(open_regular(path), "rb") as file:
            return file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)

    def blocks(self, path: Path) -> Iterator[memoryview]:
        with os.fdopen(open_regular(path), "rb", buffering=0) as file:
            buffer = bytearray(min(BLOCK_BYTES, os.fstat(file.fileno()).st_size + 1))
            while count := file.readinto(buffer):
                yield memoryview(buffer)[:count]

    def read_part(
        self, path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], cut: tuple[slice, ...]
    ) -> np.ndarray[Any, Any]:
        with os.fdopen(open_regular(path), "rb") as file:
            count = math.prod(shape) * dtype.itemsize
            flat = np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(count,))
        return np.array(flat.view(dtype).reshape(shape)[cut])  # the pages that hold it are read, and no others

    def read_into(self, path: Path, offset: int, out: memoryview) -> None:
        descriptor = open_regular(path)
        try:
            done = 0
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], offset + done)
                if count == 0:
                    raise OSError(None, "it is shorter than it was", str(path))
                done += count
        finally:
            os.close(descriptor)

    def write(
        self,
        path: Path,
        pieces: Iterable[bytes | memoryview],
        seen: Callable[[bytes | memoryview], object] = lambda block: None,
    ) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb", buffering=0):
            done = 0
            for piece in pieces:
                for begin in range(0, len(piece), BLOCK_BYTES):
                    block = piece[begin : begin + BLOCK_BYTES]
                    seen(block)  # hashed while it is in the cache
                    _write_all(descriptor, block)
                    done += len(block)
                    _begin_writeback(descriptor, done)
            os.fsync(descriptor)

    def delete(self, path: Path) -> None:
        path.unlink()

    def put(self, path: Path, data: bytes) -> None:
        part = path.with_name(f"{path.name}.part")
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.write(data)
        os.rename(part, path)

    def start(self, directory: Path, target: Path) -> Draft:
        make_directories(directory)
        if target.exists():
            raise CheckpointError("it exists, and a checkpoint is never overwritten; choose another output")
        temporary = directory / f"{TEMPORARY}{target.name}-{secrets.token_hex(4)}"
        temporary.mkdir(mode=0o700)
        return Draft(temporary)

    def sees(self, draft: Draft) -> bool:
        return bool(draft.place.is_dir())

    def commit(self, draft: Draft, target: Path, manifest: bytes) -> str | None:
        self.write(draft.place / MANIFEST, [manifest])
        sync_directory(draft.place)
        if target.exists():
            raise CheckpointError("another run saved it meanwhile")
        os.rename(draft.place, target)
        try:
            sync_directory(target.parent)
        except OSError as problem:
            return f"{target} is complete, but a crash may lose it: its directory cannot be synced: {problem}"
        return None

    def give_up(self, draft: Draft) -> None:
        shutil.rmtree(draft.place, ignore_errors=True)

    def set_aside(self, path: Path) -> Path:
        aside = path.with_name(aside_name(path.name))
        os.rename(path, aside)
        sync_directory(path.parent)
        return aside

    def remove(self, path: Path) -> None:
        # Renamed first, so that a half-deleted one is never taken for a checkpoint.
        if STEP.fullmatch(path.name):
            doomed = path.with_name(f"{TEMPORARY}delete-{path.name}-{secrets.token_hex(4)}")
            os.rename(path, doomed)
            path = doomed
        shutil.rmtree(path, ignore_errors=True)

    def clear(self, directory: Path) -> None:
        for leftover in directory.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _write_all(descriptor: int, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _begin_writeback(descriptor: int, stop: int) -> None:
    """Start to bring what was written so far to the disk, and forget what is there already: so the fsync at the end has
    little left to wait for, and a save does not push everything else out of the page cache.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, stop, os.POSIX_FADV_DONTNEED)


def make_directories(path: Path, mode: int = 0o700) -> None:
    """Make a directory and those above it that are not there, durably: a crash that loses the name of one loses all
    that is in it.
    """
    for new in reversed([one for one in (path, *path.parents) if not one.exists()]):
        new.mkdir(mode=mode, exist_ok=True)
        sync_directory(new.parent)
    if not path.is_dir():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
