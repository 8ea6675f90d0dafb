"""Saving beside the training: the step waits for a copy in the host's memory alone.

Threads must not talk on the groups that the training talks on. So the ranks' threads meet where the files are: each
leaves a record beside its file, or an empty file where there is no space for a record, and rank 0's waits for all of
them, writes the manifest and renames. Until then there is no checkpoint, and after it there is a whole one, as with a
save that is waited for. What cannot be told that way is told when the next save waits for this one.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallax.checkpoint.place import Place
from parallax.checkpoint.save import Begun, Entry, Exchange, begin, thin_out
from parallax.checkpoint.store import store_of
from parallax.params import Box

__all__ = ["BackgroundSave", "Staging"]

POLL_S, MOST_POLL_S = 0.02, 1.0
LATE_S = 60.0
"""How long after a rank has ended its record may stay unseen: network file systems keep listings for so long."""
MAX_RECORD_BYTES = 1 << 28


Staging = dict[tuple[str, Box], Tensor]
"""Copies of the entries that a rank writes, by name and box."""


def _copies(entries: Sequence[Entry], staging: Staging) -> list[Entry]:
    """The entries with their tensors copied into the host's memory."""
    for gone in set(staging) - {(entry.name, entry.box) for entry in entries}:
        del staging[gone]
    copies = []
    for entry in entries:
        kept = staging.get((entry.name, entry.box))
        if kept is None or kept.dtype != entry.tensor.dtype:
            kept = torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype, pin_memory=entry.tensor.is_cuda)
            staging[entry.name, entry.box] = kept
        _copy(entry.tensor, kept)
        copies.append(replace(entry, tensor=kept))
    if any(entry.tensor.is_cuda for entry in entries):
        torch.cuda.current_stream().synchronize()
    return copies


def _copy(tensor: Tensor, kept: Tensor) -> None:
    kept.copy_(tensor.detach(), non_blocking=True)


class BackgroundSave:
    """One save under way. `thread` ends when this rank's part is done; rank 0's when the checkpoint is there.

    staging: a dict that keeps the memory of the copies for the next save: new memory costs six times the copying.
    error: what went wrong, once `done`; warning: what went wrong with older checkpoints, when this one was complete.
    stall_s: how long the training waited. Made on all ranks together: collectives and errors as those of `begin`.
    """

    def __init__(
        self,
        directory: Place,
        step: int,
        entries: Sequence[Entry],
        state: Mapping[str, Any],
        exchange: Exchange,
        *,
        keep: int = 0,
        keep_every: int = 0,
        staging: Staging | None = None,
    ) -> None:
        begun_s = time.perf_counter()
        self._begun: Begun = begin(directory, step, entries, state, exchange)
        copies = _copies(self._begun.mine, {} if staging is None else staging)
        self._size, self._keep, self._keep_every = exchange.size, keep, keep_every
        self.error: str | None = None
        self.warning: str | None = None
        self.target = self._begun.target
        self.took_s = 0.0
        self._others_error: str | None = None
        self._others_ended = threading.Event()
        self.thread = threading.Thread(target=self._work, args=(copies,), name=f"save-{step}", daemon=True)
        self.thread.start()
        self.stall_s = time.perf_counter() - begun_s

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def wait(self, exchange: Exchange) -> str | None:
        """Return once the save has ended on every rank, with what went wrong on any. Collectives: two of JSON.

        The others tell rank 0 here that they have ended, and how: so it waits for none whose word cannot get through
        by way of the store.
        """
        if exchange.rank:
            self.thread.join()
        others = exchange.gather_json(self.error if exchange.rank else None)
        self._others_error = next((error for error in others if error), None)
        self._others_ended.set()
        self.thread.join()
        return next((error for error in [self._others_error, *exchange.gather_json(self.error)] if error), None)

    def end(self, timeout_s: float) -> bool:
        """Give the save so much time to end; whether it has, on this rank. Not a collective: for a run that fails.

        The other ranks wait for rank 0's part: a launcher ends all when the first has gone.
        """
        until_s = time.monotonic() + timeout_s
        self.thread.join(timeout_s)
        with contextlib.suppress(OSError):
            while self._begun.rank and time.monotonic() < until_s and store_of(self.target).sees(self._begun.draft):
                time.sleep(POLL_S)
        return self.done

    def _work(self, copies: list[Entry]) -> None:
        begun_s = time.perf_counter()
        begun, complete = self._begun, False
        try:
            record = begun.write(copies)
            copies.clear()
            self.error = record["error"]
            if begun.rank:
                self._leave(record)
            else:
                records = [json.loads(json.dumps(record)), *self._records()]
                self.error = next((found["error"] for found in records if found["error"]), None)
                if self.error is None:
                    self.error = begun.finish(records)
                    complete = self.error is None
                if complete and self._keep:
                    self.warning = thin_out(self.target.parent, self._keep, self._keep_every, self.target)
        except Exception as problem:  # noqa: BLE001 - a thread's error is told by the main thread
            if complete:
                self.warning = f"{self.target} is saved, but then: {problem}"
            else:
                self.error = self.error or f"{self.target} cannot be saved: {problem}"
        if self.error is not None and begun.rank == 0:
            begun.give_up()
        self.took_s = time.perf_counter() - begun_s

    def _leave(self, record: Mapping[str, Any]) -> None:
        """Tell rank 0 what to say of this rank's file; where there is no space for that, that there is none."""
        store, draft, rank = store_of(self.target), self._begun.draft, self._begun.rank
        try:
            store.put(draft.file("record", rank, ".json"), json.dumps(record).encode())
        except Exception as problem:  # noqa: BLE001
            self.error = self.error or f"{self.target} cannot be saved: {problem}"
            store.put(draft.file("failed", rank), b"")

    def _records(self) -> list[dict[str, Any]]:
        """What the other ranks have left, once all have: then none writes any more."""
        store, draft = store_of(self.target), self._begun.draft
        others, pause_s, late_s = range(1, self._size), POLL_S, LATE_S
        while True:
            names = store.sizes(draft.place) if others else {}
            failed = [rank for rank in others if draft.file("failed", rank).name in names]
            paths = {rank: draft.file("record", rank, ".json") for rank in others if rank not in failed}
            missing = [rank for rank, path in paths.items() if path.name not in names]
            if not missing:
                break
            if self._others_ended.wait(pause_s):
                if self._others_error is not None or late_s <= 0:
                    lost = f"{self.target} cannot be saved: rank {missing[0]} has ended, and nothing of it is there"
                    return [{"error": self._others_error or lost}]
                time.sleep(pause_s)
                late_s -= pause_s
            pause_s = min(2 * pause_s, MOST_POLL_S)
        if failed:
            return [{"error": f"{self.target} cannot be saved: rank {failed[0]} cannot write there"}]
        records = []
        for path in paths.values():
            records.append(json.loads(store.read(path, MAX_RECORD_BYTES)))
            store.delete(path)
        return records
