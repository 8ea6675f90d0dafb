"""Gradients that travel compressed over the data axis, with error feedback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parallax.comm import Pending
from parallax.data.buckets import FlatBuffers
from parallax.data.compress import Compressed, Steps, method, padded_sum
from parallax.data.layout import Bucket, Placed
from parallax.data.sync import BucketSync
from parallax.rng import derive_key

__all__ = ["CompressedSync"]

LEAST = 1024
"""Elements below which a gradient travels as it is; so do vectors."""


class CompressedSync(BucketSync):
    """Replicate, but what a matrix sends is a compressed form of its gradient and of what earlier steps left unsaid.

    Every rank ends with the same bits. Memory: two gradients' worth, of what is owed before and after the step, since a
    step that is skipped must leave what is owed as it was. Volume: that of the method (compress.py); vectors and small
    matrices as in Replicate.
    """

    def __init__(self, *args: Any, compression: str, rank: int, ratio: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.rank, self._method, self._has_state = rank, method(compression, ratio), compression == "powersgd"
        self._running: list[tuple[Steps, Pending]] = []
        self.owed: dict[Placed, Tensor] = {}
        self.state: dict[Placed, Tensor] = {}
        self._after: dict[Placed, Compressed] = {}
        self._spare: dict[Placed, Tensor] = {}
        for flat in self.flats.values():
            for placed in (p for bucket in flat.buckets for p in bucket.placed if self.compresses(p)):
                shape = as_matrix(placed)
                self.owed[placed] = torch.zeros(shape, dtype=flat.grad_dtype, device=flat.device)
                self._spare[placed] = torch.zeros_like(self.owed[placed])
                if self._has_state:
                    self.state[placed] = self._first_state(placed, shape[1], flat)

    def compresses(self, placed: Placed) -> bool:
        """Whether a parameter's gradient is compressed."""
        if len(placed.shape) < 2 or not placed.parameter.requires_grad:
            return False
        rows, columns = as_matrix(placed)
        pays = not self._has_state or 2 * self.rank * (rows + columns) < rows * columns
        return rows * columns >= LEAST and pays

    def _first_state(self, placed: Placed, columns: int, flat: FlatBuffers) -> Tensor:
        """Random, the same on all that hold a copy: both uses of a tied weight too."""
        generator = torch.Generator().manual_seed(derive_key("powersgd", placed.specs[0].name))
        drawn = torch.randn(columns, self.rank, generator=generator)
        return drawn.to(flat.device, flat.grad_dtype)

    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        job = self._job(flat.take_grads(bucket), bucket)
        self._go_on(job, None)
        if len(self._running) > 1:  # the one before has had a bucket's time for its first message
            before, pending = self._running.pop(-2)
            self._go_on(before, pending, len(self._running) - 1)

    def _go_on(self, job: Steps, pending: Pending | None, place: int | None = None) -> None:
        try:
            following = next(job) if pending is None else job.send(pending.wait())
        except StopIteration:
            return
        self._running.insert(len(self._running) if place is None else place, (job, following))

    def wait(self) -> None:
        while self._running:
            job, pending = self._running.pop(0)
            self._go_on(job, pending, 0)

    def _job(self, grads: Tensor, bucket: Bucket) -> Steps:
        items: list[Compressed] = []
        rest: list[Tensor] = []
        for placed in bucket.placed:
            view = placed.of(grads, bucket.start)
            if placed not in self.owed:
                rest.append(view)
                continue
            matrix = view.view(as_matrix(placed))
            matrix.add_(self.owed[placed])
            self._after[placed] = Compressed(matrix, self._spare[placed], self.state.get(placed))
            items.append(self._after[placed])
        plain = padded_sum([self.to_send(view) for view in rest], self.mesh.grad) if rest else None
        if items:
            yield from self._method(items, self.mesh.grad)
        if plain is not None:
            total, at = plain.wait(), 0
            for view in rest:
                view.copy_(total[at : at + view.numel()].view(view.shape))
                at += view.numel()

    def publish(self) -> None:
        """The step is taken: what it left unsaid is owed to the next one."""
        for placed, item in self._after.items():
            self.owed[placed], self._spare[placed] = item.left, self.owed[placed]
            if item.next_state is not None:
                self.state[placed] = item.next_state
        self._after.clear()

    def kept(self, flat: FlatBuffers) -> Iterator[tuple[Placed, Tensor, Tensor | None]]:
        """What a checkpoint must hold of a stage: parameter, what this rank owes, the method's state."""
        for placed in flat.placed:
            if placed in self.owed:
                yield placed, self.owed[placed].view(placed.shape), self.state.get(placed)


def as_matrix(placed: Placed) -> tuple[int, int]:
    rows = placed.shape[0]
    size = 1
    for length in placed.shape[1:]:
        size *= length
    return rows, size
