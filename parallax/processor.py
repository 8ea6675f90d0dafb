"""What kind of processor this is, where that decides which of two ways is the faster one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

__all__ = ["Processor", "processor"]


@dataclass(frozen=True, slots=True)
class Processor:
    """vendor: as cpuid has it, such as AuthenticAMD; flags: Linux's names of what it can do. Empty where unknown."""

    vendor: str = ""
    flags: frozenset[str] = frozenset()


@functools.cache
def processor() -> Processor:
    """Of this machine, from /proc/cpuinfo."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = (line.partition(":") for line in file)
            found = {key.strip(): value.strip() for key, _, value in lines if key.strip() in ("vendor_id", "flags")}
    except OSError:
        found = {}
    return Processor(found.get("vendor_id", ""), frozenset(found.get("flags", "").split()))
