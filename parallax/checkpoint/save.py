"""Saving: each rank its boxes, into a directory that gets its name last."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from parallax.checkpoint.files import NAMES, Written, write_shard
from parallax.checkpoint.manifest import FORMAT, VERSION, check_name, parse_manifest, read_manifest, seal
from parallax.checkpoint.place import Place, place
from parallax.checkpoint.store import MANIFEST, STEP, Draft, Store, store_of
from parallax.errors import CheckpointError
from parallax.params import Box

__all__ = ["Begun", "Entry", "Exchange", "begin", "find", "latest", "prune", "save", "step_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One box of one global tensor as this rank holds it. tensor: its data, written on save, filled on load.

    replicas: the global ranks that hold this very box, the same tuple on each of them.
    """

    name: str
    global_shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    replicas: tuple[int, ...]


class Exchange(Protocol):
    """How the ranks talk: every rank's JSON value on every rank."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather_json(self, value: Any) -> list[Any]: ...


def agree(error: str | None, exchange: Exchange, kind: type[CheckpointError] = CheckpointError) -> None:
    """Raise `kind` on every rank if any rank has an error, so that nobody waits for one that gave up."""
    raise_first(exchange.gather_json(error), kind)


def raise_first(errors: Sequence[str | None], kind: type[CheckpointError] = CheckpointError) -> None:
    """Raise `kind` if any rank has an error; errors: of every rank."""
    if found := [(rank, text) for rank, text in enumerate(errors) if text is not None]:
        rank, text = found[0]
        raise kind(text if len(errors) == 1 or len(found) == len(errors) else f"{text} (rank {rank})")


def save(
    directory: Place,
    step: int,
    entries: Sequence[Entry],
    state: Mapping[str, Any],
    exchange: Exchange,
    *,
    keep: int = 0,
    keep_every: int = 0,
    told: list[str] | None = None,
) -> Place:
    """Write DIRECTORY/step-N. Returns it once it is complete and durable.

    Of ranks that hold the same box one writes it, chosen by a hash of its name so that the work is spread. Files are
    written to a temporary directory, fsynced and hashed; the manifest is written by rank 0; the rename comes last.
    keep: how many checkpoints stay, newest first; 0 is all. keep_every: those of a multiple of so many steps stay
    too. told: gets what went wrong afterwards, when the checkpoint is there and only older ones could not be deleted.
    Collectives: exchanges of JSON.
    Raises CheckpointError on every rank if any fails; what was there before is untouched.
    """
    begun = begin(directory, step, entries, state, exchange)
    try:
        records = exchange.gather_json(begun.write(begun.mine))
        agree(next((r["error"] for r in records if r["error"]), None), exchange)
        error = begun.finish(records) if exchange.rank == 0 else None
        agree(error, exchange)
    except CheckpointError:
        if exchange.rank == 0:
            begun.give_up()
        raise
    if exchange.rank == 0 and keep and (warning := thin_out(directory, keep, keep_every, begun.target)):
        (told if told is not None else []).append(warning)
    return begun.target


@dataclass(frozen=True, slots=True)
class Begun:
    """A save whose place is there. mine: the entries that this rank writes. None of its methods talks to
    other ranks, so they may run in a thread.
    """

    target: Place
    draft: Draft
    step: int
    state: Mapping[str, Any]
    rank: int
    mine: Sequence[Entry]

    def write(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """Write this rank's file, durably. Returns what the manifest must say of it, and `error`: what went wrong."""
        try:
            return {"error": None, **(_write(self.draft, self.rank, entries) if entries else {})}
        except OSError as problem:
            what = f"{problem.strerror or problem} in {problem.filename or self.draft.place}"
        except Exception as problem:  # noqa: BLE001 - raised here alone, it would leave the others waiting
            what = f"{type(problem).__name__}: {problem}"
        with contextlib.suppress(OSError):  # half a file takes the space that telling of it may need
            store_of(self.target).delete(shard(self.draft, self.rank))
        return {"error": f"{self.target} cannot be saved: {what}"}

    def finish(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Write the manifest and give the directory its name. Returns what went wrong. For one rank."""
        return finish(self.draft, self.target, self.step, self.state, records)

    def give_up(self) -> None:
        """Delete what was written."""
        discard(self.draft)


def begin(directory: Place, step: int, entries: Sequence[Entry], state: Mapping[str, Any], exchange: Exchange) -> Begun:
    """Check what is to be saved and make a place for it. Collectives: three exchanges of JSON.

    Raises CheckpointError on every rank alike.
    """
    target, store = directory / f"step-{step:08d}", store_of(directory)
    error: str | None = None
    draft: Draft | None = None
    try:
        for entry in entries:
            check_entry(entry)
        if exchange.rank == 0:
            _check_state(step, state)
            draft = store.start(directory, target)
    except (OSError, CheckpointError) as problem:
        error = f"{target} cannot be saved: {problem}"
    try:
        agree(error, exchange)
        where = exchange.gather_json([str(draft.place), draft.mark] if draft else None)[0]
        shared = Draft(place(where[0]), where[1])
        agree(_unseen(store, shared, target), exchange)
    except CheckpointError:
        if draft is not None:
            discard(draft)
        raise
    # A rank that has two stages may hold a tied parameter twice.
    once = {(e.name, e.box): e for e in entries}.values()
    mine = [e for e in once if e.replicas[pick(e.name, e.box, len(e.replicas))] == exchange.rank]
    return Begun(target, shared, step, state, exchange.rank, mine)


def _unseen(store: Store, draft: Draft, target: Place) -> str | None:
    """What keeps this rank from writing where rank 0 will look for it."""
    try:
        if store.sees(draft):
            return None
        problem = "not every rank sees what rank 0 has made there; take a place that all ranks share"
    except (OSError, CheckpointError) as error:
        problem = str(error)
    return f"{target} cannot be saved: {problem}"


def discard(draft: Draft) -> None:
    """Delete what a save has written that came to nothing."""
    with contextlib.suppress(OSError):
        store_of(draft.place).give_up(draft)


def check_entry(entry: Entry) -> None:
    """Raise CheckpointError unless the entry can be saved, and its box lies in its tensor and has its shape."""
    check_name(entry.name)
    shape = tuple(stop - start for start, stop in entry.box)
    inside = len(entry.box) == len(entry.global_shape) and all(
        0 <= start < stop <= size for (start, stop), size in zip(entry.box, entry.global_shape, strict=True)
    )
    if not inside or tuple(entry.tensor.shape) != shape:
        raise CheckpointError(
            f"{entry.name}: a tensor of {tuple(entry.tensor.shape)} is not box {entry.box} of {entry.global_shape}"
        )
    if entry.tensor.dtype not in NAMES:
        raise CheckpointError(
            f"{entry.name} is {entry.tensor.dtype}; what can be saved is {', '.join(map(str, NAMES))}"
        )


def _check_state(step: int, state: Mapping[str, Any]) -> None:
    if step < 0:
        raise CheckpointError(f"step {step} is below 0")
    try:
        json.dumps(dict(state), allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise CheckpointError(f"its state is not JSON: {problem}") from None


def pick(name: str, box: Box, count: int) -> int:
    """Which of `count` holders of the same box writes it: spread by a hash, the same on every rank."""
    text = f"{name}{box}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % count


def shard(draft: Draft, rank: int) -> Place:
    """A rank's file."""
    found: Place = draft.file("rank", rank, ".safetensors")
    return found


def _write(draft: Draft, rank: int, entries: Sequence[Entry]) -> dict[str, Any]:
    """This rank's file, and what the manifest must say of it."""
    path = shard(draft, rank)
    written = write_shard(path, [(box_name(e.name, e.box), e.tensor) for e in entries])
    boxes = [
        {
            "name": e.name,
            "global_shape": e.global_shape,
            "dtype": NAMES[e.tensor.dtype],
            "offset": offset,
            "box": e.box,
        }
        for e, offset in zip(entries, written.offsets, strict=True)
    ]
    return file_record(path.name, written, boxes)


def file_record(name: str, written: Written, boxes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `finish` must know of a file."""
    sums = {"bytes": written.bytes, "sha256": written.sha256, "crc32": written.crc32}
    return {"file": name, **sums, "boxes": boxes}


def box_name(name: str, box: Box) -> str:
    """What a box of a tensor is called in its file: one that any reader of safetensors can show."""
    return f"{name}#{','.join(f'{start}:{stop}' for start, stop in box)}"


def finish(
    draft: Draft, target: Place, step: int, state: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> str | None:
    """Write the manifest and give the directory its name. Returns what went wrong, a file that is not there included:
    a rank may have written into a store that is its own.
    """
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for record in records:
        if "file" not in record:
            continue
        files[record["file"]] = {key: record[key] for key in ("bytes", "sha256", "crc32")}
        for box in record["boxes"]:
            tensor = tensors.setdefault(
                box["name"], {"global_shape": box["global_shape"], "dtype": box["dtype"], "boxes": []}
            )
            if (box["global_shape"], box["dtype"]) != (tensor["global_shape"], tensor["dtype"]):
                return f"{target} cannot be saved: ranks disagree on the shape or dtype of {box['name']}"
            tensor["boxes"].append({"file": record["file"], "offset": box["offset"], "box": box["box"]})
    manifest = {"format": FORMAT, "version": VERSION, "step": step, "state": dict(state)}
    manifest |= {"files": files, "tensors": tensors}
    try:
        text = seal(json.dumps(manifest, allow_nan=False).encode())
        num_bytes = sum(file["bytes"] for file in files.values())
        parse_manifest(text, draft.place / MANIFEST, num_bytes)  # what could not be loaded is not saved
        found = store_of(target).sizes(draft.place)
        for name, file in files.items():
            if found.get(name) != file["bytes"]:
                seen = f"{found[name]} bytes" if name in found else "nothing"
                return f"{target} cannot be saved: a rank wrote {file['bytes']} bytes of {name}, and {seen} is there"
        return store_of(target).commit(draft, target, text)
    except (OSError, ValueError) as problem:
        return f"{target} cannot be saved: {problem}"


def find(directory: Place) -> list[Place]:
    """The complete checkpoints of a directory, oldest first: computed from what is there, never stored."""
    store = store_of(directory)
    try:
        found = sorted((int(match[1]), name) for name in store.sizes(directory) if (match := STEP.fullmatch(name)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [directory / name for _, name in found if _is_complete(store, directory / name)]


def _is_complete(store: Store, path: Place) -> bool:
    try:
        return store.sizes(path).get(MANIFEST) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False  # a file of that name, or deleted meanwhile


def latest(directory: Place) -> Place | None:
    """The newest complete checkpoint."""
    found = find(directory)
    return found[-1] if found else None


def prune(
    directory: Place,
    keep: int,
    keep_every: int = 0,
    saved: Place | None = None,
    check: Callable[[Place], object] = read_manifest,
) -> list[Place]:
    """Delete what is older than the newest `keep` that are sound, but multiples of keep_every, and the one just saved,
    which a run that went back may have below them. Returns what is gone.

    check: raises CheckpointError or OSError where one is not sound. Of those that are not, the ones among the newest
    stay as well: they count for nothing, and someone may want to look at them.
    """
    sound, old = 0, []
    for path in reversed(find(directory)) if keep > 0 else []:
        if sound < keep:
            sound += path == saved or _passes(check, path)
        elif path != saved and not (keep_every and step_of(path) % keep_every == 0):
            old.append(path)
    gone = []
    for path in reversed(old):
        try:
            store_of(path).remove(path)
        except OSError:
            continue  # it stays; the next save tries again
        gone.append(path)
    return gone


def _passes(check: Callable[[Place], object], path: Place) -> bool:
    try:
        check(path)
    except (CheckpointError, OSError):
        return False
    return True


def thin_out(directory: Place, keep: int, keep_every: int, saved: Place) -> str | None:
    """As `prune`, once a checkpoint is complete: what fails then is no failure of the save. Returns what to say."""
    try:
        prune(directory, keep, keep_every, saved)
    except (CheckpointError, OSError) as problem:
        return f"{saved} is saved, but older checkpoints could not be deleted: {problem}"
    return None


def step_of(path: Place) -> int:
    """The step in a checkpoint's name."""
    match = STEP.fullmatch(path.name)
    return int(match[1]) if match else -1
