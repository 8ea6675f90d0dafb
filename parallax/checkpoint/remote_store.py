"""Stores without rename and fsync, through fsspec: what the manifest names is uploaded first, the manifest last.

A directory step-N without its manifest is no checkpoint: a save under way, or one that died. There is no lock in such
a store, so the lock of the output directory is all that keeps two runs apart, and that no step is saved twice. So
every save has a mark in the names of its files: two of one step do not write into each other's, one that gives up
deletes its own alone, and what a dead one has left stays beside the next one's, unread, until the step is deleted.
"""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from parallax.checkpoint.place import RemotePath, file_system
from parallax.checkpoint.store import MANIFEST, STEP, Draft, aside_name
from parallax.errors import CheckpointError, ParallaxError

__all__ = ["RemoteStore"]

BLOCK_BYTES = 1 << 25
"""Read or written in one request at most: requests cost milliseconds."""


class RemoteStore:
    """Files of any fsspec file system; see `Store`."""

    def sizes(self, directory: RemotePath) -> dict[str, int | None]:
        system, path = file_system(directory)
        with _told(directory):
            system.invalidate_cache(path)
            found = system.ls(path, detail=True)
        return {
            info["name"].rstrip("/").rpartition("/")[2]: info["size"] if info["type"] == "file" else None
            for info in found
        }

    def read(self, path: RemotePath, limit: int) -> bytes:
        system, name = file_system(path)
        with _told(path), system.open(name, "rb") as file:
            return bytes(file.read(min(limit, system.info(name)["size"]) + 1))

    def blocks(self, path: RemotePath) -> Iterator[bytes]:
        system, name = file_system(path)
        with _told(path):
            size = system.info(name)["size"]
            for start in range(0, size, BLOCK_BYTES):
                yield system.cat_file(name, start, min(start + BLOCK_BYTES, size))

    def read_part(
        self, path: RemotePath, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], cut: tuple[slice, ...]
    ) -> np.ndarray[Any, Any]:
        system, name = file_system(path)
        if not shape:
            shape, cut = (1,), (slice(0, 1),)
            return self.read_part(path, offset, shape, dtype, cut).reshape(())
        rows = range(*cut[0].indices(shape[0]))
        row = math.prod(shape[1:]) * dtype.itemsize
        out = np.empty([len(range(*c.indices(size))) for c, size in zip(cut, shape, strict=True)], dtype)
        step = max(1, BLOCK_BYTES // max(1, row))
        for first in range(rows.start, rows.stop, step):  # whole rows, in few requests
            last = min(first + step, rows.stop)
            with _told(path):
                data = system.cat_file(name, offset + first * row, offset + last * row)
            if len(data) != (last - first) * row:
                raise OSError(None, "it is shorter than it was", str(path))
            whole = np.frombuffer(data, dtype).reshape(last - first, *shape[1:])
            out[first - rows.start : last - rows.start] = whole[(slice(None), *cut[1:])]
        return out

    def read_into(self, path: RemotePath, offset: int, out: memoryview) -> None:
        system, name = file_system(path)
        for begin in range(0, len(out), BLOCK_BYTES):
            block = out[begin : begin + BLOCK_BYTES]
            with _told(path):
                data = system.cat_file(name, offset + begin, offset + begin + len(block))
            if len(data) != len(block):
                raise OSError(None, "it is shorter than it was", str(path))
            block[:] = data

    def write(
        self,
        path: RemotePath,
        pieces: Iterable[bytes | memoryview],
        seen: Callable[[bytes | memoryview], object] = lambda block: None,
    ) -> None:
        system, name = file_system(path)
        with _told(path):
            system.makedirs(name.rpartition("/")[0], exist_ok=True)
            with system.open(name, "wb", block_size=BLOCK_BYTES) as file:
                for piece in pieces:
                    for begin in range(0, len(piece), BLOCK_BYTES):
                        block = piece[begin : begin + BLOCK_BYTES]
                        seen(block)
                        file.write(block)

    def delete(self, path: RemotePath) -> None:
        system, name = file_system(path)
        with _told(path):
            system.rm_file(name)

    def put(self, path: RemotePath, data: bytes) -> None:
        system, name = file_system(path)
        with _told(path):
            system.makedirs(name.rpartition("/")[0], exist_ok=True)
            system.pipe_file(f"{name}.part", data)
            system.mv(f"{name}.part", name)  # file:// shows what is half written

    def start(self, directory: RemotePath, target: RemotePath) -> Draft:
        system, path = file_system(target)
        draft = Draft(target, f"-{secrets.token_hex(4)}")
        with _told(target):
            system.invalidate_cache()
            if system.exists(f"{path}/{MANIFEST}"):
                raise CheckpointError("it exists, and a checkpoint is never overwritten; choose another output")
        self.put(draft.file("saving", 0), b"")
        return draft

    def sees(self, draft: Draft) -> bool:
        try:
            return draft.file("saving", 0).name in self.sizes(draft.place)
        except FileNotFoundError:
            return False

    def commit(self, draft: Draft, target: RemotePath, manifest: bytes) -> str | None:
        system, path = file_system(target)
        with _told(target):
            if system.exists(f"{path}/{MANIFEST}"):
                raise CheckpointError("another run saved it meanwhile")
        self.write(target / MANIFEST, [manifest])
        with contextlib.suppress(OSError):
            self.delete(draft.file("saving", 0))
        return None

    def give_up(self, draft: Draft) -> None:
        system, path = file_system(draft.place)
        names = self.sizes(draft.place)
        if MANIFEST in names and draft.mark.encode() in self.read(draft.place / MANIFEST, names[MANIFEST] or 0):
            return  # the store has taken the manifest, whatever it said
        for name in names:
            if draft.mark in name:
                self.delete(draft.place / name)
        with contextlib.suppress(Exception):  # it is not empty, or there are no directories in this store
            system.rmdir(path)

    def set_aside(self, path: RemotePath) -> RemotePath:
        aside = path.parent / aside_name(path.name)
        system, name = file_system(path)
        with _told(path):  # by copying, since there is no rename
            system.copy(name, file_system(aside)[1], recursive=True)
        self.remove(path)
        return aside

    def remove(self, path: RemotePath) -> None:
        system, name = file_system(path)
        with _told(path):
            if system.exists(f"{name}/{MANIFEST}"):
                system.rm_file(f"{name}/{MANIFEST}")  # first: without it the rest is no checkpoint
            if system.exists(name):
                system.rm(name, recursive=True)

    def clear(self, directory: RemotePath) -> None:
        """Steps without a manifest below one that has it: saves come in order, so these are dead for certain."""
        with contextlib.suppress(FileNotFoundError):
            steps = sorted((name for name in self.sizes(directory) if STEP.fullmatch(name)), key=_number)
            whole = [name for name in steps if MANIFEST in self.sizes(directory / name)]
            for name in steps:
                if whole and name not in whole and _number(name) < _number(whole[-1]):
                    self.remove(directory / name)


def _number(name: str) -> int:
    match = STEP.fullmatch(name)
    return int(match[1]) if match else -1


@contextlib.contextmanager
def _told(path: RemotePath) -> Iterator[None]:
    """Stores raise what they like: here it becomes an OSError that names the place."""
    try:
        yield
    except ParallaxError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(None, "it is not there", str(path)) from None
    except Exception as error:
        raise OSError(None, str(error) or type(error).__name__, str(path)) from error
