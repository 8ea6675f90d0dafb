"""The collectives: the only file that calls them. On an axis of size 1 each is the identity.

Every call adds the bytes that this rank sends, by the bandwidth-optimal count of its docstring, to
`axis.traffic` under the collective's name; n is the size of the axis.

Note: reduce-scatter on gloo. gloo's own reduce-scatter clones its input and reduces all of it: 2.4 ms for
0.5 MB on 2 ranks, where an all-to-all of the slices and a local sum takes 0.6 ms (4 ranks: 9.1 and 2.3 ms).
The all-to-all moves the bytes of the optimal algorithm, and sums in rank order, so it is deterministic too.

Where the ranks of an axis share memory (shared_memory.py) the collectives go through it, and are over when they begin.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallax.mesh import Axis

__all__ = [
    "Pending",
    "all_gather",
    "all_gather_start",
    "all_reduce",
    "all_reduce_start",
    "barrier",
    "broadcast",
    "close",
    "exchange",
    "exchange_sum",
    "gather_json",
    "reduce_scatter",
    "reduce_scatter_start",
    "sum_start",
]


BY_MESSAGES = 1 << 20
"""Bytes of a shard from which on gloo gathers by messages."""


class Pending:
    """A collective under way. `wait` returns its result, once and for all."""

    __slots__ = ("_finish", "_result", "_work")

    def __init__(self, result: Tensor, work: Any = None, finish: Callable[[Tensor], Tensor] | None = None) -> None:
        self._result, self._work, self._finish = result, work, finish

    def advance(self) -> None:
        """Begin what follows, where there are two collectives; every rank must do so at the same place."""

    def wait(self) -> Tensor:
        """The result; blocks the caller (on CUDA: the current stream) until it is there."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        if self._finish is not None:
            self._result, self._finish = self._finish(self._result), None
        return self._result


class _Chain(Pending):
    """Two collectives, the second of which begins from the result of the first."""

    __slots__ = ("_first", "_following", "_then")

    def __init__(self, first: Pending, then: Callable[[Tensor], Pending]) -> None:
        self._first: Pending | None = first
        self._then = then
        self._following: Pending | None = None

    def advance(self) -> None:
        if self._first is not None:
            first, self._first = self._first, None  # lets go of what it received
            self._following = self._then(first.wait())

    def wait(self) -> Tensor:
        self.advance()
        assert self._following is not None
        return self._following.wait()


# torch 2.13 renames these two; 2.11 knows only the old names.
@functools.cache
def _named(new: str, old: str) -> Callable[..., Any]:
    return getattr(dist, new, None) or getattr(dist, old)


def _count(axis: Axis, kind: str, num_bytes: int) -> None:
    axis.traffic[kind] += num_bytes


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it, as the backends take one for granted: its elements in order, one after the other."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def _fill(tensor: Tensor, values: Tensor) -> Tensor:
    """Write values into a tensor of whatever strides; an expanded dim has memory for one of its elements alone."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    return tensor.copy_(values)


def all_reduce_start(tensor: Tensor, axis: Axis, op: str = "sum") -> Pending:
    """Begin `all_reduce`; the tensor must be left alone until `wait`."""
    if axis.group is None:
        return Pending(tensor)
    if (dense := _dense(tensor)) is not tensor:
        pending = all_reduce_start(dense, axis, op)
        return Pending(tensor, pending, lambda result: _fill(result, dense))
    _count(axis, "all_reduce", 2 * (axis.size - 1) * tensor.nbytes // axis.size)
    if axis.board is not None:
        return Pending(axis.board.all_reduce(tensor, op))
    reduce_op = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
    return Pending(tensor, dist.all_reduce(tensor, op=reduce_op, group=axis.group, async_op=True))


def sum_start(flat: Tensor, axis: Axis) -> Pending:
    """Begin the sum of a long vector over the axis, in place, adding in rank order where the backend leaves the choice.

    gloo's ring adds each chunk in another order, so that what two stages or two schedules sum would differ in the last
    bit with where it lies in the vector. With more than two ranks the vector, which they must divide, goes by an
    all-to-all of slices, sums in rank order, and an all-gather. Sends 2(n-1)/n of its bytes, counted by their kinds.
    """
    if axis.group is None or axis.backend != "gloo" or axis.size == 2 or axis.board is not None:
        return all_reduce_start(flat, axis)
    own = flat.view(axis.size, -1)[axis.rank]
    return _Chain(reduce_scatter_start(flat, axis), lambda total: all_gather_start(own.copy_(total), axis, out=flat))


def all_reduce(tensor: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Sum (or max) over the axis, in place; returns the tensor. Sends 2(n-1)/n of its bytes."""
    return all_reduce_start(tensor, axis, op).wait()


def all_gather_start(shard: Tensor, axis: Axis, out: Tensor | None = None, about: str = "") -> Pending:
    """Begin `all_gather`. out: where the result goes, contiguous (else ValueError); the shard may be its part of it.

    about: what it is, the same text on every rank; where ranks share memory another one is an error.
    """
    if axis.group is None:
        return Pending(shard if out is None else out.copy_(shard))
    shard = _dense(shard)
    if out is not None and not out.is_contiguous():
        raise ValueError(f"an all-gather writes its result in order, and out has strides {out.stride()}")
    _count(axis, "all_gather", (axis.size - 1) * shard.nbytes)
    whole = shard.new_empty((axis.size * shard.shape[0], *shard.shape[1:])) if out is None else out
    if axis.board is not None:
        return Pending(axis.board.all_gather(shard, whole, about))
    if axis.backend == "gloo" and shard.nbytes >= BY_MESSAGES:
        return _gather_by_messages(whole, shard, axis)
    gather = _named("all_gather_single", "all_gather_into_tensor")
    return Pending(whole, gather(whole, shard, group=axis.group, async_op=True))


class _All:
    """Several messages under way as one."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def _gather_by_messages(whole: Tensor, shard: Tensor, axis: Axis) -> Pending:
    """Each rank's shard straight to its place: gloo's own all-gather makes a copy of the whole."""
    parts = whole.view(axis.size, -1)
    if parts[axis.rank].data_ptr() != shard.data_ptr():
        parts[axis.rank].copy_(shard.view(-1))
    ops = []
    for step in range(1, axis.size):  # everyone sends to another one
        to, source = (axis.rank + step) % axis.size, (axis.rank - step) % axis.size
        ops.append(dist.P2POp(dist.isend, parts[axis.rank], axis.ranks[to], axis.group))
        ops.append(dist.P2POp(dist.irecv, parts[source], axis.ranks[source], axis.group))
    return Pending(whole, _All(dist.batch_isend_irecv(ops)))


def all_gather(shard: Tensor, axis: Axis) -> Tensor:
    """Concatenate the equal shards of all ranks along dim 0. Sends (n-1) times the shard's bytes."""
    return all_gather_start(shard, axis).wait()


def reduce_scatter_start(whole: Tensor, axis: Axis, about: str = "") -> Pending:
    """Begin `reduce_scatter`; about: as for `all_gather_start`."""
    if axis.group is None:
        return Pending(whole)
    whole = _dense(whole)
    _count(axis, "reduce_scatter", (axis.size - 1) * whole.nbytes // axis.size)
    shape = (whole.shape[0] // axis.size, *whole.shape[1:])
    if axis.board is not None:
        return Pending(axis.board.reduce_scatter(whole, whole.new_empty(shape), about))
    if axis.backend == "gloo":  # see the note at the top
        parts = torch.empty_like(whole)
        work = dist.all_to_all_single(parts, whole, group=axis.group, async_op=True)
        return Pending(parts, work, lambda received: _sum_parts(received, axis.size, shape))
    shard = whole.new_empty(shape)
    scatter = _named("reduce_scatter_single", "reduce_scatter_tensor")
    return Pending(shard, scatter(shard, whole, group=axis.group, async_op=True))


def _sum_parts(parts: Tensor, size: int, shape: tuple[int, ...]) -> Tensor:
    stacked = parts.view(size, *shape)
    total = stacked[0] + stacked[1]
    for index in range(2, size):
        total += stacked[index]
    return total


def reduce_scatter(whole: Tensor, axis: Axis) -> Tensor:
    """Sum over the axis and keep this rank's slice of dim 0. Sends (n-1)/n of the bytes.

    dim 0 must divide by the size of the axis.
    """
    return reduce_scatter_start(whole, axis).wait()


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Copy the tensor of the axis's rank `source` to all, in place. Sends its bytes (n-1 times at the source).

    Of any strided layout and any dtype: the elements go one after the other, as bytes.
    """
    if axis.group is None or tensor.numel() == 0:
        return tensor
    if axis.rank == source:
        _count(axis, "broadcast", (axis.size - 1) * tensor.nbytes)
    dense = _dense(tensor)  # gloo takes memory from the first element on, whatever the strides
    if axis.board is not None:
        axis.board.broadcast(dense, source)
    else:
        flat = dense.as_strided((dense.numel(),), (1,))  # a dim of one element may have any stride
        dist.broadcast(flat.view(torch.uint8), axis.ranks[source], group=axis.group)
    if dense is not tensor and axis.rank != source:
        _fill(tensor, dense)
    return tensor


def exchange(tensor: Tensor, axis: Axis, peer: int) -> Tensor:
    """Another rank's tensor of the same shape, in return for this one. Only the two take part: each sends its bytes."""
    _count(axis, "exchange", tensor.nbytes)
    tensor = _dense(tensor)
    other = torch.empty_like(tensor)
    rank = axis.ranks[peer]
    ops = [dist.P2POp(dist.isend, tensor, rank, axis.group), dist.P2POp(dist.irecv, other, rank, axis.group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return other


def exchange_sum(tensor: Tensor, axis: Axis, peer: int) -> Tensor:
    """The sum of this rank's tensor and that of one other rank of the axis, the same bits on both: a + b = b + a."""
    return exchange(tensor, axis, peer).add_(tensor)


SHORT_JSON = 512


def gather_json(value: Any, axis: Axis, device: torch.device) -> list[Any]:
    """Every rank's value, on every rank, in rank order. JSON, never pickle, so no message can run code.

    An all-gather of each text's length and its first 512 bytes, and, where one is longer, another of the rest.
    """
    if axis.group is None:
        return [json.loads(json.dumps(value))]
    text = json.dumps(value).encode()
    heads = all_gather(_padded(len(text).to_bytes(8, "little") + text[:SHORT_JSON], 8 + SHORT_JSON, device), axis)
    found = [row.numpy().tobytes() for row in heads.view(axis.size, -1).cpu()]
    lengths = [int.from_bytes(row[:8], "little") for row in found]
    texts = [row[8:] for row in found]
    if (longest := max(lengths)) > SHORT_JSON:
        rest = all_gather(_padded(text[SHORT_JSON:], longest - SHORT_JSON, device), axis)
        tails = rest.view(axis.size, -1).cpu()
        texts = [head + tail.numpy().tobytes() for head, tail in zip(texts, tails, strict=True)]
    return [json.loads(text[:length]) for text, length in zip(texts, lengths, strict=True)]


def _padded(data: bytes, size: int, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(data.ljust(size, b" ")), dtype=torch.uint8).to(device)


def barrier(axis: Axis, device: torch.device) -> None:
    """Return when every rank of the axis has come. An all-reduce of 8 bytes, so it works alike on every backend."""
    all_reduce(torch.zeros(1, dtype=torch.int64, device=device), axis)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def close() -> None:
    """Leave the process groups, where there are any. After this the mesh is dead."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
