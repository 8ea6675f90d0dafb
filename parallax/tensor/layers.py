"""Linear and embedding layers whose weights are cut along the tensor axis (arXiv:1909.08053, section 3).

Each layer computes its own backward, for two reasons: the reduction of the input gradient is under way while the
weight gradient is computed, and the weight gradient goes through the layer's `sink` (see gradients.py), which adds it
straight into a flat buffer, or keeps it for the W of a zero-bubble schedule. Without a sink a layer is an ordinary
torch module.

Activations are [N, D]: N tokens, sample after sample. With `sequence_parallel` a column layer takes and a row layer
returns this rank's N/tensor tokens. Layers made on a real device start with normal weights keyed by one draw from
torch's default generator, which must be seeded alike on the ranks of the axis; a run keys them by name instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from parallax.comm import (
    all_gather,
    all_reduce,
    all_reduce_start,
    reduce_scatter,
    reduce_scatter_start,
)
from parallax.errors import ConfigError
from parallax.gradients import GradSink, for_autograd
from parallax.mesh import Axis
from parallax.params import Init, Layout, even_cut, fill
from parallax.tensor.float8 import Quantize
from parallax.tensor.products import accumulate_weight_grad, input_grad, linear

__all__ = [
    "ColumnParallelLinear",
    "ParallelLinear",
    "Piece",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "initialize",
    "shown_to_others",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """One of several outputs fused in a column layer: its canonical name, its global size, and in how many
    shards it is cut (fewer than the axis has ranks where, as with key/value heads, several ranks hold the same)."""

    name: str
    size: int
    num_shards: int | None = None


def initialize(module: nn.Module, name: str = "") -> None:
    """Fill a stand-alone layer that is on a real device. Draws one key from torch's default generator."""
    if any(p.is_meta for p in module.parameters(recurse=False)):
        return
    key = int(torch.randint(2**62, ()))
    layouts: dict[str, Any] = module.layouts  # type: ignore[assignment]
    for parameter_name, parameter in module.named_parameters(recurse=False):
        pieces = layouts[parameter_name]
        start = 0
        for piece in pieces if isinstance(pieces, tuple) else (pieces,):
            rows = piece.rows
            fill(parameter.detach()[start : start + rows], piece, key, f"{piece.name or name}.{parameter_name}")
            start += rows
        parameter.data[start:].zero_()  # padded rows


def _weight_grad(layer: ParallelLinear, grad_NF: Tensor, x_ND: Tensor) -> Tensor | None:
    weight = layer.weight
    if not weight.requires_grad:
        return None
    if layer.sink is None:
        out = torch.zeros_like(weight)
        accumulate_weight_grad(grad_NF, x_ND, out, layer.narrow)
        return out
    layer.sink.add(weight, lambda out: accumulate_weight_grad(grad_NF, x_ND, out, layer.narrow))
    return None


def _bias_grad(sink: GradSink | None, bias: nn.Parameter | None, grad_NF: Tensor) -> Tensor | None:
    if bias is None or not bias.requires_grad:
        return None
    if sink is None:
        return grad_NF.sum(0)
    sink.add(bias, lambda out: add_into(out, grad_NF.sum(0)))
    return None


def shown_to_others(layer: nn.Module) -> bool:
    """Whether anyone but its caller may have what this layer returns: by a hook, or since the layer or its forward is a
    user's own in place of these.
    """
    if type(layer) not in (ColumnParallelLinear, RowParallelLinear) or "forward" in layer.__dict__:
        return True
    hooks = layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks) or bool(_has_any_global_hook())


def add_into(out: Tensor, grad: Tensor) -> None:
    out.add_(grad)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None, layer: ColumnParallelLinear
    ) -> Tensor:
        # Kept whole under sequence parallelism: gathering again in the backward would add a third to the traffic.
        x_ND = all_gather(x, layer.tensor) if layer.sequence_parallel else x
        ctx.layer = layer
        ctx.save_for_backward(x_ND)
        return linear(x_ND, layer.weight, layer.bias, layer.narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        layer: ColumnParallelLinear = ctx.layer
        (x_ND,) = ctx.saved_tensors
        partial = input_grad(grad, layer.weight, layer.narrow)
        start = reduce_scatter_start if layer.sequence_parallel else all_reduce_start
        pending = start(partial, layer.tensor)
        weight_grad = _weight_grad(layer, grad, x_ND)
        bias_grad = _bias_grad(layer.sink, layer.bias, grad)
        return pending.wait(), weight_grad, bias_grad, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None, layer: RowParallelLinear
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        if layer.tensor.group is None:
            return linear(x, layer.weight, layer.bias, layer.narrow)
        partial = linear(x, layer.weight, None, layer.narrow)
        reduce = reduce_scatter if layer.sequence_parallel else all_reduce
        y = reduce(partial, layer.tensor)
        return y if layer.bias is None else y.add_(layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        layer: RowParallelLinear = ctx.layer
        (x,) = ctx.saved_tensors
        bias_grad = _bias_grad(layer.sink, layer.bias, grad)
        grad_ND = all_gather(grad, layer.tensor) if layer.sequence_parallel else grad
        grad_x = input_grad(grad_ND, layer.weight, layer.narrow)
        return grad_x, _weight_grad(layer, grad_ND, x), bias_grad, None


class ParallelLinear(nn.Module):
    """What the two layers share. sink: where weight gradients go; narrow: the way into 8 bits
    (tensor/float8.py), where products are in 8 bits.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    narrow: Quantize | None = None

    def __init__(self, tensor: Axis, sequence_parallel: bool) -> None:
        super().__init__()
        self.tensor, self.sequence_parallel = tensor, sequence_parallel and tensor.size > 1
        self.sink: GradSink | None = None

    def _for_autograd(self, x: Tensor) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        return for_autograd(self.weight, self.sink, x), for_autograd(self.bias, self.sink, x)


class ColumnParallelLinear(ParallelLinear):
    """y = x A^T + b with the output features cut along tensor.

    x_ND -> y_Nf, f = F/tensor; with sequence_parallel x_nD -> y_Nf. weight [f, D], bias [f].
    Collectives a call: forward none, or an all-gather of N*D elements with sequence_parallel; backward an
    all-reduce, or a reduce-scatter, of N*D elements, under way while the weight gradient is computed.
    pieces: several outputs in one product (query, key and value), each cut on its own and each a canonical
    parameter of its own; out_features is then their sum. Raises ConfigError where a size does not divide.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensor: Axis,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        pieces: Sequence[Piece] = (),
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tensor, sequence_parallel)
        if pieces and sum(p.size for p in pieces) != out_features:
            raise ConfigError(f"the pieces sum to {sum(p.size for p in pieces)}, out_features is {out_features}")
        cuts = [_piece_layout(p, in_features, tensor, init_std) for p in pieces or [Piece("", out_features)]]
        rows = sum(weight.rows for weight, _ in cuts)
        self.layouts: dict[str, tuple[Layout, ...]] = {
            "weight": tuple(weight for weight, _ in cuts),
            "bias": tuple(bias for _, bias in cuts),
        }
        self.weight = nn.Parameter(torch.empty(rows, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype)) if bias else None
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., f]; with sequence_parallel [n, D] -> [N, f]."""
        if self.sequence_parallel or x.dim() == 2:
            return _Column.apply(x, *self._for_autograd(x), self)
        y = _Column.apply(x.reshape(-1, x.shape[-1]), *self._for_autograd(x), self)
        return y.view(*x.shape[:-1], -1)


def _piece_layout(piece: Piece, in_features: int, tensor: Axis, init_std: float) -> tuple[Layout, Layout]:
    """Where this rank's rows of one output lie, for the weight and for the bias."""
    shards = piece.num_shards or tensor.size
    if tensor.size % shards:
        raise ConfigError(f"{piece.name}: {shards} shards do not divide tensor={tensor.size}")
    replicas = tensor.size // shards
    rows = even_cut(piece.size, shards, tensor.rank // replicas, piece.name or "out_features")
    name = piece.name or None
    # A rank sees only its own query heads, so replicated key/value heads have partial gradients.
    sum_over = ("tensor",) if replicas > 1 else ()
    cut = {"tensor": 0} if tensor.size > 1 else {}
    owned = tensor.rank % replicas == 0
    weight = Layout(
        (piece.size, in_features),
        box=(rows, (0, in_features)),
        name=name,
        shards=cut,
        sum_over=sum_over,
        owned=owned,
        init=Init(std=init_std),
        replicas=replicas,
        hidden=True,
    )
    bias = replace(weight, global_shape=(piece.size,), box=(rows,), init=Init(), decay=False, hidden=False)
    return weight, bias


class RowParallelLinear(ParallelLinear):
    """y = x A^T + b with the input features cut along tensor: takes what a column layer returns.

    x_Nf -> y_ND, or y_nD with sequence_parallel. weight [D, f], bias [D] (added once, after the sum).
    Collectives a call: forward an all-reduce, or a reduce-scatter, of N*D elements; backward none, or an all-gather of
    N*D elements. With sequence_parallel the bias gradient is a partial sum. Raises ConfigError where
    tensor does not divide in_features.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tensor: Axis,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(tensor, sequence_parallel)
        columns = even_cut(in_features, tensor.size, tensor.rank, "in_features")
        self.layouts = {
            "weight": Layout(
                (out_features, in_features),
                box=((0, out_features), columns),
                shards={"tensor": 1} if tensor.size > 1 else {},
                init=Init(std=init_std),
                hidden=True,
            ),
            "bias": replicated(tensor, (out_features,), self.sequence_parallel),
        }
        local = columns[1] - columns[0]
        self.weight = nn.Parameter(torch.empty(out_features, local, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., f] -> [..., D]; with sequence_parallel [N, f] -> [n, D]."""
        if self.sequence_parallel or x.dim() == 2:
            return _Row.apply(x, *self._for_autograd(x), self)
        y = _Row.apply(x.reshape(-1, x.shape[-1]), *self._for_autograd(x), self)
        return y.view(*x.shape[:-1], -1)


def replicated(tensor: Axis, shape: tuple[int, ...], sequence_parallel: bool, mean: float = 0.0) -> Layout:
    """Layout of a small parameter that every tensor rank holds whole and weight decay leaves alone."""
    return Layout(
        shape,
        sum_over=("tensor",) if sequence_parallel else (),
        owned=tensor.rank == 0,
        init=Init(mean=mean),
        decay=False,
    )


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_N: Tensor, weight: nn.Parameter, layer: VocabParallelEmbedding) -> Tensor:
        start, stop = layer.vocab_range
        outside = None
        if layer.tensor.size > 1:
            outside = (ids_N < start) | (ids_N >= stop)
            ids_N = (ids_N - start).masked_fill_(outside, 0)
        ctx.layer = layer
        ctx.save_for_backward(ids_N, outside)
        x_ND = weight[ids_N]
        if outside is not None:
            x_ND.masked_fill_(outside.unsqueeze(-1), 0)
        return reduce_scatter(x_ND, layer.tensor) if layer.sequence_parallel else all_reduce(x_ND, layer.tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        layer: VocabParallelEmbedding = ctx.layer
        ids_N, outside = ctx.saved_tensors
        grad_ND = all_gather(grad, layer.tensor) if layer.sequence_parallel else grad
        if outside is not None:
            grad_ND = grad_ND.masked_fill(outside.unsqueeze(-1), 0)

        def accumulate(out_VD: Tensor) -> None:
            values = grad_ND.to(out_VD.dtype)
            # Both are deterministic: index_add_ in order on the CPU, index_put_ by sorting on CUDA.
            if out_VD.is_cuda:
                out_VD.index_put_((ids_N,), values, accumulate=True)
            else:
                out_VD.index_add_(0, ids_N, values)

        if layer.sink is not None:
            layer.sink.add(layer.weight, accumulate)
            return None, None, None
        weight_grad = torch.zeros_like(layer.weight)
        accumulate(weight_grad)
        return None, weight_grad, None


def vocab_range(vocab: int, tensor: Axis, multiple: int = 1) -> tuple[int, int, int]:
    """This rank's (start, stop) of the true vocabulary, and how many rows it stores, padding included.

    Every rank stores the same number, so that any vocabulary works at any tensor size.
    """
    rows = math.ceil(vocab / (tensor.size * multiple)) * multiple
    return min(tensor.rank * rows, vocab), min((tensor.rank + 1) * rows, vocab), rows


def vocab_layout(vocab: int, hidden: int, tensor: Axis, cut: tuple[int, int], init_std: float) -> Layout:
    """A [V, D] weight cut along the vocabulary; rows beyond V are no part of it and are never saved."""
    return Layout(
        (vocab, hidden),
        box=(cut, (0, hidden)),
        shards={"tensor": 0} if tensor.size > 1 else {},
        init=Init(std=init_std),
    )


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary cut along tensor.

    ids_N (int64) -> x_ND, or x_nD with sequence_parallel. weight [v, D], v = V/tensor rounded up to `multiple`.
    Collectives a call: forward an all-reduce, or a reduce-scatter, of N*D elements; backward none, or an all-gather.
    """

    def __init__(
        self,
        vocab: int,
        hidden: int,
        tensor: Axis,
        *,
        sequence_parallel: bool = False,
        multiple: int = 1,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.tensor, self.sequence_parallel = tensor, sequence_parallel and tensor.size > 1
        self.sink: GradSink | None = None
        start, stop, rows = vocab_range(vocab, tensor, multiple)
        self.vocab_range = (start, stop)
        self.layouts = {"weight": vocab_layout(vocab, hidden, tensor, (start, stop), init_std)}
        self.weight = nn.Parameter(torch.empty(rows, hidden, device=device, dtype=dtype))
        initialize(self)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int64 of any shape -> [..., D]; with sequence_parallel [N] -> [n, D]."""
        x = _Embedding.apply(ids.reshape(-1), self.weight, self)
        return x if self.sequence_parallel else x.view(*ids.shape, -1)
