"""Optimizers over flat buffers."""

from __future__ import annotations

from collections.abc import Mapping

from parallax.config import OptimizerConfig
from parallax.data.buckets import FlatBuffers
from parallax.mesh import Axis, Mesh
from parallax.optimizers.flat import FlatOptimizer
from parallax.optimizers.muon import Muon
from parallax.optimizers.train import TrainOptimizer, kind_of

__all__ = ["FlatOptimizer", "Muon", "TrainOptimizer", "kind_of", "optimizer_for"]


def optimizer_for(
    config: OptimizerConfig, flats: Mapping[int, FlatBuffers], mesh: Mesh, shards: Axis, seed: int = 0
) -> TrainOptimizer:
    """The optimizer that the configuration names. shards: the axis over which ZeRO cuts."""
    if config.name == "muon":
        return Muon(config, flats, mesh, shards, seed)
    return TrainOptimizer(config, flats, seed)
