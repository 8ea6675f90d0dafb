"""Ranks as threads: what checkpoint.save and load need of a process group, without one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Board:
    size: int
    values: list[Any] = field(default_factory=list)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.values = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=20)


@dataclass
class Exchange:
    rank: int
    size: int
    board: _Board

    def gather_json(self, value: Any) -> list[Any]:
        self.board.values[self.rank] = json.dumps(value)
        self.board.barrier.wait()
        found = [json.loads(text) for text in self.board.values]
        self.board.barrier.wait()
        return found


def alone() -> Exchange:
    return Exchange(0, 1, _Board(1))


def together(size: int, function: Callable[[Exchange], Any]) -> list[Any]:
    """function(exchange) on `size` threads; what each returned or raised."""
    board = _Board(size)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(Exchange(rank, size, board))
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[rank] = error

    threads: Sequence[threading.Thread] = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
