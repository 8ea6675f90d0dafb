"""The output layer and its cross entropy in one, a few tokens at a time: the logits [N, V] are never there."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from parallax.comm import all_gather, all_reduce_start, reduce_scatter_start
from parallax.gradients import GradSink
from parallax.mesh import Axis
from parallax.models.costs import LOGITS_ON_A_GPU
from parallax.tensor.loss import cross_entropy_of
from parallax.tensor.products import accumulate_weight_grad, input_grad, linear

__all__ = ["OutputLayer", "linear_cross_entropy"]

LOGITS_AT_ONCE = 1 << 22
"""On a CPU; of a GPU models/costs.py knows, since they are to be planned for there."""


class OutputLayer(Protocol):
    """What a column-parallel layer without bias has."""

    weight: nn.Parameter
    tensor: Axis
    sequence_parallel: bool
    sink: GradSink | None


def linear_cross_entropy(
    x: Tensor,
    layer: OutputLayer,
    targets_N: Tensor,
    *,
    vocab_range: tuple[int, int],
    ignore_index: int = -100,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """`vocab_parallel_cross_entropy(layer(x), ...)` without the logits: a float64 scalar.

    x_ND, or x_nD with the layer's sequence parallelism. Logits, their gradient, and from it both the input's and the
    weight's are made in the forward, for some 4 million logits at once (on a GPU 64 million); from there to the
    backward it holds [N, D] and [v, D] in place of [N, v]. Flops: those of the two apart.
    Collectives: those of the layer, and one all-gather of 3 numbers a token over tensor, chunk by chunk.
    """
    return _LinearCrossEntropy.apply(
        x, layer.weight, layer, targets_N, vocab_range, ignore_index, scale, torch.is_grad_enabled()
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        layer: OutputLayer,
        targets_N: Tensor,
        vocab_range: tuple[int, int],
        ignore_index: int,
        scale: float | Tensor,
        trains: bool,
    ) -> Tensor:
        x_ND = all_gather(x, layer.tensor) if layer.sequence_parallel else x
        loss = torch.zeros((), dtype=torch.float64, device=x.device)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        grad_x = torch.empty_like(x_ND) if trains else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=x.device) if trains else None
        step = max(1, (LOGITS_ON_A_GPU if x.is_cuda else LOGITS_AT_ONCE) // max(1, weight.shape[0]))
        options = (layer.tensor, vocab_range, ignore_index, scale)
        for at in range(0, x_ND.shape[0], step):
            rows = slice(at, at + step)
            part, grad = _of_a_chunk(x_ND[rows], weight, targets_N[rows], options, grad_weight)
            loss += part
            if grad_x is not None and grad is not None:
                grad_x[rows] = grad
        ctx.layer = layer
        ctx.save_for_backward(grad_x, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: OutputLayer = ctx.layer
        grad_x, grad_weight = ctx.saved_tensors
        start = reduce_scatter_start if layer.sequence_parallel else all_reduce_start
        pending = start(grad_x.mul_(grad.to(grad_x.dtype)), layer.tensor)
        weight, returned = layer.weight, None
        if weight.requires_grad and layer.sink is None:
            returned = grad_weight.mul_(grad).to(weight.dtype)
        elif weight.requires_grad and layer.sink is not None:
            layer.sink.add(weight, lambda out: _add(out, grad_weight, grad))
        return pending.wait(), returned, None, None, None, None, None, None


def _of_a_chunk(
    x_nD: Tensor, weight: Tensor, targets_n: Tensor, options: tuple[Any, ...], grad_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The loss of some tokens and its gradient by x; the weight's is added. The logits go with the call."""
    logits = linear(x_nD, weight, None)
    found = cross_entropy_of(logits, targets_n, *options, None if grad_weight is None else logits)
    if grad_weight is None:
        return found.loss, None
    grad = found.gradient()
    accumulate_weight_grad(grad, x_nD, grad_weight)
    return found.loss, input_grad(grad, weight)


def _add(out: Tensor, grad: Tensor, factor: Tensor) -> None:
    out.addcmul_(grad.to(out.dtype), factor.to(out.dtype))
