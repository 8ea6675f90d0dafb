"""Shard files: the safetensors format, written as a stream with its hash, read by slices."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from parallax.checkpoint.manifest import DTYPES, Manifest, SavedBox, open_regular
from parallax.errors import CheckpointError
from parallax.params import Box

__all__ = [
    "NAMES",
    "as_bytes",
    "hash_file",
    "read_box",
    "read_part",
    "shard_header",
    "sync_directory",
    "write_exclusive",
    "write_shard",
    "write_stream",
]

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_NUMPY = {"F64": "<f8", "F32": "<f4", "BF16": "<i2", "F16": "<i2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_TORCH = {name: dtype for dtype, name in NAMES.items()}
BLOCK_BYTES = 1 << 22


def write_exclusive(path: Path, pieces: Sequence[bytes | memoryview]) -> None:
    """Write a new file and fsync it. It must not exist, and no link is followed."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for piece in pieces:
            _write_all(file.fileno(), piece)
        os.fsync(file.fileno())


def _write_all(descriptor: int, piece: bytes | memoryview) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def write_shard(path: Path, named: Sequence[tuple[str, Tensor]]) -> tuple[int, str, list[int]]:
    """Write tensors as one safetensors file, a tensor at a time: the extra memory is one tensor.

    Returns its bytes, its sha256, and each tensor's offset in the file.
    """
    header, offsets, size = shard_header([(name, NAMES[t.dtype], tuple(t.shape)) for name, t in named])
    digest = hashlib.sha256()

    def data() -> Iterator[memoryview]:
        for _, tensor in named:
            yield as_bytes(tensor)

    write_stream(path, itertools.chain([memoryview(header)], data()), digest.update)
    return size, digest.hexdigest(), offsets


def shard_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[int], int]:
    """The first bytes of a safetensors file of these (name, dtype, shape), each tensor's offset, the file's size."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, at = [], 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        offsets.append(at)
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [start + offset for offset in offsets], start + at


def write_stream(
    path: Path, pieces: Iterable[memoryview], seen: Callable[[memoryview], object] = lambda block: None
) -> None:
    """Write a new file of these pieces, one after the other, and fsync it. seen: told of every block."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for piece in pieces:
            for begin in range(0, len(piece), BLOCK_BYTES):
                seen(piece[begin : begin + BLOCK_BYTES])  # hashed while it is in the cache
                _write_all(file.fileno(), piece[begin : begin + BLOCK_BYTES])
        os.fsync(file.fileno())


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def sync_directory(path: Path) -> None:
    """fsync a directory, so that the names in it survive a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_box(manifest: Manifest, saved: SavedBox, dtype: str, wanted: Box) -> Tensor:
    """The part `wanted` (global coordinates) of a saved box. Only the pages that hold it are read."""
    cut = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(wanted, saved.box, strict=True))
    return read_part(manifest.path.parent / saved.file, saved.offset, saved.shape, dtype, cut)


def read_part(path: Path, offset: int, shape: tuple[int, ...], dtype: str, cut: tuple[slice, ...]) -> Tensor:
    """A part of the row-major tensor at `offset` of a file. Only the pages that hold it are read."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            count = math.prod(shape) * DTYPES[dtype]
            flat = np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(count,))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    part = np.array(flat.view(_NUMPY[dtype]).reshape(shape)[cut])  # a copy, so that the file can be closed
    return torch.from_numpy(part).view(_TORCH[dtype])
