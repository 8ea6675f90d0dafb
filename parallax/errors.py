"""The errors a user sees. Each message says what is wrong, the numbers, and the fix."""

from __future__ import annotations

import os
import signal
import sys
import time

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DamagedCheckpoint",
    "MeshError",
    "NewerCheckpoint",
    "NotFiniteError",
    "ParallaxError",
    "ReplicaError",
    "ScheduleError",
    "printable",
    "report",
]

GRACE_S = 10.0


def printable(text: str) -> str:
    """A text for a terminal: what it would obey, such as ESC in a name from a stranger, is written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class ParallaxError(ValueError):
    """Base of every error that parallax raises on bad input."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(ParallaxError):
    """A configuration that cannot run. Raised alike on every rank, before the first collective."""


class MeshError(ParallaxError):
    """A mesh that does not fit the processes, or does not parse."""


class ScheduleError(ParallaxError):
    """A pipeline schedule that is incomplete, contradictory, or would deadlock."""


class CheckpointError(ParallaxError):
    """A checkpoint that is missing, damaged, or belongs to another model. Names the file."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was saved: an older one may do."""


class NewerCheckpoint(CheckpointError):
    """A checkpoint of a later parallax: sound, as far as this one can tell, so an older one must not take its place."""


class ReplicaError(ParallaxError):
    """Ranks that must hold the same parameter do not. Names it, and them."""


class NotFiniteError(ParallaxError, FloatingPointError):
    """A step whose gradients are not finite, where on_nan=stop. Says where it begins."""


def report(error: ParallaxError) -> None:
    """Print an error, in one line, on rank 0 where every rank has it; the caller exits with 2 then.

    torchrun ends all ranks of a machine once one has exited, so the others wait here until rank 0 has had the time to
    speak. Who is still there afterwards has an error of its own, or is on another machine, where the first rank then
    speaks for all; and says it. For a program's last act, in its main thread.
    """
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a run that trains takes it as a wish to end after the step
    time.sleep(GRACE_S if os.environ.get("LOCAL_RANK") == "0" else 1.5 * GRACE_S)
    print(f"[rank {rank} of {os.environ.get('WORLD_SIZE', '1')}] error: {error}", file=sys.stderr, flush=True)
