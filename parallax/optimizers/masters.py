"""What an optimizer updates: master weights of this rank's segments, apart from the model's own where those are coarse
or far."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallax.data.buckets import FlatBuffers

__all__ = ["Masters"]

CHUNK, LARGE_CHUNK = 1 << 17, 1 << 24
"""Elements that a CPU's cache holds; so many that a GPU has all it can do."""


class Masters:
    """A few flat parameters a stage, one for each segment, in float32 or float64.

    Where the model computes in less than float32, or device says that they live elsewhere, they are memory of their
    own; else the model's very own. Collectives: none.
    """

    def __init__(self, flats: Mapping[int, FlatBuffers], device: torch.device | None = None) -> None:
        self.flats = flats
        self.apart = device is not None or any(narrow(flat) for flat in flats.values())
        self.masters: dict[int, list[nn.Parameter]] = {}
        for stage, flat in flats.items():
            values = [flat.values_of(segment) for segment in flat.segments]
            self.masters[stage] = [nn.Parameter(_own(v, device) if self.apart else v) for v in values]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's own parameters, where they are not the same memory."""
        for stage, flat in self.flats.items() if self.apart else ():
            for segment, master in zip(flat.segments, self.masters[stage], strict=True):
                flat.values_of(segment).copy_(master, non_blocking=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over what was written into the model's own parameters. A master that rounds to what is there stays: so
        it does not matter which of the two is loaded first, and nothing is lost where nothing was written.
        """
        for stage, flat in self.flats.items() if self.apart else ():
            for segment, master in zip(flat.segments, self.masters[stage], strict=True):
                values = flat.values_of(segment)
                size = CHUNK if values.device.type == "cpu" else LARGE_CHUNK
                for mine, theirs in zip(master.split(size), values.split(size), strict=True):
                    same = mine.to(theirs) == theirs
                    if same.device.type != "cpu" or not bool(same.all()):  # a GPU would have to be waited for
                        mine.copy_(torch.where(same, mine, theirs.to(mine)))


def narrow(flat: FlatBuffers) -> bool:
    """Whether parameters are too coarse to add small updates to."""
    return flat.dtype in (torch.bfloat16, torch.float16)


def _own(values: Tensor, device: torch.device | None) -> Tensor:
    """A copy on the device, in float32 at least; pinned if it is fetched from and sent to another one."""
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    if device is None or device == values.device:
        return values.to(dtype, copy=True)
    return values.to(device, dtype).pin_memory()
