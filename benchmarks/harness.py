"""Two or more ways to train the same model, in process groups of their own that take turns: one computes, the others
wait on a pipe. Of each turn the wall time, all ranks' CPU time, the bytes over loopback; and a rank's peak memory.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

__all__ = [
    "Row",
    "Team",
    "asked",
    "compare",
    "count",
    "listed",
    "machine",
    "mesh",
    "positive",
    "one_of",
    "refuse",
    "serve",
    "text",
]

HERE = Path(__file__).parent
DISTURBED = 1.15


def refuse(problem: str) -> NoReturn:
    """End the program with one line and 2."""
    from parallax.errors import ConfigError, report

    report(ConfigError(problem))
    raise SystemExit(2)


def count(word: str) -> int:
    if not word.isascii() or not word.isdigit() or int(word) < 1:
        raise ValueError("expected an integer of at least 1")
    return int(word)


def positive(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError("expected a number above 0")
    return value


def text(word: str) -> str:
    if not word:
        raise ValueError("it is empty")
    return word


def mesh(word: str) -> str:
    if not re.fullmatch("[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){2}", word):
        raise ValueError("expected data x tensor x pipeline, as in 2x2x2")
    return word


def one_of(*names: str) -> Callable[[str], str]:
    def read(word: str) -> str:
        if word not in names:
            raise ValueError(f"{word or 'nothing'} is none of {', '.join(names)}")
        return word

    return read


def listed(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda words: [read(word) for word in words.split(",")]


def asked(
    known: Mapping[str, tuple[str | None, Callable[[str], Any]]], argv: Sequence[str], *, plus: bool = False
) -> SimpleNamespace:
    """What key=value arguments say: of each key its default and what reads it, None where it may be missing.

    plus: `+KEY=VALUE` is a key of parallax, in `extra`. Anything else ends the program with one line and 2.
    """
    from parallax.arguments import close_to

    found = {name: None if default is None else read(default) for name, (default, read) in known.items()}
    extra: list[str] = []
    keys = ", ".join(f"{name}=" for name in known)
    for word in argv:
        name, equals, value = word.partition("=")
        if plus and word.startswith("+") and equals:
            extra.append(word[1:])
        elif name not in known:
            refuse(f"there is no argument {word}{close_to(name, known) or f'; there are {keys}'}")
        else:
            try:
                found[name] = known[name][1](value)
            except ValueError as error:
                refuse(f"{word}: {error}")
    _check_keys(extra)
    return SimpleNamespace(**found, extra=extra)


def _check_keys(extra: Sequence[str]) -> None:
    """End the program where parallax has no such key, or the key no such value."""
    from parallax.config import Config
    from parallax.config_io import with_overrides
    from parallax.errors import ConfigError

    try:
        with_overrides(Config(), dict(word.split("=", 1) for word in extra))
    except ConfigError as error:
        refuse(f"+{error}" if str(error).startswith(tuple(extra)) else str(error))


def machine() -> str:
    """One line: what ran this, and how busy it is."""
    import torch

    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    load = os.getloadavg()[0]
    return (
        f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, load {load:.1f}, {time.strftime('%Y-%m-%d %H:%M')}"
    )


class Team:
    """The ranks of one candidate: `python SCRIPT --rank NAME ...`, which must call `serve`."""

    def __init__(self, name: str, size: int, arguments: Sequence[str], script: Path) -> None:
        self.name, self.size = name, size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
        common |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": f"{HERE}:{HERE.parent}"}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(script), "--rank", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                text=True,
            )
            for rank in range(size)
        ]
        self.ready = [self._hear(process) for process in self.processes]

    def _hear(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        while line := process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"a rank of {self.name} ended with {process.wait()}"}

    @property
    def error(self) -> str:
        return next((str(one["error"]) for one in self.ready if "error" in one), "")

    def turn(self, number: int) -> dict[str, Any]:
        """One step of all ranks."""
        before, begun = loopback_bytes(), time.perf_counter()
        for process in self.processes:
            assert process.stdin is not None
            print(json.dumps({"step": number}), file=process.stdin, flush=True)
        said = [self._hear(process) for process in self.processes]
        took = time.perf_counter() - begun
        if problem := next((one["error"] for one in said if "error" in one), None):
            raise RuntimeError(problem)
        losses = [one["loss"] for one in said if one["loss"] is not None]
        return {
            "wall": took,
            "cpu": sum(one["cpu"] for one in said),
            "rss": max(one["rss"] for one in said),
            "bytes": loopback_bytes() - before,
            "loss": sum(losses) / len(losses),
        }

    def end(self) -> None:
        for process in self.processes:
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def loopback_bytes() -> int:
    with open("/proc/net/dev") as file:
        return next((int(line.split(":")[1].split()[8]) for line in file if line.strip().startswith("lo:")), 0)


def serve(build: Callable[[], Callable[[int], float | None]]) -> None:
    """Run a rank: build the step, then take one at each line of standard input. Tells of both on standard output."""
    try:
        step = build()
        answer: dict[str, Any] = {"ready": True}
    except Exception as error:  # noqa: BLE001 - whoever compares shall know why there is no row
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        begun = time.process_time()
        try:
            loss = step(json.loads(line)["step"])
            print(json.dumps({"loss": loss, "cpu": time.process_time() - begun, "rss": _peak()}), flush=True)
        except Exception as error:  # noqa: BLE001
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
    os._exit(0)


def _peak() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024


@dataclass
class Row:
    """What was measured of one candidate; ratio: parallax's over this one's, the median of the pairs."""

    name: str
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rss: int = 0
    error: str = ""

    def over(self, other: Row, what: str) -> float:
        """The median of this one's over the other's, pair by pair."""
        mine, theirs = getattr(self, what), getattr(other, what)
        return statistics.median(a / b for a, b in zip(mine, theirs, strict=True)) if mine else float("nan")


def compare(teams: Sequence[Team], rounds: int, warm_up: int = 2) -> list[Row]:
    """Turns A, B, A, B, ...; a round in which one took 15 % longer than its median so far is taken again, at most as
    often as there are rounds.
    """
    rows = [Row(team.name, error=team.error) for team in teams]
    alive = [(team, row) for team, row in zip(teams, rows, strict=True) if not row.error]
    number = again = 0
    while alive and len(alive[0][1].wall) < rounds:
        order = alive if number % 2 else alive[::-1]
        found = {team.name: team.turn(number) for team, _ in order}
        number += 1
        for team, row in alive:
            row.losses.append(found[team.name]["loss"])
            row.rss = max(row.rss, found[team.name]["rss"])
        if number <= warm_up:
            continue
        slow = any(
            len(row.wall) >= 3 and found[team.name]["wall"] > DISTURBED * statistics.median(row.wall)
            for team, row in alive
        )
        if slow and again < rounds:
            again += 1
            continue
        for team, row in alive:
            row.wall.append(found[team.name]["wall"])
            row.cpu.append(found[team.name]["cpu"])
            row.sent.append(found[team.name]["bytes"])
    return rows
