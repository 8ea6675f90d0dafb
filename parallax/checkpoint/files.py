"""Shard files: the safetensors format, written as a stream with its hash, read by slices."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallax.checkpoint.manifest import DTYPES, Manifest, SavedBox, overlaps
from parallax.checkpoint.place import Place
from parallax.checkpoint.store import store_of
from parallax.errors import CheckpointError, DamagedCheckpoint
from parallax.params import Box

__all__ = [
    "NAMES",
    "as_bytes",
    "check_file",
    "read_box",
    "read_box_into",
    "read_global",
    "read_part",
    "row_blocks",
    "shard_header",
    "stream_shard",
    "write_shard",
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
BLOCK_ELEMENTS = 1 << 22
"""What lies in memory twice while it is read or written."""


@dataclass(frozen=True, slots=True)
class Written:
    """What the manifest must know of a shard file; offsets: where each tensor begins."""

    bytes: int
    sha256: str
    crc32: int
    offsets: Sequence[int]


def write_shard(path: Place, named: Sequence[tuple[str, Tensor]]) -> Written:
    """Write tensors as one safetensors file, a tensor at a time: the extra memory is one tensor."""
    described = [(name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in named]
    return stream_shard(path, described, (as_bytes(tensor) for _, tensor in named))


def stream_shard(
    path: Place, described: Sequence[tuple[str, str, tuple[int, ...]]], data: Iterable[memoryview]
) -> Written:
    """As `write_shard`, of tensors that are (name, dtype, shape) and whose bytes come piece by piece, in that order."""
    header, offsets, size = shard_header(described)
    sums = _Sums()
    store_of(path).write(path, itertools.chain([memoryview(header)], data), sums.update)
    return Written(size, sums.sha256.hexdigest(), sums.crc32, offsets)


class _Sums:
    def __init__(self) -> None:
        self.sha256, self.crc32 = hashlib.sha256(), 0

    def update(self, block: bytes | memoryview) -> None:
        self.sha256.update(block)
        self.crc32 = zlib.crc32(block, self.crc32)


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


def as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def check_file(manifest: Manifest, name: str, *, thorough: bool = False) -> None:
    """Raise DamagedCheckpoint unless a file is the one that was saved: by crc32, which shows any accident but one in
    four thousand million, or by sha256 where thorough.
    """
    path, file = manifest.path.parent / name, manifest.files[name]
    by_crc32 = file.crc32 is not None and not thorough
    digest, crc32 = hashlib.sha256(), 0
    for block in store_of(path).blocks(path):
        if by_crc32:
            crc32 = zlib.crc32(block, crc32)
        else:
            digest.update(block)
    if crc32 != file.crc32 if by_crc32 else digest.hexdigest() != file.sha256:
        kind = "crc32" if by_crc32 else "sha256"
        raise DamagedCheckpoint(f"{path} was altered: its {kind} is not the manifest's; take another checkpoint")


def read_box_into(manifest: Manifest, saved: SavedBox, dtype: str, wanted: Box, out: Tensor) -> None:
    """As `read_box`, into memory that is there."""
    first = _run(saved, wanted)
    if first is None or not (out.is_contiguous() and out.device.type == "cpu" and NAMES.get(out.dtype) == dtype):
        out.copy_(read_box(manifest, saved, dtype, wanted))
        return
    path = manifest.path.parent / saved.file
    try:
        store_of(path).read_into(path, saved.offset + first * DTYPES[dtype], as_bytes(out))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def read_box(manifest: Manifest, saved: SavedBox, dtype: str, wanted: Box) -> Tensor:
    """The part `wanted` (global coordinates) of a saved box."""
    path, first = manifest.path.parent / saved.file, _run(saved, wanted)
    if first is not None:
        shape = [stop - start for start, stop in wanted]
        count = math.prod(shape)
        at = saved.offset + first * DTYPES[dtype]
        return read_part(path, at, (count,), dtype, (slice(0, count),)).view(shape)
    cut = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(wanted, saved.box, strict=True))
    return read_part(path, saved.offset, saved.shape, dtype, cut)


def _run(saved: SavedBox, wanted: Box) -> int | None:
    """The first element of `wanted` in a saved box, where it lies there in one run; else None."""
    ones = next((dim for dim, (start, stop) in enumerate(wanted) if stop - start > 1), len(wanted))
    if wanted[ones + 1 :] != saved.box[ones + 1 :]:
        return None
    first = 0
    for (start, _), (begin, end) in zip(wanted, saved.box, strict=True):
        first = first * (end - begin) + start - begin
    return first


def read_part(path: Place, offset: int, shape: tuple[int, ...], dtype: str, cut: tuple[slice, ...]) -> Tensor:
    """A part of the row-major tensor at `offset` of a file. Only the pages that hold it are read."""
    try:
        part = store_of(path).read_part(path, offset, shape, np.dtype(_NUMPY[dtype]), cut)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return torch.from_numpy(part).view(_TORCH[dtype])


def read_global(manifest: Manifest, name: str, wanted: Box) -> Tensor:
    """One box of a saved tensor, from whatever boxes the checkpoint has it in."""
    saved = manifest.tensors[name]
    out = torch.empty([stop - start for start, stop in wanted], dtype=_TORCH[saved.dtype])
    filled = 0
    for part, shared in overlaps(saved, wanted):
        cut = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, wanted, strict=True))
        values = read_box(manifest, part, saved.dtype, shared)
        out[cut] = values
        filled += values.numel()
    if filled != out.numel():  # the manifest's boxes tile the tensor, so this cannot be
        raise CheckpointError(f"{manifest.path}: {name} is not covered")
    return out


def row_blocks(box: Box) -> Iterator[tuple[Box, tuple[slice, ...]]]:
    """A box in runs of at most BLOCK_ELEMENTS, each with its place in the box: rows, or a part of a long one."""
    if not box:
        yield box, ()
        return
    (start, stop), rest = box[0], box[1:]
    row = math.prod(last - first for first, last in rest)
    inner = [(rest, tuple(slice(0, last - first) for first, last in rest))]
    if row > BLOCK_ELEMENTS:
        inner = list(row_blocks(rest))
    step = max(1, BLOCK_ELEMENTS // max(1, row))
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        for part, places in inner:
            yield ((begin, end), *part), (slice(begin - start, end - start), *places)
