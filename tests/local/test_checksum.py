"""The checksum of the guard over copies: every bit counts, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from parallax.replicas import INTEGERS, checksum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 7, 64])
def test_any_bit_shows_wherever_the_values_lie(dtype: torch.dtype, size: int):
    memory = torch.randn(size + 3).to(dtype)
    sums = set()
    for offset in range(4):  # amid eight bytes too: copies need not be aligned alike
        values = torch.cat([memory[:offset], memory[:size]])[offset:]
        sums.add(int(checksum(values)))
        bits = values.view(INTEGERS[values.element_size()])
        for place in range(size):
            for bit in (0, 3, 8 * values.element_size() - 1):
                flipped = (torch.ones((), dtype=torch.int64) << bit).to(bits.dtype)
                bits[place] ^= flipped
                assert int(checksum(values)) not in sums, f"bit {bit} of value {place}"
                bits[place] ^= flipped
    assert len(sums) == 1
