"""Ending a run before its last step without losing work: on a signal, or when its time is up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["SIGNALS", "Stop"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stop:
    """Whether the run shall end. A signal that one rank gets, or a clock that runs out on one, is a wish of that rank;
    the step makes it known to all with the loss and the norm, and then it is `agreed`, at the same step everywhere.

    After `listen` SIGTERM and SIGUSR1 are wishes; a second one ends the process at once. Signals reach Python between
    two operations: a rank that waits for a message takes note when the message is there.
    """

    def __init__(self, time_limit_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.agreed = False
        self._clock, self._begun, self._limit = clock, clock(), time_limit_s
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
        return self._limit is not None and self._clock() - self._begun >= self._limit

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:  # once was enough
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = number

    def listen(self) -> Stop:
        """Take SIGTERM and SIGUSR1 from here on."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._take)
        return self
