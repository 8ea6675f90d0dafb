"""Ending a run before its last step without losing work: on a signal, or when its time is up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["SIGNALS", "Stop", "process_age_s"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
ONE_WISH_S = 1.0
"""Signals that come so close together are one wish: a scheduler tells every process of a job, and torchrun, told
too, tells its workers again some milliseconds later."""
_IMPORTED = time.monotonic()


def process_age_s() -> float:
    """Seconds since this process began, imports and all; since this file was imported where /proc does not tell."""
    try:
        with open("/proc/self/stat", "rb") as file:
            begun = int(file.read().rpartition(b")")[2].split()[19])  # field 22; the name may hold spaces
    except OSError:
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begun / os.sysconf("SC_CLK_TCK")


class Stop:
    """Whether the run shall end. A signal that one rank gets, or a clock that runs out on one, is a wish of that rank;
    the step makes it known to all with the loss and the norm, and then it is `agreed`, at the same step everywhere.

    time_limit_s: what `clock` may come to; it counts from the start of the process. After `listen` SIGTERM and SIGUSR1
    are wishes; a second one, ONE_WISH_S after the first or later, ends the process at once, with 128 and its number.
    Signals reach Python between two operations: a rank that waits for a message takes note of the first when the
    message is there. The second is seen by a thread, which waits for nothing else.
    """

    def __init__(self, time_limit_s: float | None = None, clock: Callable[[], float] = process_age_s) -> None:
        self.agreed = False
        self._clock, self._limit = clock, time_limit_s
        self._signal: int | None = None

    @property
    def wished(self) -> bool:
        """Whether this rank wants to end."""
        return self._signal is not None or self._is_late()

    @property
    def reason(self) -> str:
        """Why, as far as this rank knows."""
        if self._signal is not None:
            return f"{signal.Signals(self._signal).name} came"
        return f"time_limit={self._limit:g} s is over" if self._is_late() else "another rank was told to end"

    def _is_late(self) -> bool:
        return self._limit is not None and self._clock() >= self._limit

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number

    def listen(self) -> Stop:
        """Take SIGTERM and SIGUSR1 from here on."""
        if threading.current_thread() is threading.main_thread():
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write, warn_on_full_buffer=False)
            threading.Thread(target=_end_at_a_second, args=(read,), name="signals", daemon=True).start()
            for number in SIGNALS:
                signal.signal(number, self._take)
        return self


def _end_at_a_second(pipe: int) -> None:
    """Read the signals' numbers as they come, even while the main thread is in a call that lets no handler run."""
    first: float | None = None
    while numbers := os.read(pipe, 64):
        for number in numbers:
            if number not in SIGNALS:  # Ctrl-C has its own way
                continue
            now = time.monotonic()
            if first is None:
                first = now
            elif now - first >= ONE_WISH_S:
                name = signal.Signals(number).name
                os.write(2, f"{name} is the second signal: ended at once, what is not saved is lost\n".encode())
                os._exit(128 + number)
