"""What lies where in a directory of Hugging Face safetensors files. Nothing in them is believed unchecked.

The safetensors library takes duplicate keys, absurd ranks and any name; an index may point anywhere. So headers are
read here: their sizes and the memory they would take before anything is allocated, every shape against its bytes, the
bytes against the file, and that the tensors fill the file without gap or overlap. Shards are regular files beside the
index, by plain names.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax.checkpoint.manifest import DTYPES, MAX_DIMS
from parallax.errors import CheckpointError
from parallax.plain_files import open_regular
from parallax.plain_json import ROOM_BYTES, parse_json

__all__ = ["INDEX", "SINGLE", "StoredTensor", "read_hf_headers"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors library too."""
MAX_TENSORS = 1 << 20
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A row-major tensor: its first byte in a file, its dtype by safetensors' name."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str


def read_hf_headers(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model in a directory, by its name there. Raises CheckpointError that names the file."""
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give one that save_pretrained wrote")
    index, single = directory / INDEX, directory / SINGLE
    if os.path.lexists(index) and os.path.lexists(single):
        raise CheckpointError(f"{directory} has both {SINGLE} and {INDEX}; remove the one that is not meant")
    if os.path.lexists(single):
        return _header(single)
    if not os.path.lexists(index):
        raise CheckpointError(_nothing(directory))
    files = _index(index)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(files.values())):
        tensors = _header(directory / name)
        claimed = {tensor for tensor, file in files.items() if file == name}
        if odd := sorted(claimed ^ set(tensors)):
            where = "lacks" if odd[0] in claimed else "has, and the index does not put there,"
            raise CheckpointError(f"{directory / name} {where} {odd[0]}; the files are not of one model: copy it again")
        found |= tensors
    return found


def _nothing(directory: Path) -> str:
    text = f"{directory} has neither {SINGLE} nor {INDEX}"
    for name in PICKLES:
        if os.path.lexists(directory / name):
            return (
                f"{text}, only {name}, which is pickled and can run any code when it is read; convert it where you "
                "trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR) writes safetensors"
            )
    return f"{text}; give a directory that save_pretrained wrote"


def _read(path: Path, start: int, count: int) -> bytes:
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            file.seek(start)
            return file.read(min(count, os.fstat(file.fileno()).st_size))  # which allocates what it is asked for
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the model again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; it must be a regular file, no link: "
            "`hf download MODEL --local-dir DIR` writes such"
        ) from None


def _index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index."""
    text = _read(path, 0, MAX_HEADER_BYTES + 1)
    with os.scandir(path.parent) as entries:
        num_bytes = sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    try:
        if len(text) > MAX_HEADER_BYTES:
            raise ValueError(f"it is larger than {MAX_HEADER_BYTES} bytes")
        files = parse_json(text, ROOM_BYTES + 2 * num_bytes)["weight_map"]
        if not isinstance(files, dict) or not files:
            raise ValueError("its weight_map names no tensor")
        for file in files.values():
            if not isinstance(file, str) or not SHARD.fullmatch(file):
                raise ValueError(f"{file!r} is no plain name of a .safetensors file beside it")
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {_said(error)}; copy the model again") from None
    return files


def _header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file."""
    try:
        size = os.lstat(path).st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; copy the model again") from None
    length = int.from_bytes(_read(path, 0, 8), "little")
    try:
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header has {length} bytes, the file {size}")
        header = parse_json(_read(path, 8, length), ROOM_BYTES + 2 * size)
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise ValueError(f"it holds {len(header)} tensors")
        found = {name: _tensor(name, entry, path, 8 + length) for name, entry in header.items()}
        _check_filled(found, 8 + length, size)
    except (ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {_said(error)}; copy it again") from None
    return found


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__} {error}"


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{value!r} is no count")
    return value


def _tensor(name: str, entry: Any, path: Path, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or not isinstance(entry["shape"], list) or len(entry["shape"]) > MAX_DIMS:
        raise ValueError(f"{name} has no shape of at most {MAX_DIMS} dims")
    shape = tuple(map(_count, entry["shape"]))
    begin, end = map(_count, entry["data_offsets"])
    dtype = entry["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype!r}; what can be read is {', '.join(DTYPES)}, nothing quantised")
    if end - begin != math.prod(shape) * DTYPES[dtype]:
        raise ValueError(f"{name} of shape {shape} and {dtype} does not take {end - begin} bytes")
    return StoredTensor(path, start + begin, shape, dtype)


def _check_filled(tensors: Mapping[str, StoredTensor], start: int, size: int) -> None:
    """The tensors follow one another from the header to the end of the file."""
    at = start
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, math.prod(t.shape))):
        if tensor.offset != at:
            raise ValueError(f"its tensors overlap or leave a gap at byte {min(at, tensor.offset)}")
        at += math.prod(tensor.shape) * DTYPES[tensor.dtype]
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, the file at {size}: truncated or altered")
