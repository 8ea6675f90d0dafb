"""ZeRO (arXiv:1910.02054): each data rank owns a part of the optimizer's state, of the gradients, of the parameters."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from parallax.comm import Pending, all_reduce_start, reduce_scatter_start
from parallax.data.buckets import FlatBuffers
from parallax.data.gather import Gather
from parallax.data.late import Tie
from parallax.data.layout import Bucket
from parallax.data.sync import BucketSync
from parallax.gradients import GradSink
from parallax.mesh import Axis, Mesh

__all__ = ["Zero"]

UNDER_WAY = 1
"""Buckets that are reduced while the next one fills: each takes memory, and one at a time is all that a link can do."""


class Zero(BucketSync):
    """Reduce-scatters each bucket's gradients over `shards` while the backward runs and sums this rank's range over
    `replicas`; after the step the parameters are gathered, at level 3 not before they are used.

    Volume a step and rank over the n ranks of shards, P the parameters' bytes: levels 1 and 2 send 2P(n-1)/n; level 3
    3P(n-1)/n at one microbatch, less the block at which the forward turns, and a gathering more for each further
    forward and backward, or 2P(n-1)/n with keep. Over the r ranks of replicas 2(r-1)/r * P/n. `each`: every
    microbatch's gradients are reduced, so that no rank ever has all of them; P(n-1)/n more for each further
    microbatch, and a sum in another order. models: this rank's stages. keep: level 3 gathers a stage once a step.
    """

    def __init__(
        self,
        mesh: Mesh,
        flats: Mapping[int, FlatBuffers],
        sinks: Mapping[int, GradSink],
        ties: Sequence[Tie] = (),
        *,
        models: Mapping[int, nn.Module],
        shards: Axis,
        replicas: Axis,
        keep: bool = False,
        each: bool = False,
        learns: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(mesh, flats, sinks, ties, each=each, learns=learns, reduce_dtype=reduce_dtype)
        self.shards, self.replicas = shards, replicas
        self._gathers = {
            stage: Gather(models[stage], flat, shards, sinks.get(stage), keep) for stage, flat in flats.items()
        }
        self._pending: deque[tuple[FlatBuffers, Bucket, Pending]] = deque()
        self._filled: set[Bucket] = set()

    def zero(self, scale: float = 1.0) -> None:
        super().zero(scale)
        self._filled.clear()

    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        pending = reduce_scatter_start(self.to_send(flat.take_grads(bucket)), self.shards, bucket.name)
        self._pending.append((flat, bucket, pending))
        while len(self._pending) > UNDER_WAY:
            self._retire()

    def _retire(self) -> None:
        flat, bucket, pending = self._pending.popleft()
        own = flat.own_grads(bucket)
        if bucket in self._filled:
            own.add_(pending.wait())
        else:
            own.copy_(pending.wait())
            self._filled.add(bucket)

    def wait(self) -> None:
        while self._pending:
            self._retire()

    def finish(self) -> None:
        super().finish()
        # Here and not in `wait`, which whoever drops gradients calls too, on one rank alone.
        own = [flat.own_grads(bucket) for flat in self.flats.values() for bucket in flat.buckets]
        sums = [all_reduce_start(self.to_send(grads), self.replicas) for grads in own] if self.replicas.size > 1 else []
        for grads, pending in zip(own, sums, strict=False):
            total = pending.wait()
            if total is not grads:
                grads.copy_(total)

    def unshard(self, stage: int) -> None:
        self._gathers[stage].unshard()

    def reshard(self, stage: int) -> None:
        self._gathers[stage].reshard()

    def publish(self) -> None:
        for gather in self._gathers.values():
            gather.publish()

    def gather_all(self) -> None:
        for gather in self._gathers.values():
            gather.gather_all()

    def remove(self) -> None:
        super().remove()
        for gather in self._gathers.values():
            gather.remove()

    def hold(self) -> None:
        for gather in self._gathers.values():
            gather.hold()

    def release(self) -> None:
        for gather in self._gathers.values():
            gather.release()
