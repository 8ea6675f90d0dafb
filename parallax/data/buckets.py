"""Flat buffers: one stage's parameters and gradients, each in one contiguous piece of memory.

Gradients are views of one buffer, so nothing is packed before a reduction, and the norm, the clip and the optimizer
are one pass. The buffer is laid out

    [ early, in reverse order of use | late with weight decay | late without | tied ]

early: gradients that are final once their stage's last backward has passed them; cut into buckets. late: those that
need a sum over another axis first (norms under sequence parallelism, tied embeddings), and the small ones. tied: second
uses of a parameter of the same stage, which the optimizer never sees. Every parameter starts at a multiple of 64
elements, so that vectorised kernels treat an element alike wherever a stage split puts it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parallax.params import ParamSpec

__all__ = ["Bucket", "FlatBuffers", "Placed"]

ALIGN = 64


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A parameter in the flat buffers: elements [start, start + numel)."""

    name: str
    parameter: nn.Parameter
    specs: tuple[ParamSpec, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.parameter.numel()

    def of(self, flat: Tensor) -> Tensor:
        """The parameter's part of a flat buffer, in the parameter's shape."""
        return flat[self.start : self.stop].view(self.parameter.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Elements [start, stop) of the gradients, reduced in one call, and the parameters that fill them."""

    start: int
    stop: int
    parameters: tuple[nn.Parameter, ...]


class FlatBuffers:
    """Owns the memory of one stage's parameters (`values`) and gradients (`grads`).

    model: parameters that have memory; they become views of `values`. grad_dtype: of the gradients.
    tied: canonical names of parameters that have a second use, on this stage or on another.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[ParamSpec],
        *,
        bucket_bytes: int,
        grad_dtype: torch.dtype,
        tied: Collection[str] = (),
    ) -> None:
        by_parameter: dict[str, list[ParamSpec]] = {}
        for spec in specs:
            by_parameter.setdefault(spec.parameter, []).append(spec)
        named = [(name, p, tuple(by_parameter[name])) for name, p in model.named_parameters(remove_duplicate=False)]
        firsts = {spec.name for spec in specs if not spec.tied}
        seconds = [item for item in named if item[2][0].tied and item[2][0].name in firsts]
        rest = [item for item in reversed(named) if item not in seconds]
        # A tied weight waits for its other use, a partial one for a sum over another axis: before the data axis sums.
        late = [i for i in rest if not i[2][0].decay or any(s.sum_over or s.name in tied for s in i[2])]
        early = [item for item in rest if item not in late]
        late_decay = [item for item in late if item[2][0].decay]
        late_plain = [item for item in late if not item[2][0].decay]

        self.placed: list[Placed] = []
        self.early_stop = self._place(early, 0)
        self.decay_stop = self._place(late_decay, self.early_stop)
        self.stop = self._place(late_plain, self.decay_stop)
        end = self._place(seconds, self.stop)
        self.by_name = {p.name: p for p in self.placed}
        self.buckets = self._cut(len(early), bucket_bytes, grad_dtype.itemsize)
        self._own(end, grad_dtype)

    def _place(self, items: Sequence[tuple[str, nn.Parameter, tuple[ParamSpec, ...]]], at: int) -> int:
        for name, parameter, specs in items:
            self.placed.append(Placed(name, parameter, specs, at))
            at += -(-parameter.numel() // ALIGN) * ALIGN
        return at

    def _cut(self, num_early: int, bucket_bytes: int, itemsize: int) -> list[Bucket]:
        """Buckets of at least bucket_bytes (the last may be smaller), each a run of early parameters."""
        buckets: list[Bucket] = []
        start, members = 0, []
        for index, placed in enumerate(self.placed[:num_early]):
            members.append(placed.parameter)
            last = index == num_early - 1
            stop = self.early_stop if last else self.placed[index + 1].start
            if last or (stop - start) * itemsize >= bucket_bytes:
                buckets.append(Bucket(start, stop, tuple(members)))
                start, members = stop, []
        return buckets

    def _own(self, end: int, grad_dtype: torch.dtype) -> None:
        example = self.placed[0].parameter if self.placed else torch.empty(0)
        self.values = torch.zeros(self.stop, dtype=example.dtype, device=example.device)
        self.grads = torch.zeros(end, dtype=grad_dtype, device=example.device)
        for placed in self.placed:
            if placed.start < self.stop:
                placed.of(self.values).copy_(placed.parameter.detach())
        for placed in self.placed:
            source = placed
            if placed.start >= self.stop:  # a second use shares the memory of the first
                source = self.first_use(placed)
            placed.parameter.data = source.of(self.values)
            if grad_dtype == example.dtype:
                placed.parameter.grad = placed.of(self.grads)

    def first_use(self, tied: Placed) -> Placed:
        """The placed parameter whose canonical name a tied one bears."""
        name = tied.specs[0].name
        return next(p for p in self.placed if not p.specs[0].tied and p.specs[0].name == name)
