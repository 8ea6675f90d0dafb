"""Compression for any module: what the wrapper hands on, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from tests.ranks.test_wrap import Frozen


def compressed(options: dict[str, Any]) -> dict[str, Any]:
    """Frozen parameters, accumulation, a step that is dropped, and the bytes that the last step sent."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    torch.manual_seed(3)
    model = parallax.data_parallel(Frozen(24).double(), mesh, bucket_bytes=5000, **options)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    for step in range(6):
        x = torch.full((1, 24), 1.0 + step + mesh.rank, dtype=torch.float64)
        mesh.data.traffic.clear()
        with model.accumulate():
            model(x).square().mean().backward()
        (model(-x).square().mean() * (float("inf") if step == 2 else 1.0)).backward()
        if step == 2:
            optimizer.zero_grad()  # the script drops it, and no trace may stay
        else:
            optimizer.step()
    return {"state": model.state_dict(), "sent": sum(mesh.data.traffic.values())}


def test_compression_for_any_module(ranks):
    """topk with all elements is no compression; of the others every rank has the same."""
    plain = ranks(2, compressed, {})
    for found in ranks(2, compressed, {"compression": "topk", "compression_ratio": 1}):
        for name, values in plain[0]["state"].items():
            torch.testing.assert_close(found["state"][name], values, rtol=1e-12, atol=1e-12, msg=name)
    for kind in ("float16", "onebit", "topk", "powersgd"):
        options = {"compression": kind, "compression_rank": 1}
        first, second = ranks(2, compressed, options)
        assert first["sent"] < plain[0]["sent"], kind
        for name, values in first["state"].items():
            assert values.isfinite().all() and values.equal(second["state"][name]), (kind, name)
            moved = not values.equal(plain[0]["state"][name])
            assert moved == (not name.startswith("blocks.1")), (kind, name)


def test_join_and_compression_exclude_each_other():
    model = parallax.data_parallel(nn.Linear(4, 4), init_mesh("1x1x1", device_type="cpu"), compression="onebit")
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="leave out one of the two"), model.join(optimizer):
        pass
