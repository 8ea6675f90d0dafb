"""Saving beside the training: the step waits for a copy in the host's memory alone.

Threads must not talk on the groups that the training talks on. So the ranks' threads meet in the temporary directory:
each leaves a record beside its file, and rank 0's waits for all of them, writes the manifest and renames. Until
then there is no checkpoint, and after it there is a whole one, as with a save that is waited for.
"""

from __future__ import annotations

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

POLL_S = 0.02
MAX_RECORD_BYTES = 1 << 28
RECORD = "record-{:05d}.json"


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
        kept.copy_(entry.tensor.detach(), non_blocking=True)
        copies.append(replace(entry, tensor=kept))
    if any(entry.tensor.is_cuda for entry in entries):
        torch.cuda.current_stream().synchronize()
    return copies


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
        self.thread = threading.Thread(target=self._work, args=(copies,), name=f"save-{step}", daemon=True)
        self.thread.start()
        self.stall_s = time.perf_counter() - begun_s

    @property
    def done(self) -> bool:
        return not self.thread.is_alive()

    def _work(self, copies: list[Entry]) -> None:
        begun_s = time.perf_counter()
        try:
            record = self._begun.write(copies)
            copies.clear()
            self.error = record["error"]
            text = json.dumps(record).encode()
            store_of(self.target).write(self._begun.temporary / RECORD.format(self._begun.rank), [text])
            if self._begun.rank == 0:
                self._close()
        except Exception as problem:  # noqa: BLE001 - a thread's error is told by the main thread
            self.error = f"{self.target} cannot be saved: {problem}"
        if self.error is not None and self._begun.rank == 0:
            self._begun.give_up()
        self.took_s = time.perf_counter() - begun_s

    def _close(self) -> None:
        paths = [self._begun.temporary / RECORD.format(rank) for rank in range(self._size)]
        records = [self._read(path) for path in paths]
        self.error = next((record["error"] for record in records if record["error"]), None)
        if self.error is not None:
            return
        for path in paths:
            store_of(path).delete(path)
        self.error = self._begun.finish(records)
        if self.error is None and self._keep:
            self.warning = thin_out(self.target.parent, self._keep, self._keep_every, self.target)

    def _read(self, path: Place) -> dict[str, Any]:
        """A rank's record, once it is whole."""
        store = store_of(path)
        while True:
            try:
                return json.loads(store.read(path, MAX_RECORD_BYTES))
            except FileNotFoundError:
                store.sizes(self._begun.temporary)  # raises where the directory is gone as well
            except ValueError:
                pass  # it is being written
            time.sleep(POLL_S)
