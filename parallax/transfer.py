"""From the host's memory to a device, without waiting for what the device still does."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A host tensor on the device; the tensor itself where that is the host.

    A copy to a GPU out of memory that is not pinned waits until everything queued before it is done: the host then
    prepares nothing while the GPU computes. So it goes by way of pinned memory, which torch keeps until the copy is
    over.
    """
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
