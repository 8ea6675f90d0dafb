"""What the executor and the step ask of the data axis, and what its implementations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from parallax.data.buckets import FlatBuffers
from parallax.data.countdown import Countdown
from parallax.data.late import Tie, sum_partial, sum_ties
from parallax.data.layout import Bucket
from parallax.gradients import GradSink
from parallax.mesh import Mesh

__all__ = ["BucketSync", "GradSync"]


class GradSync(Protocol):
    """Replicate and the levels of ZeRO are implementations; nobody else sees a difference."""

    def zero(self, scale: float = 1.0) -> None:
        """Begin a step: gradients back to zero. They will be `scale` times the true ones."""
        ...

    def unshard(self, stage: int) -> None:
        """Have the stage's parameters in memory when they are used."""
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
        """All stages are done: return when the gradients that this rank's optimizer uses are the global sum."""
        ...

    def publish(self) -> None:
        """The optimizer has changed its parameters: let every rank have them before they are used."""
        ...


class BucketSync(ABC):
    """Reduces each bucket once it is full, and the late one last, after its sums over tied uses and over tensor.

    flats: the buffers of this rank's stages. sinks: where those stages' layers send weight gradients. each: a bucket is
    full after every microbatch, not after the last alone. learns: how often each parameter is used shows in the first
    step; without it is once. reduce_dtype: in which gradients travel; None is their own.
    """

    def __init__(
        self,
        mesh: Mesh,
        flats: Mapping[int, FlatBuffers],
        sinks: Mapping[int, GradSink],
        ties: Sequence[Tie] = (),
        *,
        each: bool = False,
        learns: bool = True,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.reduce_dtype = reduce_dtype
        self.mesh, self.flats, self.ties = mesh, flats, ties
        self._stages = {
            stage: Countdown(flat, sinks.get(stage), partial(self.launch, flat), each=each, learns=learns)
            for stage, flat in flats.items()
        }

    @abstractmethod
    def launch(self, flat: FlatBuffers, bucket: Bucket) -> None:
        """Begin the reduction of one bucket."""

    def to_send(self, grads: Tensor) -> Tensor:
        """The gradients in the dtype in which they travel."""
        return grads if self.reduce_dtype is None else grads.to(self.reduce_dtype)

    @abstractmethod
    def wait(self) -> None:
        """Return when every reduction that was begun is done."""

    def zero(self, scale: float = 1.0) -> None:
        for flat in self.flats.values():
            flat.zero_grads()

    # Who holds every parameter whole has nothing to do in the next six: ZeRO alone has.

    def unshard(self, stage: int) -> None: ...  # noqa: B027

    def reshard(self, stage: int) -> None: ...  # noqa: B027

    def publish(self) -> None: ...  # noqa: B027

    def gather_all(self) -> None:  # noqa: B027
        """Below level 3: have every parameter whole and up to date, for who reads them outside of a forward."""

    def hold(self) -> None:  # noqa: B027
        """The same at any level, and all stay whole and up to date until `release`. May be nested."""

    def release(self) -> None: ...  # noqa: B027

    def remove(self) -> None:
        """Take its hooks off the parameters, and off the modules."""
        for countdown in self._stages.values():
            countdown.remove()

    def held(self) -> list[Tensor]:
        """What it keeps from step to step besides the buffers."""
        return []

    def arm(self, stage: int) -> None:
        self._stages[stage].arm()

    def disarm(self, stage: int) -> None:
        """Take `arm` back, before any gradient has come."""
        self._stages[stage].disarm()

    def when_gradient(self, call: Callable[[], None]) -> None:
        """Have something called before each gradient that autograd gives a parameter is taken."""
        for countdown in self._stages.values():
            countdown.before_gradient = call

    def reduce(self, stage: int) -> None:
        self._stages[stage].launch_rest()

    def finish(self) -> None:
        sum_ties(self.ties, self.flats, self.mesh)
        sum_partial(self.flats, self.mesh)
        for flat in self.flats.values():
            if flat.late is not None:
                self.launch(flat, flat.late)
        self.wait()
