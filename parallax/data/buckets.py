"""The memory of one stage's parameters and gradients, laid out by layout.py, and how much of it a rank keeps.

Gradients are views of one buffer, so nothing is packed before a reduction, and the norm, the clip and the optimizer
are one pass. The level is that of ZeRO (arXiv:1910.02054): from 2 on a bucket's gradients have memory from the first
contribution until they are reduced, and then only in this rank's range; at 3 parameters too have memory only from the
moment they are gathered until they are dropped.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from parallax.data.layout import Bucket, FlatLayout, Placed, Segment, decay_kind
from parallax.mesh import Axis
from parallax.params import ParamSpec

__all__ = ["FlatBuffers", "Fill"]

Fill = Callable[[Placed, Tensor], None]
"""Gives a parameter its initial values, in memory that is zero."""


class FlatBuffers(FlatLayout):
    """Owns the memory of one stage's parameters (`values`) and gradients.

    model: its parameters become views of `values`; those on the meta device are replaced by ones on `device`, so that a
    rank never holds more than it keeps, and one bucket. fill: gives them their values; by default they keep those
    they have. grad_dtype: of the gradients. shards: the axis over which level 1 to 3 cut the buckets.
    For the rest see FlatLayout.
    """

    def __init__(
        self,
        model: nn.Module,
        specs: Sequence[ParamSpec],
        *,
        bucket_bytes: int,
        grad_dtype: torch.dtype,
        tied: Collection[str] = (),
        device: torch.device | str | None = None,
        fill: Fill | None = None,
        level: int = 0,
        ranks: int = 1,
        shards: Axis | None = None,
        group_of: Callable[[str], str | None] | None = None,
        kind_of: Callable[[ParamSpec], str] = decay_kind,
    ) -> None:
        cut = level > 0 and shards is not None and shards.size > 1
        self.level = level if cut else 0
        named, given = _on_device(model, device)
        super().__init__(
            named,
            specs,
            bucket_bytes=bucket_bytes,
            itemsize=grad_dtype.itemsize,
            tied=tied,
            ranks=max(ranks, shards.size if cut and shards else 1),
            shards=shards.size if cut and shards else 1,
            shard=shards.rank if cut and shards else 0,
            group_of=group_of if self.level == 3 else None,
            kind_of=kind_of,
        )
        example = named[0][1] if named else torch.empty(0, device=device)
        self.dtype, self.grad_dtype, self.device = example.dtype, grad_dtype, example.device
        self._bucket_of = {placed: bucket for bucket in self.buckets for placed in bucket.placed}
        self._own_values(fill or _keep(given))
        self._places = [(placed, placed.parameter.data_ptr()) for placed in self.placed]
        del given
        self._own_grads()
        if self.device.type == "cpu":
            _return_memory()

    # --- parameters -----------------------------------------------------------------------------

    def _own_values(self, fill: Fill) -> None:
        sizes = [self.stop] if self.level < 3 else [b.stop - b.start for b in self.buckets]
        self._values = [torch.empty(0, dtype=self.dtype, device=self.device) for _ in sizes]
        shard_size = self.own_size if self.level == 3 else 0
        self._value_shards = torch.zeros(shard_size, dtype=self.dtype, device=self.device)
        self._missing = torch.full((), torch.nan if self.level == 3 else 0, dtype=self.dtype, device=self.device)
        self._views: dict[Bucket, list[tuple[nn.Parameter, Tensor]]] = {}
        with torch.no_grad():
            for index, size in enumerate(sizes):
                memory = torch.zeros(size, dtype=self.dtype, device=self.device)
                self._values[index] = memory
                bucket = self.buckets[index] if self.level == 3 else None
                for placed in bucket.placed if bucket else self.placed:
                    if placed.start < self.stop:
                        view = placed.of(memory, bucket.start if bucket else 0)
                        fill(placed, view)
                        placed.parameter.data = view
                if bucket is not None:
                    self.own_values(bucket).copy_(memory[bucket.own[0] - bucket.start : bucket.own[1] - bucket.start])
                    self._views[bucket] = [(p.parameter, p.parameter.data) for p in bucket.placed]
                    if not bucket.late:
                        self.drop(bucket)
            for placed in self.placed:  # a second use shares the memory of the first
                if placed.start >= self.stop:
                    placed.parameter.data = self.first_use(placed).parameter.data
                    if self.level == 3:
                        self._views[self.buckets[-1]].append((placed.parameter, placed.parameter.data))
            if self.level == 3 and self.late:
                self.drop(self.late)

    @property
    def values(self) -> Tensor:
        """All parameters of the stage, where the level keeps them."""
        (memory,) = self._values
        return memory

    def whole_values(self, bucket: Bucket) -> Tensor:
        """A bucket's parameters; at level 3 memory for them, whose content is what was gathered last."""
        if self.level < 3:
            return self.values[bucket.start : bucket.stop]
        memory = self._values[self.buckets.index(bucket)]
        # The storage grows and shrinks in place: views that autograd saved stay views of it.
        memory.untyped_storage().resize_(memory.nbytes)
        for parameter, view in self._views[bucket]:
            parameter.data = view
        return memory

    def own_values(self, bucket: Bucket) -> Tensor:
        """The range of a bucket's parameters that this rank updates."""
        if self.level < 3:
            return self.values[slice(*bucket.own)]
        return self._value_shards[bucket.own_at : bucket.own_at + bucket.own[1] - bucket.own[0]]

    def drop(self, bucket: Bucket) -> None:
        """Free a bucket's whole parameters (level 3). Who reads one gets NaN, not memory that is gone."""
        for parameter, view in self._views[bucket]:
            parameter.data = self._missing.expand(view.shape)
        self._values[self.buckets.index(bucket)].untyped_storage().resize_(0)

    def strays(self) -> list[Placed]:
        """The parameters that lie elsewhere by now: `parameter.data = tensor` moves one, and no optimizer sees it."""
        if self.level < 3:
            return [placed for placed, at in self._places if placed.parameter.data_ptr() != at]
        missing = self._missing.data_ptr()
        views = {p: view for pairs in self._views.values() for p, view in pairs}
        found = [placed for placed, _ in self._places if placed.parameter.data_ptr() != missing]
        return [placed for placed in found if placed.parameter.data_ptr() != views[placed.parameter].data_ptr()]

    @torch.no_grad()
    def take_in(self, placed: Placed) -> None:
        """Copy a stray parameter to where it belongs (levels 0 to 2; not a second use)."""
        view = placed.of(self.values)
        placed.parameter.data = view.copy_(placed.parameter)

    @torch.no_grad()
    def give_back(self) -> None:
        """Let the parameters, which are whole now, have memory of their own again; a second use shares the first's."""
        for placed in self.placed:
            first = placed.start < self.stop
            placed.parameter.data = placed.parameter.clone() if first else self.first_use(placed).parameter.data

    def values_of(self, segment: Segment) -> Tensor:
        """The parameters of a segment."""
        return _cut(self.values, segment) if self.level < 3 else _cut_own(self._value_shards, segment)

    def held(self) -> tuple[list[Tensor], list[Tensor]]:
        """The memory of parameters and of gradients as it is now."""
        return [*self._values, self._value_shards], [self._grads, self._grad_shards, *self._lent.values()]

    # --- gradients ------------------------------------------------------------------------------

    def _own_grads(self) -> None:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=self.grad_dtype, device=self.device)

        late = self.late
        self._kept_from = 0 if self.level < 2 else (late.start if late else self.stop)
        self._grads = zeros(self.end - self._kept_from)
        self._grad_shards = zeros(self.own_size if self.level >= 2 else 0)
        self._grad_views: dict[Placed, Tensor] = {}
        self._lent: dict[Bucket, Tensor] = {}
        self._shown: list[tuple[Placed, int]] = []
        self._fresh: set[Placed] = set()  # no gradient yet in this step: the memory holds the last one's
        self.grad_scale = 1.0
        # From level 1 on a rank has the sum of a part alone: the rest of the buffer must not pass for a gradient.
        self._shows = self.level == 0 and self.grad_dtype == self.dtype
        self.zero_grads()

    @property
    def grads(self) -> Tensor:
        """All gradients of the stage, where the level keeps them; else the late and the tied ones."""
        return self._grads

    def grad(self, placed: Placed) -> Tensor:
        """Where a parameter's gradient adds up before it is reduced; `param.grad` is that memory where dtypes agree."""
        view = self._memory(placed)
        if placed in self._fresh:
            self._touch(placed, view.zero_())
        return view

    @torch.no_grad()
    def add_grad(self, placed: Placed, grad: Tensor) -> None:
        """Add what autograd has put into param.grad, times `grad_scale`, unless it is the buffer already."""
        view = self._memory(placed)
        if self.grad_scale != 1.0:
            self._add_scaled(placed, grad, view)
        elif placed in self._fresh:
            self._touch(placed, view.copy_(grad))
        elif grad.data_ptr() != view.data_ptr():
            view.add_(grad)
            placed.parameter.grad = None

    def _add_scaled(self, placed: Placed, grad: Tensor, view: Tensor) -> None:
        """The scale costs nothing on the way into the buffer; autograd itself must not add there."""
        if placed not in self._fresh:
            view.add_(grad, alpha=self.grad_scale)
        elif grad.dtype == view.dtype:
            torch.mul(grad, self.grad_scale, out=view)
        else:
            view.copy_(grad).mul_(self.grad_scale)
        self._fresh.discard(placed)
        placed.parameter.grad = None

    def add_given(self) -> None:
        """Add what a script has put into param.grad of a parameter that no backward reached."""
        for placed in tuple(self._fresh):
            if placed.parameter.grad is not None:
                self.add_grad(placed, placed.parameter.grad)

    @torch.no_grad()
    def take_shown(self) -> list[Placed]:
        """Have in the buffer what a script has assigned to param.grad since it was shown; returns those with None."""
        dropped = []
        for placed, at in self._shown:
            grad = placed.parameter.grad
            if grad is None:
                self._memory(placed).zero_()
                dropped.append(placed)
            elif grad.data_ptr() != at:
                placed.parameter.grad = self._memory(placed).copy_(grad).detach()
        return dropped

    def show_grads(self) -> None:
        """Let `param.grad` be the buffer, where a rank has all of it, until the next step begins."""
        passed = self.left_out()
        for placed in self.placed if self.level == 0 else ():
            if not self._shows:
                placed.parameter.grad_dtype = None  # a script may assign one of the parameter's own dtype
            if placed in passed:
                continue
            placed.parameter.grad = self._memory(placed).detach()  # an alias: its owner may give it other memory
        if self.level == 0 and not self._shown:
            self._shown = [(placed, self._memory(placed).data_ptr()) for placed in self.placed]

    @property
    def untouched(self) -> bool:
        """Whether no gradient has come in this step."""
        return len(self._fresh) == len(self.placed)

    def left_out(self) -> set[Placed]:
        """Those that are frozen and that no backward of this step reached: an optimizer of torch would pass them by."""
        return {placed for placed in self._fresh if not placed.parameter.requires_grad}

    def _touch(self, placed: Placed, view: Tensor) -> None:
        self._fresh.discard(placed)
        placed.parameter.grad = view.detach() if self._shows else None

    def _memory(self, placed: Placed) -> Tensor:
        if placed.start >= self._kept_from:
            if placed not in self._grad_views:
                self._grad_views[placed] = placed.of(self._grads, self._kept_from)
            return self._grad_views[placed]
        bucket = self._bucket_of[placed]
        if bucket not in self._lent:
            self._lent[bucket] = torch.zeros(bucket.stop - bucket.start, dtype=self.grad_dtype, device=self.device)
        return placed.of(self._lent[bucket], bucket.start)

    def has_grads(self, bucket: Bucket) -> bool:
        """Whether a bucket has gradients that are not reduced yet (level 2 and 3)."""
        return bucket in self._lent

    def take_grads(self, bucket: Bucket) -> Tensor:
        """A bucket's gradients, for the reduction; from level 2 on their memory is the caller's to let go."""
        for placed in bucket.placed:
            if placed in self._fresh and placed.start >= self._kept_from:  # nobody used it
                self._memory(placed).zero_()
        if bucket.start >= self._kept_from:
            return self._grads[bucket.start - self._kept_from : bucket.stop - self._kept_from]
        if bucket in self._lent:
            return self._lent.pop(bucket)
        return torch.zeros(bucket.stop - bucket.start, dtype=self.grad_dtype, device=self.device)

    def own_grads(self, bucket: Bucket) -> Tensor:
        """Where the reduced gradients of this rank's range of a bucket go."""
        if self.level < 2:
            return self._grads[slice(*bucket.own)]
        return self._grad_shards[bucket.own_at : bucket.own_at + bucket.own[1] - bucket.own[0]]

    def grads_of(self, segment: Segment) -> Tensor:
        """The reduced gradients of a segment."""
        return _cut(self._grads, segment) if self.level < 2 else _cut_own(self._grad_shards, segment)

    def zero_grads(self) -> None:
        """Begin a step. The memory is not touched before a gradient comes, which then overwrites what there was."""
        self._fresh.update(self.placed)
        self._lent.clear()
        for placed in self.placed:
            placed.parameter.grad = None
            if self.level == 0 and not self._shows:  # autograd goes on in the parameter's own
                placed.parameter.grad_dtype = placed.parameter.dtype


def _cut(flat: Tensor, segment: Segment) -> Tensor:
    return flat[segment.start : segment.stop]


def _cut_own(shards: Tensor, segment: Segment) -> Tensor:
    return shards[segment.own_at : segment.own_at + segment.stop - segment.start]


def _on_device(
    model: nn.Module, device: torch.device | str | None
) -> tuple[list[tuple[str, nn.Parameter, tuple[int, ...]]], dict[nn.Parameter, Tensor]]:
    """Each parameter once, by name, with its shape; and the data of those that have any. Replaces those on meta.

    Frozen ones stay where they are, whole on every rank: no optimizer may touch them.
    """
    named, given, seen = [], {}, set()
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in seen or not (parameter.requires_grad or parameter.is_meta):
                continue
            shape = tuple(parameter.shape)
            if parameter.is_meta:
                empty = torch.empty(0, dtype=parameter.dtype, device=device)
                parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, parameter)
            else:
                given[parameter] = parameter.detach()
            seen.add(parameter)
            named.append((f"{module_name}.{name}" if module_name else name, parameter, shape))
    return named, given


def _return_memory() -> None:
    """Give what the module's own parameters took back to the system: glibc keeps pieces below 32 MB for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _keep(given: dict[nn.Parameter, Tensor]) -> Fill:
    def copy(placed: Placed, view: Tensor) -> None:
        view.copy_(given.pop(placed.parameter))

    return copy
