"""A checkpoint as a Hugging Face model directory, written as a stream: never more than a block of it in memory."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallax.checkpoint.files import (
    NAMES,
    as_bytes,
    read_global,
    shard_header,
)
from parallax.checkpoint.hf_files import INDEX, SINGLE
from parallax.checkpoint.hf_import import COMPANIONS, PREFIX, copy_companions
from parallax.checkpoint.hf_names import HfTensor, hf_tensors
from parallax.checkpoint.manifest import DTYPES, Manifest, read_manifest
from parallax.checkpoint.place import Place
from parallax.checkpoint.reshard import check_hashes
from parallax.checkpoint.store import LocalStore, sync_directory
from parallax.config import Config, check, keys
from parallax.config_hf import family_of, make_hf_config, read_hf_config
from parallax.config_io import from_dict
from parallax.errors import CheckpointError, ConfigError, DamagedCheckpoint
from parallax.params import Box

__all__ = ["Export", "export_hf"]

BLOCK_ELEMENTS = 1 << 22
TORCH = {str(dtype).removeprefix("torch."): dtype for dtype in (*NAMES,)}


@dataclass(frozen=True, slots=True)
class Export:
    """What was written. num_bytes: of all weights."""

    path: Path
    family: str
    dtype: str
    num_tensors: int
    num_bytes: int
    files: Sequence[str]
    companions: Sequence[str]


def export_hf(
    checkpoint: Place,
    out: Path,
    *,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    companions: Path | None = None,
) -> Export:
    """Write OUT with config.json and safetensors that `AutoModelForCausalLM.from_pretrained` loads.

    family: llama, mistral, qwen3 or gpt2; that of the model from which the run began, else what the shape says.
    dtype: by torch's name; the run's unless told. Parameters are read from the masters. companions: where tokenizer
    files lie; OUTPUT/hf of the run unless told. OUT must be new or empty; it gets its name when all is written.
    Raises CheckpointError or ConfigError; nothing is left then.
    """
    manifest = read_manifest(checkpoint)
    config = _config(manifest)
    begun = _begun(manifest)
    origin = read_hf_config(begun) if begun is not None and os.path.lexists(begun / "config.json") else None
    known = companions or begun
    if companions is not None and not companions.is_dir():
        raise CheckpointError(f"{companions} is no directory; give one with tokenizer files, or leave it out")
    if family is None:
        family = _family(config, origin)
    dtype = dtype or config.dtype
    if dtype not in TORCH or NAMES[TORCH[dtype]] not in ("F64", "F32", "BF16", "F16"):
        raise ConfigError(f"dtype {dtype!r} is not supported; choose float32, bfloat16, float16 or float64")
    if max_shard_bytes < 1:
        raise ConfigError(f"max-shard-bytes={max_shard_bytes} is too small; choose at least 1")
    hf = make_hf_config(config, family, dtype, origin)
    tensors = hf_tensors(config.model, family, config.corpus.sequence_length)
    _check(manifest, tensors)
    check_hashes(manifest)
    shards = _shards(tensors, DTYPES[NAMES[TORCH[dtype]]], max_shard_bytes)
    temporary = _begin(out)
    try:
        files = _write(manifest, temporary, shards, TORCH[dtype])
        copied = []
        if known is not None and known.is_dir():
            copied = copy_companions(known, temporary, [name for name in COMPANIONS if name != "config.json"])
        LocalStore().write(temporary / "config.json", [json.dumps(hf, indent=2, sort_keys=True).encode() + b"\n"])
        sync_directory(temporary)
        os.rename(temporary, out)  # onto an empty directory too, onto no other
        sync_directory(out.absolute().parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror} ({error.filename})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    num_bytes = sum(math.prod(t.shape) for t in tensors) * DTYPES[NAMES[TORCH[dtype]]]
    return Export(out, family, dtype, len(tensors), num_bytes, files, copied)


def _begun(manifest: Manifest) -> Path | None:
    """Where init_from has put the tokenizer, OUTPUT/hf, for a checkpoint in OUTPUT/checkpoints."""
    return manifest.path.resolve().parent.parent.parent / "hf" if isinstance(manifest.path, Path) else None


def _config(manifest: Manifest) -> Config:
    """The run's configuration, from what was saved with the checkpoint."""
    saved = manifest.state.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(
            f"{manifest.path} holds no configuration, so its model is unknown; save it with the recipe"
        )
    try:
        config = from_dict(saved)
        others = [name for name in keys() if not name.startswith("model.")]  # a mesh or a schedule may be gone by now
        if problems := check(config, unread=others):
            raise ConfigError("; ".join(problems))
    except ConfigError as error:
        raise CheckpointError(
            f"{manifest.path} has a configuration that this parallax does not know: {error}"
        ) from None
    if config.model.layers > len(manifest.tensors):
        raise DamagedCheckpoint(f"{manifest.path} has {len(manifest.tensors)} tensors for {config.model.layers} layers")
    return config


def _family(config: Config, origin: Mapping[str, Any] | None) -> str:
    """That of the origin where the model still fits it, else what the shape says."""
    if origin is not None:
        try:
            make_hf_config(config, str(origin.get("model_type")), config.dtype, origin)
        except ConfigError:
            pass
        else:
            return str(origin["model_type"])
    return family_of(config.model)


def _check(manifest: Manifest, tensors: Sequence[HfTensor]) -> None:
    """The checkpoint holds the parameters that are to be written, in their shapes, and no other ones."""
    wanted = {name: tensor.part_shape for tensor in tensors for name in tensor.parts}
    saved = {n.removeprefix(PREFIX): t.global_shape for n, t in manifest.tensors.items() if n.startswith(PREFIX)}
    for name, shape in wanted.items():
        if saved.get(name) != shape:
            found = "none" if name not in saved else f"one of {saved[name]}"
            raise CheckpointError(f"{manifest.path} has {found} for {name} of shape {shape}; it is of another model")
    if extra := sorted(set(saved) - set(wanted)):
        raise CheckpointError(f"{manifest.path} holds {', '.join(extra[:5])}, which no Hugging Face family here has")


def _shards(tensors: Sequence[HfTensor], itemsize: int, most: int) -> list[list[HfTensor]]:
    """The tensors in order, in runs of at most `most` bytes; a larger tensor is a run of its own."""
    shards: list[list[HfTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def _begin(out: Path) -> Path:
    if out.is_symlink() or out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty directory; nothing is overwritten: choose another")
    temporary = out.absolute().parent / f".tmp-{out.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error.strerror} ({error.filename})") from None
    return temporary


def _write(manifest: Manifest, folder: Path, shards: Sequence[Sequence[HfTensor]], dtype: torch.dtype) -> list[str]:
    """The safetensors files, and the index if there is more than one. Returns their names."""
    total = len(shards)
    names = [f"model-{n:05d}-of-{total:05d}.safetensors" for n in range(1, total + 1)] if total > 1 else [SINGLE]
    kind = NAMES[dtype]
    for name, tensors in zip(names, shards, strict=True):
        header, _, _ = shard_header([(t.name, kind, t.shape) for t in tensors], {"format": "pt"})
        LocalStore().write(folder / name, _stream(header, manifest, tensors, dtype))
    if total > 1:
        placed = {t.name: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
        size = sum(math.prod(t.shape) for tensors in shards for t in tensors) * DTYPES[kind]
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        LocalStore().write(folder / INDEX, [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"])
    return names


def _stream(header: bytes, manifest: Manifest, tensors: Sequence[HfTensor], dtype: torch.dtype) -> Iterator[memoryview]:
    yield memoryview(header)
    for tensor in tensors:
        for block in _blocks(manifest, tensor):
            yield as_bytes(block.to(dtype))


def _blocks(manifest: Manifest, tensor: HfTensor) -> Iterator[Tensor]:
    """The stored tensor in runs of rows."""
    rows, *rest = tensor.shape
    step = max(1, BLOCK_ELEMENTS // math.prod(rest))
    for start in range(0, rows if tensor.parts else 0, step):
        stop = min(start + step, rows)
        if len(tensor.shape) == 1:  # several biases side by side: of them a run is all
            whole = torch.cat(
                [read_global(manifest, PREFIX + name, ((0, rows // len(tensor.parts)),)) for name in tensor.parts]
            )
            yield whole[start:stop]
            continue
        width = rest[0] // len(tensor.parts)
        box: Box = ((0, width), (start, stop)) if tensor.transposed else ((start, stop), (0, width))
        read = [read_global(manifest, PREFIX + name, box) for name in tensor.parts]
        yield torch.cat([part.t() if tensor.transposed else part for part in read], dim=1)
    if not tensor.parts:  # no parameter of ours: a bias that adds nothing
        yield torch.zeros(tensor.shape)
