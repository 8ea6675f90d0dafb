"""Loading: box by box, from whatever mesh saved it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from parallax.checkpoint.files import NAMES, check_file, read_box_into, row_blocks
from parallax.checkpoint.manifest import Manifest, overlaps, read_manifest
from parallax.checkpoint.place import Place
from parallax.checkpoint.save import Entry, Exchange, agree, check_entry, raise_first
from parallax.errors import CheckpointError, DamagedCheckpoint, ParallaxError

__all__ = ["load"]


@torch.no_grad()
def load(path: Place, entries: Sequence[Entry], exchange: Exchange, *, leaves: Sequence[str] = ()) -> Mapping[str, Any]:
    """Fill every entry from a checkpoint; returns the state that was saved with it.

    Every tensor in it must be wanted by some rank's entries, or be named in some rank's `leaves`.

    A rank reads only the slices that its boxes meet. Nothing is changed before manifest, names, shapes, dtypes and
    hashes have been checked on every rank; the files' hashes are shared out over the ranks. Collectives: exchanges of
    JSON. Raises CheckpointError on every rank alike: DamagedCheckpoint where the files are not what was saved.
    """
    manifest: list[Manifest] = []
    unread = attempt(lambda: manifest.append(read_manifest(path)))
    unfit = attempt(lambda: _check_entries(manifest[0], entries)) if manifest else None
    told = exchange.gather_json([unread, unfit, [*(e.name for e in entries), *leaves]])
    raise_first([one[0] for one in told], DamagedCheckpoint)
    raise_first([one[1] for one in told])
    _check_names(manifest[0], [one[2] for one in told])  # of every rank: so all come to the same end
    agree(attempt(lambda: _check_hashes(manifest[0], exchange)), exchange, DamagedCheckpoint)
    agree(attempt(lambda: _fill(manifest[0], entries)), exchange)
    return manifest[0].state


def attempt(check: Callable[[], Any]) -> str | None:
    try:
        check()
    except ParallaxError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def _check_entries(manifest: Manifest, entries: Sequence[Entry]) -> None:
    for entry in entries:
        saved = manifest.tensors.get(entry.name)
        if saved is None:
            raise CheckpointError(
                f"{manifest.path} has no {entry.name}; it was saved by another model or optimizer: check the model.* "
                "and optimizer.* keys"
            )
        if saved.global_shape != entry.global_shape:
            raise CheckpointError(
                f"{manifest.path} has {entry.name} of shape {saved.global_shape}, this model wants "
                f"{entry.global_shape}; check the model.* keys"
            )
        wanted = NAMES.get(entry.tensor.dtype, str(entry.tensor.dtype))
        if saved.dtype != wanted:
            keys = "dtype" if entry.name.startswith("parameters/") else "dtype and optimizer.state_dtype"
            raise CheckpointError(
                f"{manifest.path} has {entry.name} as {saved.dtype}, this run wants {wanted}; set {keys} as before"
            )
        check_entry(entry)


def _check_names(manifest: Manifest, gathered: Sequence[Sequence[str]]) -> None:
    unused = sorted(set(manifest.tensors) - {name for names in gathered for name in names})
    if unused:
        shown = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        raise CheckpointError(
            f"{manifest.path} holds what this run does not have: {shown}; check the model.* and optimizer.* keys"
        )


def _check_hashes(manifest: Manifest, exchange: Exchange) -> None:
    for name in sorted(manifest.files)[exchange.rank :: exchange.size]:
        check_file(manifest, name)


def _fill(manifest: Manifest, entries: Sequence[Entry]) -> None:
    for entry in entries:
        saved = manifest.tensors[entry.name]
        filled = 0
        for box, shared in overlaps(saved, entry.box):
            cut = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(shared, entry.box, strict=True))
            target = entry.tensor[cut]
            for block, rows in row_blocks(shared):  # so that what is read lies twice in memory as one block alone
                read_box_into(manifest, box, saved.dtype, block, target[rows])
            filled += target.numel()
        if filled != entry.tensor.numel():  # the manifest's boxes tile the tensor, so this cannot be
            raise CheckpointError(f"{manifest.path}: {entry.name} is not covered")
