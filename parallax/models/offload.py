"""Activations that wait for their backward in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["offloaded"]

LEAST_BYTES = 1 << 16
Kept = tuple[torch.device | None, Tensor]


@contextmanager
def offloaded(least_bytes: int = LEAST_BYTES) -> Iterator[None]:
    """What autograd saves inside goes to the host, pinned, and comes back when the backward asks for it.

    Parameters stay: they are no activations. So does what is smaller than least_bytes. torch's own save_on_cpu would
    send the weights too. The copies run on the compute stream, so the allocator may take the memory again at once.
    """
    with saved_tensors_hooks(lambda tensor: pack(tensor, least_bytes), unpack):
        yield


def pack(tensor: Tensor, least_bytes: int) -> Kept:
    if isinstance(tensor, nn.Parameter) or tensor.nbytes < least_bytes:
        return None, tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)  # in its strides: products round alike
    host.copy_(tensor, non_blocking=True)
    return tensor.device, host


def unpack(kept: Kept) -> Tensor:
    device, tensor = kept
    return tensor if device is None else tensor.to(device, non_blocking=True)
