"""Replicate with compressed sums and error feedback: what a step does not send, the next one adds to its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parallax.comm import Pending
from parallax.data.buckets import FlatBuffers
from parallax.data.compress import Chained, Make, Part, Steps, parts_of
from parallax.data.layout import Bucket
from parallax.data.replicate import UNDER_WAY
from parallax.data.sync import BucketSync

__all__ = ["Compressed"]


class Compressed(BucketSync):
    """Sums each bucket by a compressor. Every data rank keeps what it owes: its own gradients that were not sent yet.

    At every step, for each parameter and rank: gradient = sent + (owed after - owed before), so over any number of
    steps the sum of what was applied is the sum of the gradients less what the ranks still owe.

    What is owed is kept in units of the true gradient (loss scaling divided out), and takes effect with the optimizer's
    step alone: a step that is skipped leaves it as it was. That takes the memory of two more gradient buffers, in
    float32 or float64. Volume: the compressor's.
    """

    def __init__(self, *args: Any, make: Make, **options: Any) -> None:
        super().__init__(*args, **options)
        buckets = [(flat, bucket) for flat in self.flats.values() for bucket in flat.buckets]
        self.parts: dict[Bucket, tuple[Part, ...]] = {bucket: tuple(parts_of(bucket)) for _, bucket in buckets}
        self.compressor = make(self.mesh.grad, self.parts)
        self.owes = False
        """Whether any rank may owe anything; alike on all of them."""
        self._owed = {bucket: self._zeros(flat, bucket) for flat, bucket in buckets}
        self._next = {bucket: self._zeros(flat, bucket) for flat, bucket in buckets}
        self._done: set[Bucket] = set()
        self._pending: list[Pending] = []
        self._scale = 1.0

    @staticmethod
    def _zeros(flat: FlatBuffers, bucket: Bucket) -> Tensor:
        dtype = torch.promote_types(flat.grad_dtype, torch.float32)
        return torch.zeros(bucket.stop - bucket.start, dtype=dtype, device=flat.device)

    def zero(self, scale: float = 1.0) -> None:
        super().zero(scale)
        self._scale = scale
        self._done.clear()
        self.compressor.forget()

    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        grads = flat.take_grads(bucket)
        self._pending.append(Chained(self._reduce(bucket, grads), grads))
        for pending in self._pending[-1 - UNDER_WAY : -UNDER_WAY]:
            pending.advance()

    def _reduce(self, bucket: Bucket, grads: Tensor) -> Steps:
        delta = torch.add(grads, self._owed[bucket], alpha=self._scale, out=self._next[bucket])
        out = grads if grads.dtype == delta.dtype else grads.to(delta.dtype)
        yield from self.compressor.reduce(bucket, delta, out)
        if out is not grads:
            grads.copy_(out)
        if self._scale != 1.0:
            delta.div_(self._scale)
        self._done.add(bucket)

    def wait(self) -> None:
        for pending in self._pending:
            pending.advance()
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def publish(self) -> None:
        """The step counts: from here on what it left out is what is owed."""
        for bucket in self._done:
            self._owed[bucket], self._next[bucket] = self._next[bucket], self._owed[bucket]
        if self._done:
            self.owes = not self.compressor.lossless
        self._done.clear()
        self.compressor.commit()

    def held(self) -> list[Tensor]:
        return [*self._owed.values(), *self._next.values(), *self.compressor.warm.values()]

    def owed(self) -> Iterator[tuple[Part, Tensor]]:
        """What this rank owes of each matrix, in the shape of its box. Vectors are never owed."""
        for bucket, parts in self.parts.items():
            for part in parts:
                if part.is_matrix:
                    yield part, part.of(self._owed[bucket]).view(part.spec.box_shape)

    def reset(self, *, owes: bool) -> None:
        """What is owed was replaced from outside, or shall be nothing; a step under way does not count."""
        self.zero()
        self.owes = owes
        for tensor in self._owed.values() if not owes else ():
            tensor.zero_()
