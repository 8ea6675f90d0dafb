"""Replicate: every data rank holds the whole of its stage and gradients are summed, as in DDP (arXiv:2006.15704).

Sums, never means: the loss is scaled by the global token count before the backward, so adding up is all there is to do.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from parallax.comm import Pending, sum_start
from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Bucket
from parallax.data.sync import BucketSync

__all__ = ["Replicate"]

UNDER_WAY = 2
"""Buckets whose sum is begun before that of an earlier one is sent back to all, where that is a second message."""


class Replicate(BucketSync):
    """All-reduces flat gradient buffers over mesh.grad while the last backward still runs.

    Volume a step and rank: 2(n-1)/n of the gradient bytes (each parameter padded to 64 elements, each bucket to 64n)
    over the n ranks of mesh.grad, whatever the number of microbatches; over tensor, one all-reduce of the gradients
    that are partial there; and the bytes of each tied parameter once to the peer stage.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._pending: list[tuple[Tensor, Pending]] = []

    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        grads = flat.take_grads(bucket)
        self._pending.append((grads, sum_start(self.to_send(grads), self.mesh.grad)))
        for _, pending in self._pending[-1 - UNDER_WAY : -UNDER_WAY]:
            pending.advance()

    def wait(self) -> None:
        for grads, pending in self._pending:
            total = pending.wait()
            if total.dtype != grads.dtype:
                grads.copy_(total)
        self._pending.clear()
