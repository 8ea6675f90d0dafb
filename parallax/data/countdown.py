"""Knows when a bucket's gradients are complete, and says so in bucket order, the same on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Bucket, Placed
from parallax.gradients import GradSink

__all__ = ["Countdown", "is_counted"]


def is_counted(parameter: nn.Parameter) -> bool:
    """Whether a Countdown counts its gradients: from then on they are its buffers', until `remove`."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}  # torch has no public way to ask
    return any(isinstance(getattr(getattr(h, "func", None), "__self__", None), Countdown) for h in hooks.values())


class Countdown:
    """Counts the gradients that a stage's parameters get in its last backward, launches each bucket once it is full.

    How often a parameter is used in one backward shows in the first step, whose buckets all go at its end. Where a
    bucket's memory goes with it (ZeRO 2 and 3) even the first step must not hold all: there each parameter is expected
    once, and what comes after its bucket has gone goes at the end. With `each` a bucket goes after every microbatch.
    launch begins the reduction of one bucket; late buckets are the caller's.
    """

    def __init__(
        self,
        flat: FlatBuffers,
        sink: GradSink | None,
        launch: Callable[[Bucket], None],
        *,
        each: bool = False,
        learns: bool = True,
    ) -> None:
        self.flat, self._launch, self._each = flat, launch, each
        self._buckets = flat.early
        self._bucket_of: dict[nn.Parameter, Bucket] = {p.parameter: b for b in self._buckets for p in b.placed}
        self._again = flat.level >= 2  # a bucket may go more than once
        self._learned = self._again or not learns
        self._expected = Counter(p for p in self._bucket_of if p.requires_grad and self._learned)
        self._left: Counter[Bucket] = Counter()
        self._armed = False
        self._next = 0
        self.before_gradient: Callable[[], None] | None = None
        if sink is not None:
            places = {placed.parameter: placed for placed in flat.placed}
            sink.buffer_of = lambda parameter: flat.grad(places[parameter])
            sink.on_accumulated = self._accumulated
        self._handles = [
            placed.parameter.register_post_accumulate_grad_hook(partial(self._by_autograd, placed))
            for placed in flat.placed
        ]

    def remove(self) -> None:
        """Count no more: the parameters are anybody's."""
        for handle in self._handles:
            handle.remove()

    def _by_autograd(self, placed: Placed, parameter: Tensor) -> None:
        """For layers without a sink: autograd has put or added something into param.grad."""
        grad = parameter.grad
        if grad is None:  # a layer has told the sink; torch calls the hook all the same
            return
        if self.before_gradient is not None:
            self.before_gradient()
        self.flat.add_grad(placed, grad)
        self._accumulated(placed.parameter)

    def disarm(self) -> None:
        """Not yet: another backward comes first. Nothing must have been launched since `arm`."""
        self._armed = False

    def arm(self) -> None:
        """The last backward comes next."""
        if self._each:
            return
        self._armed, self._next = True, 0
        if not self._learned:
            self._expected.clear()
        self._left = Counter({b: sum(self._expected[p.parameter] for p in b.placed) for b in self._buckets})

    def _accumulated(self, parameter: nn.Parameter) -> None:
        if self._each:
            self._accumulated_each(parameter)
            return
        if not self._armed:
            return
        if not self._learned:
            self._expected[parameter] += 1
            return
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            return
        self._left[bucket] -= 1
        if self._left[bucket] < 0 and not self._again:
            raise RuntimeError(
                "a parameter got a gradient after its bucket was sent: it was used more often in this backward than in "
                "the first step's, or there was a second backward before the optimizer's step. A model must use its "
                "parameters equally often in every microbatch; all backwards but the last belong into "
                "`with model.accumulate():`"
            )
        while self._next < len(self._buckets) and self._left[self._buckets[self._next]] <= 0:
            self._launch_next()

    def _accumulated_each(self, parameter: nn.Parameter) -> None:
        bucket = self._bucket_of.get(parameter)
        if bucket is None:
            return
        self._left[bucket] = (self._left[bucket] or self._num_trained(bucket)) - 1
        if self._left[bucket] == 0:
            self._launch(bucket)

    @staticmethod
    def _num_trained(bucket: Bucket) -> int:
        return sum(placed.parameter.requires_grad for placed in bucket.placed)

    def _launch_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        self._launch(bucket)

    def launch_rest(self) -> None:
        """The last backward is done: launch what is left."""
        self._left.clear()
        while self._next < len(self._buckets) and not self._each:
            self._launch_next()
        for bucket in self._buckets:
            if self.flat.has_grads(bucket):
                self._launch(bucket)
        self._armed, self._learned, self._next = False, True, 0
