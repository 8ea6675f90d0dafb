"""A checkpoint written anew, cut in other boxes, by one process and a block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from parallax.checkpoint.files import as_bytes, check_file, read_global, row_blocks, stream_shard
from parallax.checkpoint.manifest import Manifest
from parallax.checkpoint.place import Place
from parallax.checkpoint.save import box_name, discard, file_record, finish, shard
from parallax.checkpoint.store import Draft, store_of
from parallax.errors import CheckpointError
from parallax.params import Box

__all__ = ["check_hashes", "rewrite"]


def rewrite(
    manifest: Manifest, directory: Place, state: Mapping[str, Any], files: Sequence[Sequence[tuple[str, Box]]]
) -> Place:
    """Write DIRECTORY/step-N with the tensors of a checkpoint; returns it once it is complete and durable.

    files: the boxes (tensor, box) that each rank's file holds, all of them together each tensor once. Memory: a block.
    Raises CheckpointError; nothing is left then.
    """
    check_hashes(manifest)
    target = directory / f"step-{manifest.step:08d}"
    store = store_of(directory)
    try:
        draft = store.start(directory, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be saved: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{target} cannot be saved: {error}") from None
    done = False
    try:
        records = [_write(manifest, draft, rank, boxes) for rank, boxes in enumerate(files) if boxes]
        if problem := finish(draft, target, manifest.step, state, records):
            raise CheckpointError(problem)
        done = True
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be saved: {error.strerror} in {error.filename or draft.place}"
        ) from None
    finally:
        if not done:
            discard(draft)
    return target


def check_hashes(manifest: Manifest) -> None:
    """Raise CheckpointError unless every file is the one that was saved."""
    for name in sorted(manifest.files):
        check_file(manifest, name, thorough=True)


def _write(manifest: Manifest, draft: Draft, rank: int, boxes: Sequence[tuple[str, Box]]) -> dict[str, Any]:
    """A rank's file, and what the manifest must say of it."""

    def data() -> Iterator[memoryview]:
        for name, box in boxes:
            for block, _ in row_blocks(box):
                yield as_bytes(read_global(manifest, name, block))

    path = shard(draft, rank)
    shapes = [tuple(stop - start for start, stop in box) for _, box in boxes]
    described = [
        (box_name(name, box), manifest.tensors[name].dtype, shape)
        for (name, box), shape in zip(boxes, shapes, strict=True)
    ]
    written = stream_shard(path, described, data())
    found = [
        {
            "name": name,
            "global_shape": manifest.tensors[name].global_shape,
            "dtype": manifest.tensors[name].dtype,
            "offset": offset,
            "box": box,
        }
        for (name, box), offset in zip(boxes, written.offsets, strict=True)
    ]
    return file_record(path.name, written, found)
