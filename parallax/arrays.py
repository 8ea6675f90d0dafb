"""Collectives for arrays of any framework that speaks DLPack: torch, NumPy, JAX, TensorFlow.

So that a program that trains elsewhere can average its gradients over a parallax mesh, as Horovod (arXiv:1802.05799)
does. An array comes back as the type that it went in as, as a new array; the one that was given is left alone.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parallax import comm
from parallax.errors import ConfigError
from parallax.mesh import Axis, Mesh

__all__ = ["allgather", "allreduce", "broadcast"]

CARRIED = {
    torch.bool: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}
"""What the backends do not add or send, and what it travels as. Sums wrap around as they do in NumPy."""


def allreduce(array: Any, over: Mesh | Axis, op: str = "mean") -> Any:
    """The mean, sum or max over the ranks; over: an axis, or of a mesh its data axis.

    Sends 2(n-1)/n of the bytes. Raises ConfigError for another op, or what is no array.
    """
    if op not in ("mean", "sum", "max"):
        raise ConfigError(f"op={op} is unknown; choose mean, sum or max")
    tensor, axis = _tensor(array), _axis(over)
    if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ConfigError(f"the mean of {tensor.dtype} is no {tensor.dtype}; take op='sum', or convert the array")
    if op == "max" and (tensor.is_complex() or tensor.dtype == torch.uint64):
        raise ConfigError(f"op=max has no order for {tensor.dtype}; convert the array to another dtype")
    total = comm.all_reduce(_carried(tensor), axis, "max" if op == "max" else "sum")
    return _like((total / axis.size if op == "mean" else total).to(tensor.dtype), array)


def allgather(array: Any, over: Mesh | Axis) -> Any:
    """The ranks' arrays of one shape, concatenated along the first dim in rank order. Sends (n-1) times the bytes."""
    tensor = _tensor(array)
    if tensor.dim() == 0:
        raise ConfigError("allgather concatenates along the first dim, and a scalar has none; reshape it to (1,)")
    return _like(comm.all_gather(_carried(tensor), _axis(over)).to(tensor.dtype), array)


def broadcast(array: Any, over: Mesh | Axis, source: int = 0) -> Any:
    """The array of one rank (its place on the axis), on all. The others give one of the same shape and dtype."""
    axis = _axis(over)
    if not 0 <= source < axis.size:
        raise ConfigError(f"source={source} is no rank of an axis of {axis.size}; choose 0 to {axis.size - 1}")
    tensor = _tensor(array)
    return _like(comm.broadcast(_carried(tensor), axis, source).to(tensor.dtype), array)


def _axis(over: Mesh | Axis) -> Axis:
    return over.grad if isinstance(over, Mesh) else over


def _carried(tensor: Tensor) -> Tensor:
    """In a dtype that can be sent and added; half precision in float32, so that a mean does not overflow as a sum."""
    if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
        return tensor.float()
    return tensor.to(CARRIED.get(tensor.dtype, tensor.dtype))


def _tensor(array: Any) -> Tensor:
    """A contiguous copy in torch."""
    if isinstance(array, Tensor):
        return array.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(array, np.ndarray | np.generic):  # DLPack would refuse an array that cannot be written to
        return _from_numpy(np.asanyarray(array))
    if not hasattr(array, "__dlpack__"):
        raise ConfigError(f"{type(array).__name__} is no array that speaks DLPack; give a torch, NumPy or JAX array")
    return torch.from_dlpack(array).clone(memory_format=torch.contiguous_format)


def _from_numpy(array: np.ndarray) -> Tensor:
    if isinstance(array, np.ma.MaskedArray):
        raise ConfigError("a masked array has no value where its mask is; fill it: array.filled(0)")
    try:
        native = array.astype(array.dtype.newbyteorder("="), order="C", copy=True, subok=False)
        return torch.from_numpy(native)
    except TypeError as error:
        raise ConfigError(
            f"an array of {array.dtype} cannot be sent; convert it to numbers that torch has: array.astype('float64')"
        ) from error


def _like(tensor: Tensor, array: Any) -> Any:
    """The tensor as the array's type."""
    if isinstance(array, Tensor):
        return tensor
    if isinstance(array, np.ndarray):
        return tensor.cpu().numpy()
    if isinstance(array, np.generic):
        return type(array)(tensor.item())
    framework = type(array).__module__.partition(".")[0]
    if framework in ("jax", "jaxlib"):
        return sys.modules["jax"].dlpack.from_dlpack(tensor)
    if framework == "tensorflow":
        return sys.modules["tensorflow"].experimental.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))
    return tensor
