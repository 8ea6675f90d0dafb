"""JSON as files from elsewhere must have it: no key twice, no NaN, no number out of range; little memory."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["ROOM_BYTES", "parse_json"]

ROOM_BYTES = 1 << 25
"""Memory that any text may take when it is read, however small the files beside it."""
BYTES_PER_BYTE, BYTES_PER_MARK = 9, 200
"""What parsing takes at most for a byte of text (four-byte characters, twice) and for each `[`, `{` or `,`: measured,
the dearest are objects of one key and objects of many.
"""


def parse_json(text: bytes, room_bytes: int = ROOM_BYTES) -> Any:
    """The value in these bytes, in no more than `room_bytes` of memory, the text not counted.

    Raises ValueError, or RecursionError where it is nested too deep.
    """
    num_marks = sum(text.count(mark) for mark in (b"[", b"{", b","))  # before a list of a million empty lists is made
    if BYTES_PER_BYTE * len(text) + BYTES_PER_MARK * num_marks > room_bytes:
        raise ValueError(
            f"{len(text)} bytes that hold {num_marks} lists and values take more memory than there is room"
        )
    return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite_float)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is out of range")
    return value
