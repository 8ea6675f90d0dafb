"""How activations and gradients travel between pipeline ranks: P2P between processes, LocalTransport within one.

A message is named by what it is, `(kind, stage, microbatch)`: kind F is the input of `stage`, kind B the gradient
of the output of `stage`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallax.mesh import Mesh

__all__ = ["P2P", "LocalTransport", "Message", "Receipt", "Transport"]


class Message(NamedTuple):
    """What travels: kind is "F" (the input of stage) or "B" (the gradient of the output of stage)."""

    kind: str
    stage: int
    microbatch: int


class Receipt(Protocol):
    """A message that was asked for."""

    def ready(self) -> bool:
        """False while it has not come and waiting for it would block the only process there is."""
        ...

    def wait(self) -> Tensor:
        """The tensor."""
        ...


class Transport(Protocol):
    def send(self, tensor: Tensor, message: Message, rank: int) -> None:
        """Begin to send to a pipeline rank; the tensor must not change afterwards."""
        ...

    def receive(self, empty: Callable[[], Tensor], message: Message, rank: int) -> Receipt:
        """Begin to receive from a pipeline rank; empty() makes the memory."""
        ...

    def flush(self) -> None:
        """Return when everything sent has left."""
        ...


class _Arriving:
    __slots__ = ("_tensor", "_work")

    def __init__(self, tensor: Tensor, work: Any) -> None:
        self._tensor, self._work = tensor, work

    def ready(self) -> bool:
        return True  # another process sends it, so waiting is right

    def wait(self) -> Tensor:
        self._work.wait()
        return self._tensor


class P2P:
    """Point-to-point between processes, one channel per direction.

    Volume: each message's bytes once, counted at the sender under `send`. To a higher pipeline rank it goes through
    mesh.pipeline, to a lower through mesh.pipeline_up: under NCCL two communicators, since one that is ordered could
    deadlock 1F1B. gloo matches by tag, so there the order of posting does not matter.
    """

    def __init__(self, mesh: Mesh, num_stages: int) -> None:
        self.mesh, self.num_stages = mesh, num_stages
        self._leaving: list[tuple[Tensor, Any]] = []

    def _tag(self, message: Message) -> int:
        return (message.microbatch * self.num_stages + message.stage) * 2 + (message.kind == "B")

    def send(self, tensor: Tensor, message: Message, rank: int) -> None:
        axis = self.mesh.pipeline if rank > self.mesh.pipeline.rank else self.mesh.pipeline_up
        tensor = tensor.contiguous()
        axis.traffic["send"] += tensor.nbytes
        work = dist.isend(tensor, axis.ranks[rank], group=axis.group, tag=self._tag(message))
        # The tensor lives until it has left; what has left by now is let go.
        self._leaving = [(t, w) for t, w in self._leaving if not w.is_completed()]
        self._leaving.append((tensor, work))

    def receive(self, empty: Callable[[], Tensor], message: Message, rank: int) -> Receipt:
        axis = self.mesh.pipeline if rank < self.mesh.pipeline.rank else self.mesh.pipeline_up
        tensor = empty()
        return _Arriving(tensor, dist.irecv(tensor, axis.ranks[rank], group=axis.group, tag=self._tag(message)))

    def flush(self) -> None:
        for _, work in self._leaving:
            work.wait()
        self._leaving.clear()


class _Expected:
    __slots__ = ("_box", "_message")

    def __init__(self, box: dict[Message, Tensor], message: Message) -> None:
        self._box, self._message = box, message

    def ready(self) -> bool:
        return self._message in self._box

    def wait(self) -> Tensor:
        return self._box.pop(self._message)


class LocalTransport:
    """All pipeline ranks in one process share this one: a pipeline of any length under a debugger."""

    def __init__(self) -> None:
        self._box: dict[Message, Tensor] = {}

    def send(self, tensor: Tensor, message: Message, rank: int) -> None:
        self._box[message] = tensor.clone()

    def receive(self, empty: Callable[[], Tensor], message: Message, rank: int) -> Receipt:
        return _Expected(self._box, message)

    def flush(self) -> None:
        return


def empty_like_boundary(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    return lambda: torch.empty(shape, dtype=dtype, device=device)
