"""How much memory this process has held, and how much there is."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["format_bytes", "memory_bytes", "peak_memory_bytes"]

CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has held: CUDA's allocator, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not ru_maxrss where it can be helped: on Linux that begins with what the parent held before the exec.
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_bytes(device: torch.device) -> int:
    """What the device has, or this machine for all its ranks: its own, or what a container may use of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    least = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            least = min(least, int(path.read_text()))
    return least


def format_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
