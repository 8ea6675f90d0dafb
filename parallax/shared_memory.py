"""Collectives of ranks on one machine's CPUs, through memory that they share instead of sockets.

Every rank of a group has two slots in one mapped file. A collective is: copy into the own slot, meet, read the others'.
The two slots take turns, so that one meeting is enough: whoever writes a slot again has met all others since they read
it. A meeting is a counter of each rank's own, which it alone writes, and the kernel's futex to sleep on another's. Sums
are in rank order, the same bits on every rank. Beside its counter each rank writes which call it makes, and all
compare: a rank that makes another one would else read, and give, garbage.

The file has no name from the moment that all have opened it, so nothing is left behind, however a rank ends. One that
dies is missed within a second by those who wait for it.

On x86-64 Linux alone: there the order of memory makes a counter written last be seen last, and futex is call 202.
PARALLAX_SHARED_MEMORY=0 keeps to sockets.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Board", "share"]

SHM = Path("/dev/shm")
LINE = 512
"""Bytes of a rank for its counter and, by turn, two texts that say what it calls."""
TEXT = 192
ABOUT = 120
"""Bytes of a text, and so many of the last letters of `about` in it."""
SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1
PATIENCE_S = 1
SPINS = 200
ALL_REDUCE = {"sum": "all-reduce (sum)", "max": "all-reduce (max)"}
LOCAL_SUM = 4
"""Up to so many ranks each adds up everything for itself, which spares a second meeting."""


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Board:
    """The shared memory of the ranks of one axis. Collective: all of them make the same calls in the same order.

    rank, ranks: of the axis, and their global numbers. pids: of their processes. slot_bytes: longer tensors go in
    parts. Every method raises RuntimeError, which names the rank, when one has died, does not come, or has made
    another call; about: more that must be the same on all.
    """

    def __init__(
        self, file: int, rank: int, ranks: Sequence[int], pids: Sequence[int], slot_bytes: int, timeout_s: float
    ) -> None:
        import torch

        self.rank, self.ranks, self.pids, self.timeout_s = rank, ranks, pids, timeout_s
        self.size, self.slot_bytes = len(ranks), slot_bytes
        self._map = mmap.mmap(file, total_bytes(self.size, slot_bytes))
        head = self.size * LINE
        self._words = [ctypes.c_uint32.from_buffer(self._map, LINE * i) for i in range(self.size)]
        self._addresses = [ctypes.addressof(word) for word in self._words]
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        # Two slots of each rank, and two in which sums of many ranks are put together.
        self._slots = whole[head:].view(2, self.size + 1, slot_bytes)
        ends = [[LINE * (i + 1) - TEXT * turn for i in range(self.size)] for turn in (0, 1)]
        self._texts = [[slice(end - TEXT, end) for end in turn] for turn in ends]
        self._turn = self._meetings = 0
        self._syscall = ctypes.CDLL(None, use_errno=True).syscall
        self._spins = SPINS if self.size <= (os.cpu_count() or 1) else 0

    def meet(self) -> None:
        """Return when every rank has come."""
        self._meetings = (self._meetings + 1) & 0xFFFFFFFF
        self._words[self.rank].value = self._meetings
        self._syscall(SYS_FUTEX, ctypes.c_void_p(self._addresses[self.rank]), FUTEX_WAKE, 1 << 30, None, None, 0)
        for other in range(self.size):
            if other != self.rank:
                self._await(other)

    def _await(self, other: int) -> None:
        word, wanted = self._words[other], self._meetings
        for _ in range(self._spins):
            if _reached(word.value, wanted):
                return
        begun, patience = 0.0, _Time(PATIENCE_S, 0)
        while not _reached(seen := word.value, wanted):
            address = ctypes.c_void_p(self._addresses[other])
            self._syscall(SYS_FUTEX, address, FUTEX_WAIT, seen, ctypes.byref(patience), None, 0)
            if _reached(word.value, wanted):
                return
            begun = begun or time.monotonic()
            if time.monotonic() - begun > 0.9 * PATIENCE_S:
                self._check_alive(other, time.monotonic() - begun)

    def _check_alive(self, other: int, waited_s: float) -> None:
        try:
            os.kill(self.pids[other], 0)
            with open(f"/proc/{self.pids[other]}/stat") as file:
                dead = file.read().rpartition(")")[2].split()[0] in "ZX"
        except PermissionError:
            dead = False
        except OSError:
            dead = True
        who = f"rank {self.ranks[other]} (process {self.pids[other]})"
        if dead:
            raise RuntimeError(
                f"{who} has ended while rank {self.ranks[self.rank]} waited for it; its own log says why"
            )
        if waited_s > self.timeout_s:
            raise RuntimeError(
                f"rank {self.ranks[self.rank]} waited {waited_s:.0f} s for {who}, which is alive but not here"
            )

    def _meet_for(self, call: bytes) -> None:
        """Meet, and see that all have come for the same call."""
        places = self._texts[self._turn]
        self._map[places[self.rank]] = call
        self.meet()
        for other, place in enumerate(places):
            if other != self.rank and (theirs := self._map[place]) != call:
                raise RuntimeError(_differ({self.ranks[self.rank]: call, self.ranks[other]: theirs}))

    def _own(self, tensor: Tensor, call: bytes) -> list[Tensor]:
        """All ranks' slots, shaped like this flat tensor; this rank's is filled with it. Meets."""
        self._turn = 1 - self._turn
        count = tensor.numel() * tensor.element_size()
        slots = [self._slots[self._turn, i, :count].view(tensor.dtype) for i in range(self.size + 1)]
        slots[self.rank].copy_(tensor)
        self._meet_for(call)
        return slots

    def _parts(self, flat: Tensor) -> Sequence[Tensor]:
        return flat.split(self.slot_bytes // flat.element_size()) if flat.nbytes > self.slot_bytes else (flat,)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Sum or max in place of a contiguous tensor."""
        import torch

        combine = torch.add if op == "sum" else torch.maximum
        call = _call(ALL_REDUCE[op], tensor.nbytes, tensor.dtype)
        for part in self._parts(tensor.view(-1)):
            slots = self._own(part, call)
            if self.size <= LOCAL_SUM:
                _fold(slots[:-1], part, combine)
                continue
            each = -(-part.numel() // self.size)
            mine = slice(self.rank * each, (self.rank + 1) * each)
            if (total := slots[-1][mine]).numel():
                _fold([slot[mine] for slot in slots[:-1]], total, combine)
            self.meet()
            part.copy_(slots[-1])
        return tensor

    def all_gather(self, shard: Tensor, out: Tensor, about: str = "") -> Tensor:
        """The ranks' shards one after the other, into `out`."""
        rows, flat = out.view(self.size, -1), shard.reshape(-1)
        call = _call("all-gather", flat.nbytes, flat.dtype, about)
        at = 0
        for part in self._parts(flat):
            slots = self._own(part, call)
            for index in range(self.size):
                rows[index, at : at + part.numel()].copy_(slots[index])
            at += part.numel()
        return out

    def reduce_scatter(self, whole: Tensor, out: Tensor, about: str = "") -> Tensor:
        """The sum of this rank's rows of all ranks' contiguous tensors, into `out`."""
        import torch

        rows, result = whole.view(self.size, -1), out.view(-1)
        call = _call("reduce-scatter", whole.nbytes, whole.dtype, about)
        step = self.slot_bytes // whole.element_size() // self.size
        for at in range(0, rows.shape[1], step):
            cut = rows[:, at : at + step]
            slots = self._own(cut.reshape(-1), call)
            width = cut.shape[1]
            mine = slice(self.rank * width, (self.rank + 1) * width)
            _fold([slot[mine] for slot in slots[:-1]], result[at : at + width], torch.add)
        return out

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The contiguous tensor of one rank, on all."""
        call = _call(f"broadcast from {self.ranks[source]}", tensor.nbytes, tensor.dtype)
        for part in self._parts(tensor.view(-1)):
            self._turn = 1 - self._turn
            slot = self._slots[self._turn, source, : part.nbytes].view(part.dtype)
            if self.rank == source:
                slot.copy_(part)
            self._meet_for(call)
            if self.rank != source:
                part.copy_(slot)
        return tensor


@functools.lru_cache(1024)
def _call(operation: str, num_bytes: int, dtype: Any, about: str = "") -> bytes:
    """What a rank calls, in words; the end of a long name tells it from others."""
    text = f"{operation} of {num_bytes} bytes of {str(dtype).removeprefix('torch.')}"
    return f"{text}, {about[-ABOUT:]}".removesuffix(", ").encode()[:TEXT].ljust(TEXT)


def _differ(calls: dict[int, bytes]) -> str:
    told = ", ".join(f"rank {rank} {text.decode(errors='replace').strip()}" for rank, text in sorted(calls.items()))
    return (
        f"ranks made different calls: {told}. The ranks of an axis must make the same calls in the same order, with "
        "tensors of one size and dtype, and with zero=3 run the same blocks: else use gather=step or zero=2"
    )


def _reached(value: int, wanted: int) -> bool:
    """Counters run on past 2**32."""
    return (value - wanted) & 0xFFFFFFFF < 1 << 31


def _fold(parts: Sequence[Tensor], out: Tensor, combine: Callable[..., Any]) -> None:
    combine(parts[0], parts[1], out=out)
    for part in parts[2:]:
        combine(out, part, out=out)


def total_bytes(size: int, slot_bytes: int) -> int:
    return size * LINE + 2 * (size + 1) * slot_bytes


def share(group: Any, global_rank: int, ranks: Sequence[int], slot_bytes: int, timeout_s: float) -> Board | None:
    """The shared memory of a gloo group, or None where its ranks are not all on this machine or may not share.

    Collectives: an all-gather of 128 bytes and an all-reduce of one number, over the group.
    """
    if group is None or not slot_bytes:
        return None
    rank = ranks.index(global_rank)
    import torch
    import torch.distributed as dist

    possible = sys.platform == "linux" and platform.machine() == "x86_64" and SHM.is_dir()
    possible = possible and os.environ.get("PARALLAX_SHARED_MEMORY", "1") != "0"
    created = _create(total_bytes(len(ranks), slot_bytes)) if possible and rank == 0 else ""
    file = -1
    try:
        file, pids = _open(group, ranks, created, possible)
        ready = torch.tensor([int(file >= 0)])
        dist.all_reduce(ready, op=dist.ReduceOp.MIN, group=group)
        return Board(file, rank, ranks, pids, slot_bytes, timeout_s) if int(ready) else None
    finally:  # also where another rank has ended on the way
        if created:
            with contextlib.suppress(FileNotFoundError):  # somebody has tidied up /dev/shm
                os.unlink(SHM / created)
        if file >= 0:
            os.close(file)


def _open(group: Any, ranks: Sequence[int], created: str, possible: bool) -> tuple[int, list[int]]:
    """The file that the first rank has created, -1 where that cannot be; and the ranks' processes."""
    import torch
    import torch.distributed as dist

    here = _whereabouts() if possible else ""
    card = torch.frombuffer(bytearray(f"{here}|{os.getpid()}|{created}".encode().ljust(128)), dtype=torch.uint8)
    cards = [torch.empty_like(card) for _ in ranks]
    dist.all_gather(cards, card, group=group)
    told = [bytes(one.tolist()).decode().strip().split("|") for one in cards]
    pids, name = [int(one[1]) for one in told], told[0][2]
    if not (here and name and all(one[0] == here for one in told)):
        return -1, pids
    try:
        return os.open(SHM / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), pids
    except OSError:
        return -1, pids


def _whereabouts() -> str:
    """The machine since its start, and who sees which processes: ranks look whether the others live."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _create(num_bytes: int) -> str:
    """A new file's name; empty where there is no room."""
    name = f"parallax-{secrets.token_hex(8)}"
    try:
        file = os.open(SHM / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return ""
    try:
        os.posix_fallocate(file, 0, num_bytes)  # or the lack of room would be a SIGBUS later
        return name
    except OSError:
        os.unlink(SHM / name)
        return ""
    finally:
        os.close(file)
