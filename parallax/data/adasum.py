"""Adasum (arXiv:2006.02924): gradients are averaged as far as they agree in direction, added as far as not."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parallax.comm import all_gather, exchange
from parallax.data.buckets import FlatBuffers
from parallax.data.compress import parts_of
from parallax.data.layout import Bucket
from parallax.data.sync import BucketSync
from parallax.params import ParamSpec

__all__ = ["Adasum"]


class Adasum(BucketSync):
    """Combines the gradients a and b of two ranks, for each canonical parameter, to

        (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b

    then those of two pairs, and so on: log2(n) rounds over the n ranks of mesh.grad, a power of two. A rank's gradient
    is here its share of the sum for the global batch, so the result is multiplied by n: equal shares give the very
    gradient that their sum is, orthogonal ones n times that. Dot products are taken in float64 over the whole of a
    parameter, over tensor where that cuts it.

    Begun when the backwards of all stages are done. Volume a step and rank: log2(n) times the gradient bytes over data,
    against 2(n-1)/n of a sum, and log2(n) times (t-1) times 24 bytes a parameter over the t tensor ranks.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._parts = {b: tuple(parts_of(b)) for flat in self.flats.values() for b in flat.buckets}
        self._waiting: list[tuple[Bucket, Tensor]] = []

    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        self._waiting.append((bucket, flat.take_grads(bucket)))

    def wait(self) -> None:
        if not self._waiting:
            return
        axis = self.mesh.grad
        buckets = [bucket for bucket, _ in self._waiting]
        mine = [grads.to(torch.promote_types(grads.dtype, torch.float32)) for _, grads in self._waiting]
        for round_number in range(int(math.log2(axis.size))):
            distance = 1 << round_number
            theirs = [exchange(grads, axis, axis.rank ^ distance) for grads in mine]
            low, high = (theirs, mine) if axis.rank & distance else (mine, theirs)
            factors = self._factors(buckets, low, high)
            mine = [self._combine(b, x, y, factors) for b, x, y in zip(buckets, low, high, strict=True)]
        for (_, grads), total in zip(self._waiting, mine, strict=True):
            torch.mul(total, axis.size, out=total)
            grads.copy_(total)
        self._waiting.clear()

    def _factors(self, buckets: list[Bucket], low: list[Tensor], high: list[Tensor]) -> Factors:
        """The factors of both gradients, by bucket and canonical name: the same bits on every rank that has them."""
        keys = [(b, spec) for b in buckets for placed in b.placed for spec in placed.specs]
        dots = torch.zeros(len(keys), 3, dtype=torch.float64, device=self.mesh.device)
        row_of = {(bucket, spec.name): row for row, (bucket, spec) in enumerate(keys)}
        for bucket, a, b in zip(buckets, low, high, strict=True):
            for part in self._parts[bucket]:
                x, y = part.of(a).double(), part.of(b).double()
                dots[row_of[bucket, part.spec.name]] = torch.stack([x.dot(y), x.dot(x), y.dot(y)])
        self._sum_over_tensor([spec for _, spec in keys], dots)
        product, norms = dots[:, :1], dots[:, 1:]
        factors = torch.where(norms > 0, 1 - product / (2 * norms), 1.0)
        # A norm that is not finite must show in the result, so that nobody takes the step.
        factors = torch.where(norms.isfinite(), factors, torch.nan)
        return {key: factors[row] for key, row in row_of.items()}

    def _sum_over_tensor(self, specs: list[ParamSpec], dots: Tensor) -> None:
        """Add up the dot products of what tensor cuts, in rank order: a tied weight lies elsewhere in another stage's
        vector, and must come to the same. Boxes that several ranks hold count as often in every product, so their
        number cancels in the factors.
        """
        axis = self.mesh.tensor
        if axis.size == 1 or not specs:
            return
        cut = torch.tensor(["tensor" in spec.shards for spec in specs], device=dots.device)
        total = torch.zeros_like(dots)
        for theirs in all_gather(dots[None], axis):
            total += theirs
        dots.copy_(torch.where(cut[:, None], total, dots))

    def _combine(self, bucket: Bucket, low: Tensor, high: Tensor, factors: Factors) -> Tensor:
        out = torch.zeros_like(low)
        for part in self._parts[bucket]:
            first, second = factors[bucket, part.spec.name]
            torch.mul(part.of(low), first, out=part.of(out)).add_(part.of(high) * second)
        return out


Factors = dict[tuple[Bucket, str], Tensor]
