"""Replicate: every data rank holds the whole of its stage and gradients are summed, as in DDP (arXiv:2006.15704).

Sums, never means: the loss is scaled by the global token count before the backward, so adding up is all there is to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from parallax.comm import Pending, all_reduce, all_reduce_start, exchange_sum
from parallax.data.buckets import Bucket, FlatBuffers, Placed
from parallax.gradients import GradSink
from parallax.mesh import Mesh
from parallax.params import ParamSpec

__all__ = ["GradSync", "Replicate", "Tie"]


class GradSync(Protocol):
    """What the executor asks of the data axis. Replicate and the stages of ZeRO are implementations."""

    def unshard(self, stage: int) -> None:
        """Have the stage's parameters whole in memory."""
        ...

    def reshard(self, stage: int) -> None:
        """They may go again."""
        ...

    def arm(self, stage: int) -> None:
        """The stage's last backward of this step comes next: gradients are final once they are accumulated."""
        ...

    def reduce(self, stage: int) -> None:
        """The stage's last backward is done: begin what reductions are left. Must not wait for another stage."""
        ...

    def finish(self) -> None:
        """All stages are done: return when every gradient is the global sum."""
        ...


@dataclass(frozen=True, slots=True)
class Tie:
    """A parameter used by two stages. ranks: their coordinates on the pipeline axis, first use first."""

    name: str
    stages: tuple[int, int]
    ranks: tuple[int, int]


class Replicate:
    """All-reduces flat gradient buffers over mesh.grad while the last backward still runs.

    Volume a step and rank: 2(n-1)/n of the gradient bytes (each parameter padded to 64 elements) over the n ranks of
    mesh.grad, whatever the number of microbatches; over tensor, one all-reduce of the gradients that are partial
    there; and the bytes of each tied parameter once to the peer stage.
    flats: the buffers of this rank's stages. sinks: where those stages' layers send weight gradients.
    """

    def __init__(
        self, mesh: Mesh, flats: Mapping[int, FlatBuffers], sinks: Mapping[int, GradSink], ties: Sequence[Tie] = ()
    ) -> None:
        self.mesh = mesh
        self.flats = flats
        self.ties = ties
        self._pending: list[Pending] = []
        self._stages = {stage: _StageSync(self, flat) for stage, flat in flats.items()}
        for stage, sink in sinks.items():
            sink.buffers = {placed.parameter: placed.of(flats[stage].grads) for placed in flats[stage].placed}
            sink.on_accumulated = self._stages[stage].accumulated

    def zero(self) -> None:
        """Begin a step: gradients back to zero."""
        for flat in self.flats.values():
            flat.grads.zero_()

    def unshard(self, stage: int) -> None: ...

    def reshard(self, stage: int) -> None: ...

    def arm(self, stage: int) -> None:
        self._stages[stage].arm()

    def reduce(self, stage: int) -> None:
        self._stages[stage].launch_rest()

    def finish(self) -> None:
        self._sum_ties()
        self._sum_partial()
        for flat in self.flats.values():
            if flat.stop > flat.early_stop:
                self.launch(flat.grads[flat.early_stop : flat.stop])
        for pending in self._pending:
            pending.wait()
        self._pending.clear()

    def launch(self, grads: Tensor) -> None:
        """Begin the sum of a range of gradients over mesh.grad."""
        self._pending.append(all_reduce_start(grads, self.mesh.grad))

    def _sum_ties(self) -> None:
        """Give both uses of a tied parameter the sum of their gradients, before the data axis sums."""
        for tie in self.ties:
            uses = [self._find(stage, tie.name, tied=bool(index)) for index, stage in enumerate(tie.stages)]
            here = [use for use in uses if use is not None]
            if len(here) == 2:
                torch.add(here[0], here[1], out=here[0])
                here[1].copy_(here[0])
            elif here:
                peer = tie.ranks[1] if uses[0] is not None else tie.ranks[0]
                here[0].copy_(exchange_sum(here[0], self.mesh.pipeline, peer))

    def _find(self, stage: int, name: str, *, tied: bool) -> Tensor | None:
        flat = self.flats.get(stage)
        for placed in flat.placed if flat else ():
            if placed.specs[0].name == name and placed.specs[0].tied == tied:
                return placed.of(flat.grads)  # type: ignore[union-attr]
        return None

    def _sum_partial(self) -> None:
        """Sum over tensor, in one message, the gradients of which each rank has only a part."""
        views = [
            (spec, spec.view(placed.of(flat.grads)))
            for flat in self.flats.values()
            for placed in flat.placed
            for spec in placed.specs
            if "tensor" in spec.sum_over
        ]
        if not views:
            return
        # Several ranks may hold the same box while others hold another (replicated key/value heads): each puts
        # its part where it belongs in the whole.
        sizes = [spec.global_shape if "tensor" in spec.shards else tuple(view.shape) for spec, view in views]
        message = torch.zeros(sum(map(_numel, sizes)), dtype=views[0][1].dtype, device=views[0][1].device)
        places, at = [], 0
        for (spec, view), size in zip(views, sizes, strict=True):
            whole = message[at : at + _numel(size)].view(size)
            places.append(whole[slice(*spec.box[0])] if "tensor" in spec.shards else whole)
            places[-1].copy_(view)
            at += _numel(size)
        all_reduce(message, self.mesh.tensor)
        for (_, view), place in zip(views, places, strict=True):
            view.copy_(place)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


class _StageSync:
    """Counts one stage's accumulations and launches its buckets, in index order so that all ranks agree."""

    def __init__(self, owner: Replicate, flat: FlatBuffers) -> None:
        self.owner, self.flat = owner, flat
        self._bucket_of: dict[nn.Parameter, Bucket] = {p: b for b in flat.buckets for p in b.parameters}
        self._expected: Counter[nn.Parameter] = Counter()
        self._learned = False
        self._left: Counter[Bucket] = Counter()
        self._armed = False
        self._next = 0
        for placed in flat.placed:
            placed.parameter.register_post_accumulate_grad_hook(self._by_autograd(placed))

    def _by_autograd(self, placed: Placed):  # noqa: ANN202
        """For layers without a sink: autograd has added to param.grad, a view of the buffer where dtypes agree."""
        buffer = placed.of(self.flat.grads)

        def hook(parameter: Tensor) -> None:
            grad = parameter.grad
            if grad is not None and grad.data_ptr() != buffer.data_ptr():
                buffer.add_(grad)
                parameter.grad = None
            self.accumulated(placed.parameter)

        return hook

    def arm(self) -> None:
        self._armed, self._next = True, 0
        if not self._learned:
            self._expected.clear()
        self._left = Counter({b: sum(self._expected[p] for p in b.parameters) for b in self.flat.buckets})

    def accumulated(self, parameter: nn.Parameter) -> None:
        if not self._armed:
            return
        if not self._learned:
            # How often a parameter is used in one backward shows in the first step, which reduces at its end.
            self._expected[parameter] += 1
            return
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            return
        self._left[bucket] -= 1
        if self._left[bucket] < 0:
            raise RuntimeError(
                "a parameter got a gradient after its bucket was sent: it was used more often in this backward than in "
                "the first step's; a model must use its parameters equally often in every microbatch"
            )
        self._launch_ready()

    def _launch_ready(self) -> None:
        buckets = self.flat.buckets
        while self._next < len(buckets) and self._left[buckets[self._next]] == 0:
            self._launch_next()

    def _launch_next(self) -> None:
        bucket = self.flat.buckets[self._next]
        self._next += 1
        self.owner.launch(self.flat.grads[bucket.start : bucket.stop])

    def launch_rest(self) -> None:
        while self._next < len(self.flat.buckets):
            self._launch_next()
        self._armed, self._learned, self._next = False, True, 0


def spec_grads(flats: Mapping[int, FlatBuffers]) -> list[tuple[ParamSpec, Tensor]]:
    """Every canonical piece on this rank with its gradient, without padding."""
    return [
        (spec, spec.view(placed.of(flat.grads)))
        for flat in flats.values()
        for placed in flat.placed
        for spec in placed.specs
    ]
