"""Collectives for arrays of any framework that speaks DLPack: torch, NumPy, JAX, TensorFlow.

So that a program that trains elsewhere can average its gradients over a parallax mesh, as Horovod (arXiv:1802.05799)
does. An array comes back as the type that it went in as, as a new array; the one that was given is left alone.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable
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

    Sends 2(n-1)/n of the bytes, and before them 520(n-1) bytes to agree. Raises ConfigError, the same on every rank,
    for another op, what is no array, and where ranks give another op, shape or dtype.
    """

    def check(tensor: Tensor) -> None:
        if op not in ("mean", "sum", "max"):
            raise ConfigError(f"op={op} is unknown; choose mean, sum or max")
        if op == "mean" and not (tensor.is_floating_point() or tensor.is_complex()):
            raise ConfigError(f"the mean of {tensor.dtype} is no {tensor.dtype}; take op='sum', or convert the array")
        if op == "max" and (tensor.is_complex() or tensor.dtype == torch.uint64):
            raise ConfigError(f"op=max has no order for {tensor.dtype}; convert the array to another dtype")

    axis = _axis(over)
    tensor = _agreed(f"allreduce ({op})", array, axis, check)
    total = comm.all_reduce(_carried(tensor), axis, "max" if op == "max" else "sum")
    return _like((total / axis.size if op == "mean" else total).to(tensor.dtype), array)


def allgather(array: Any, over: Mesh | Axis) -> Any:
    """The ranks' arrays of one shape, concatenated along the first dim in rank order. Sends (n-1) times the bytes, and
    520 more; raises as `allreduce` does."""

    def check(tensor: Tensor) -> None:
        if tensor.dim() == 0:
            raise ConfigError("allgather concatenates along the first dim, and a scalar has none; reshape it to (1,)")

    axis = _axis(over)
    tensor = _agreed("allgather", array, axis, check)
    if tensor.numel() == 0:
        return _like(tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:])), array)
    return _like(comm.all_gather(_carried(tensor), axis).to(tensor.dtype), array)


def broadcast(array: Any, over: Mesh | Axis, source: int = 0) -> Any:
    """The array of one rank (its place on the axis), on all. The others give one of the same shape and dtype.

    Sends its bytes, and 520(n-1) to agree; raises as `allreduce` does.
    """
    axis = _axis(over)

    def check(tensor: Tensor) -> None:
        if not isinstance(source, numbers.Integral) or not 0 <= source < axis.size:
            raise ConfigError(f"source={source} is no rank of an axis of {axis.size}; choose 0 to {axis.size - 1}")

    return _like(comm.broadcast(_agreed(f"broadcast (from {source})", array, axis, check), axis, source), array)


def _axis(over: Mesh | Axis) -> Axis:
    axis = over.grad if isinstance(over, Mesh) else over
    if not isinstance(axis, Axis):
        raise ConfigError(f"over={axis} is no mesh and no axis of one; give what init_mesh returns, or its .data")
    return axis


def _agreed(call: str, array: Any, axis: Axis, check: Callable[[Tensor], None]) -> Tensor:
    """The array in torch, when all ranks make the same call with one of the same shape and dtype.

    Sizes that differ would hang, or read memory past an array's end; shapes and dtypes would add what does not belong
    together, with no error. A rank that has a problem of its own lets all others know.
    """
    tensor, problem = torch.empty(0), ""
    try:
        tensor = _tensor(array)
        check(tensor)
    except ConfigError as error:
        problem = str(error)
    told = problem or f"{call} of {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    device = torch.device("cuda" if axis.backend == "nccl" else "cpu")
    every = comm.gather_json([bool(problem), told], axis, device)
    ranks_of: dict[str, list[int]] = {}
    for rank, (_, text) in enumerate(every):
        ranks_of.setdefault(text, []).append(rank)
    if len(ranks_of) == 1 and not problem:
        return tensor
    if len(ranks_of) == 1:
        raise ConfigError(problem)
    which = "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in ranks_of.items())
    raise ConfigError(f"all ranks must make the same call, with arrays of one shape and dtype, and made: {which}")


def _carried(tensor: Tensor) -> Tensor:
    """In a dtype that can be sent and added; half precision in float32, so that a mean does not overflow as a sum."""
    if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
        return tensor.float()
    return tensor.to(CARRIED.get(tensor.dtype, tensor.dtype))


def _tensor(array: Any) -> Tensor:
    """A contiguous copy in torch."""
    if isinstance(array, Tensor):
        if array.layout != torch.strided or array.is_meta:
            kind = "on the meta device" if array.is_meta else f"of layout {array.layout}"
            raise ConfigError(f"a tensor {kind} cannot be sent; give a dense one with values, as from to_dense()")
        return array.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(array, np.ndarray | np.generic):  # DLPack would refuse an array that cannot be written to
        return _from_numpy(np.asanyarray(array))
    if not hasattr(array, "__dlpack__"):
        raise ConfigError(f"{type(array).__name__} is no array that speaks DLPack; give a torch, NumPy or JAX array")
    try:
        return torch.from_dlpack(array).clone(memory_format=torch.contiguous_format)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"this {type(array).__name__} cannot be sent ({error}); convert it to NumPy") from error


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
