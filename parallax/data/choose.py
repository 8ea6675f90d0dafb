"""Which GradSync keeps whole copies of the parameters: plain sums, compressed ones, or Adasum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from parallax.config_fields import LOSSY
from parallax.data.adasum import Adasum
from parallax.data.buckets import FlatBuffers
from parallax.data.compress import Make, OneBit, TopK
from parallax.data.feedback import Compressed
from parallax.data.late import Tie
from parallax.data.powersgd import PowerSGD
from parallax.data.replicate import Replicate
from parallax.data.sync import BucketSync
from parallax.gradients import GradSink
from parallax.mesh import Mesh

__all__ = ["CASTS", "replicate"]

CASTS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Compression by a cast has no feedback: it is the reduce_dtype of every BucketSync."""


def replicate(
    mesh: Mesh,
    flats: Mapping[int, FlatBuffers],
    sinks: Mapping[int, GradSink],
    ties: Sequence[Tie] = (),
    *,
    compression: str = "none",
    compression_rank: int = 4,
    compression_ratio: float = 0.01,
    reduction: str = "sum",
    seed: int = 0,
    learns: bool = True,
    reduce_dtype: torch.dtype | None = None,
) -> BucketSync:
    """The GradSync for whole copies. compression_rank: of PowerSGD's factors; compression_ratio: the share of elements
    that top-k sends; seed: of the first factors.
    """
    reduce_dtype = CASTS.get(compression, reduce_dtype)
    if reduction == "adasum":
        return Adasum(mesh, flats, sinks, ties, learns=learns)
    if compression not in LOSSY:
        return Replicate(mesh, flats, sinks, ties, learns=learns, reduce_dtype=reduce_dtype)
    work = torch.promote_types(next(iter(flats.values())).grad_dtype, torch.float32)
    makers: dict[str, Make] = {
        "onebit": OneBit,
        "topk": partial(TopK, ratio=compression_ratio),
        "powersgd": partial(PowerSGD, rank=compression_rank, seed=seed, dtype=work),
    }
    return Compressed(mesh, flats, sinks, ties, learns=learns, make=makers[compression])
