"""Stands in for NCCL between processes with a simulated device: gloo on the same memory, with NCCL's manners.

Tensors must be the device's and contiguous. Messages have no tags: they are matched in the order of posting, as NCCL
does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["install"]

COLLECTIVES = [
    "all_reduce",
    "all_gather_single",
    "all_gather_into_tensor",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "isend",
    "irecv",
]


def _memory(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not value.is_cuda:
        raise RuntimeError(f"No backend type associated with device type {value.device.type} ({name})")
    if not value.is_contiguous():
        raise ValueError(f"Tensors must be contiguous ({name})")
    return torch.ops.simulated.on_host(value)


def _over_gloo(name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, tag: int = 0, **options: Any) -> Any:
        with torch.no_grad():
            values = [_memory(name, value) for value in args]
            return collective(*values, **{key: _memory(name, value) for key, value in options.items()})

    return call


class _Message(NamedTuple):
    op: Callable[..., Any]
    tensor: Tensor
    peer: int
    group: Any = None


def install() -> None:
    """In a process with a simulated device, before parallax is imported."""
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _over_gloo(name, getattr(dist, name)))
    begin = dist.init_process_group

    def init_process_group(backend: str, **options: Any) -> None:
        assert backend == "nccl", backend
        begin("gloo", **options)

    changed: dict[str, Any] = {
        "init_process_group": init_process_group,
        "get_backend": lambda group=None: "nccl",
        "P2POp": _Message,
        "batch_isend_irecv": lambda ops: [op.op(op.tensor, op.peer, group=op.group) for op in ops],
    }
    for name, value in changed.items():
        setattr(dist, name, value)
