"""Files of others, opened with care."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["open_regular"]


def open_regular(path: Path) -> int:
    """A descriptor to read a regular file. Follows no link and waits for no pipe; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(None, "not a regular file", str(path))
    return descriptor
