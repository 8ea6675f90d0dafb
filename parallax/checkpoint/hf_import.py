"""Parameters from a Hugging Face directory: each rank reads the slices that its boxes are, and no more."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from parallax.checkpoint.files import read_part, row_blocks
from parallax.checkpoint.hf_files import StoredTensor, read_hf_headers
from parallax.checkpoint.hf_names import IGNORED, TIED_HEAD, HfTensor, Part, hf_tensors, parts_of
from parallax.checkpoint.load import attempt
from parallax.checkpoint.save import Entry, Exchange, agree, check_entry
from parallax.config import Config
from parallax.config_hf import disagreements, read_hf_config
from parallax.errors import CheckpointError, ConfigError
from parallax.params import Box
from parallax.plain_files import open_regular

__all__ = ["COMPANIONS", "copy_companions", "load_hf"]

PREFIX = "parameters/"
FLOATS = ("F64", "F32", "BF16", "F16")
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""What goes with the weights: the tokenizer in all its forms, and how to generate."""
MAX_COMPANION_BYTES = 1 << 30


@torch.no_grad()
def load_hf(directory: Path, entries: Sequence[Entry], config: Config, exchange: Exchange) -> None:
    """Fill the entries named parameters/* from a directory that save_pretrained wrote; the others stay as they are.

    Values are converted to the entries' dtype: with bfloat16 parameters the float32 masters get all the bits that the
    file has. Nothing is changed before config.json, headers, names and shapes have been checked on every rank.
    Memory: one block more. Collectives: exchanges of JSON. Raises CheckpointError or ConfigError on every rank alike.
    """
    directory = Path(directory)
    wanted = [entry for entry in entries if entry.name.startswith(PREFIX)]
    problems = _disagreements(config, directory)
    if found := next((p for p in exchange.gather_json(problems) if p), None):
        raise ConfigError(found)
    stored: dict[str, StoredTensor] = {}
    parts: dict[str, Part] = {}

    def prepare() -> None:
        family = read_hf_config(directory)["model_type"]
        tensors = hf_tensors(config.model, family, config.corpus.sequence_length)
        parts.update(parts_of(tensors))
        stored.update(_prefixed(read_hf_headers(directory), tensors))
        _check(directory, stored, tensors, config)
        for entry in wanted:
            check_entry(entry)
            part = parts.get(entry.name.removeprefix(PREFIX))
            if part is None or part.tensor.part_shape != entry.global_shape:
                raise CheckpointError(
                    f"{directory} has no {entry.name} of shape {entry.global_shape}; init_from is for the model of "
                    "parallax/models/transformer.py"
                )

    agree(attempt(prepare), exchange)
    agree(attempt(lambda: _fill(directory, wanted, stored, parts)), exchange)


def _disagreements(config: Config, directory: Path) -> str:
    try:
        return "; ".join(disagreements(config, read_hf_config(directory)))
    except ConfigError as error:
        return str(error)


def _prefixed(stored: Mapping[str, StoredTensor], tensors: Sequence[HfTensor]) -> dict[str, StoredTensor]:
    """With the names of a model that has a head: one saved without it leaves out the `model.` or `transformer.`"""
    prefix = tensors[0].name.partition(".")[0] + "."
    whole = any(name.startswith(prefix) for name in stored)
    return {
        name if whole or name == TIED_HEAD else prefix + name: tensor
        for name, tensor in stored.items()
        if not re.fullmatch(IGNORED, name)
    }


def _check(directory: Path, stored: Mapping[str, StoredTensor], tensors: Sequence[HfTensor], config: Config) -> None:
    """Every tensor is there, in its shape, as floats; and nothing else is."""
    wanted = {tensor.name: tensor for tensor in tensors}
    for name, tensor in wanted.items():
        if name not in stored:
            raise CheckpointError(
                f"{directory} has no {name}; its config.json is of another model, or a file is missing"
            )
        shape = stored[name].shape
        if shape != tensor.shape:
            raise CheckpointError(f"{directory} has {name} of shape {shape}, its config.json says {tensor.shape}")
    spare = {TIED_HEAD} if config.model.tie_embeddings else set()
    if extra := sorted(set(stored) - set(wanted) - spare):
        shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
        raise CheckpointError(f"{directory} holds what this model does not have: {shown}")
    if TIED_HEAD in spare & set(stored) and stored[TIED_HEAD].shape != (config.model.vocab, config.model.hidden):
        raise CheckpointError(f"{directory} has {TIED_HEAD} of shape {stored[TIED_HEAD].shape}, not the embedding's")
    if odd := [name for name, tensor in stored.items() if tensor.dtype not in FLOATS]:
        raise CheckpointError(
            f"{directory} has {odd[0]} as {stored[odd[0]].dtype}; weights must be {', '.join(FLOATS)}"
        )


def _fill(
    directory: Path, entries: Sequence[Entry], stored: Mapping[str, StoredTensor], parts: Mapping[str, Part]
) -> None:
    for entry in entries:
        name = entry.name.removeprefix(PREFIX)
        part = parts[name]
        twin = stored.get(TIED_HEAD) if name == "embedding.token.weight" and "head.weight" not in parts else None
        for block, rows in row_blocks(entry.box):
            values = _values(stored[part.tensor.name], part, block)
            if twin is not None and not values.equal(_values(twin, part, block)):
                raise CheckpointError(
                    f"{directory} ties the head to the embedding, but holds a {TIED_HEAD} that differs from it; set "
                    "tie_word_embeddings to false in its config.json to keep both"
                )
            entry.tensor[rows].copy_(values)


def _values(stored: StoredTensor, part: Part, box: Box) -> Tensor:
    values = read_part(stored.path, stored.offset, stored.shape, stored.dtype, part.cut(box))
    return values.t() if part.tensor.transposed else values


def copy_companions(source: Path, target: Path, names: Sequence[str] = COMPANIONS) -> list[str]:
    """Copy config.json, tokenizer and the like into a new directory; returns what was there. Raises CheckpointError."""
    present = [name for name in names if os.path.lexists(source / name)]
    try:
        target.mkdir(parents=True, exist_ok=True)
        if target.samefile(source):
            return present
        for name in present:
            with os.fdopen(open_regular(source / name), "rb") as read, (target / name).open("wb") as write:
                if os.fstat(read.fileno()).st_size > MAX_COMPANION_BYTES:
                    raise CheckpointError(f"{source / name} is larger than {MAX_COMPANION_BYTES} bytes; remove it")
                shutil.copyfileobj(read, write)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or source} cannot be copied into {target}: {error.strerror}; links are not followed: "
            "`hf download MODEL --local-dir DIR` writes files"
        ) from None
    return present
