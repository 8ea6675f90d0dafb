"""Rounding float32 to bfloat16 up or down by chance, so that small changes are not lost but come through on average."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["round_stochastically"]


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """The bfloat16 next to x towards or away from zero, with the chances that make x the mean; x itself where exact.

    x: float32, finite. bits: int32 of x's shape, of which the low 16 are random. bfloat16 is float32 without its low
    16 bits: adding 16 random ones before they are cut off carries with just that chance.
    """
    drawn = x.contiguous().view(torch.int32) + (bits & 0xFFFF)
    return (drawn & -0x10000).view(torch.float32).to(torch.bfloat16)
