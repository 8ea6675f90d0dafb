"""Adasum (arXiv:2006.02924): gradients that agree are averaged, those that are orthogonal are added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallax.comm import all_reduce, exchange
from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Bucket
from parallax.data.sync import BucketSync
from parallax.params import ParamSpec

__all__ = ["AdasumSync"]


class AdasumSync(BucketSync):
    """Pairs of ranks, then pairs of pairs, combine a and b to (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b, for each
    canonical parameter on its own; the data ranks must be a power of two.

    A rank's gradient is n times its share of the batch's, so that ranks which agree give the gradient of the mean loss,
    as a sum would. After the backward, not beside it. Volume a step and rank: log2(n) times the gradient bytes to one
    peer each, and 24 bytes a parameter over tensor for each.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._full: list[tuple[FlatBuffers, Bucket, Tensor]] = []

    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        self._full.append((flat, bucket, flat.take_grads(bucket)))

    def wait(self) -> None:
        axis = self.mesh.grad
        for _, bucket, grads in self._full:
            grads.mul_(axis.size)
            views = [
                (spec, spec.view(placed.of(grads, bucket.start))) for placed in bucket.placed for spec in placed.specs
            ]
            distance = 1
            while distance < axis.size:
                self._combine(grads, bucket, views, axis.rank ^ distance)
                distance *= 2
        self._full.clear()

    def _combine(self, grads: Tensor, bucket: Bucket, views: list[tuple[ParamSpec, Tensor]], peer: int) -> None:
        theirs = exchange(grads, self.mesh.grad, peer)
        others = [s.view(p.of(theirs, bucket.start)) for p in bucket.placed for s in p.specs]
        dots = torch.zeros(len(views), 3, dtype=torch.float64, device=grads.device)
        for row, (spec, mine), other in zip(dots, views, others, strict=True):
            if spec.owned or spec.tied:  # of ranks with the same box one counts it
                a, b = mine.reshape(-1).double(), other.reshape(-1).double()
                row.copy_(torch.stack([a @ b, a @ a, b @ b]))
        all_reduce(dots, self.mesh.tensor)
        factors = 1 - dots[:, :1] / (2 * dots[:, 1:].clamp(min=torch.finfo(torch.float64).tiny))
        first = self.mesh.grad.rank < peer  # both must add in the same order
        for (own, other_factor), (_, mine), other in zip(factors.tolist(), views, others, strict=True):
            a, b = mine * own, other * other_factor
            mine.copy_(a + b if first else b + a)
