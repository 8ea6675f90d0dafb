"""What scripts do with a wrapped model besides training it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import parallax
from parallax.mesh import init_mesh
from tests.ranks.test_wrap_join import batch, net


def clipped_by_torch(zero: int, dtype: torch.dtype) -> tuple[float, float, list[str], bool]:
    """torch's norm, ours, the warnings, and whether torch's clip has clipped what ours measures."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net().to(dtype), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    for step in range(2):
        model(batch(mesh.rank, step).to(dtype)).square().mean().backward()
        ours = optimizer.clip_grad_norm_(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            theirs = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
        clipped = optimizer.clip_grad_norm_(0) < 0.0101
        optimizer.step()
    return theirs, ours, [str(w.message) for w in caught], clipped


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_own_clip_clips_or_says_that_it_cannot(ranks, dtype: torch.dtype):
    for theirs, ours, said, clipped in ranks(2, clipped_by_torch, 0, dtype):
        assert theirs == pytest.approx(ours, rel=1e-5) and clipped and not said
    for zero in (1, 2):
        for theirs, _, said, clipped in ranks(2, clipped_by_torch, zero, dtype):
            assert theirs == 0.0 and not clipped and "optimizer.clip_grad_norm_" in said[0]
