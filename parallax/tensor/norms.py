"""LayerNorm and RMSNorm that know how their parameters lie on the tensor axis, and keyed dropout.

Under sequence parallelism each rank normalises its own tokens, so the gradients of weight and bias are partial sums:
their layout says so, and the data axis sums them over tensor once a step. Left out, replicas of the weights drift
apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parallax.compiled import pick
from parallax.gradients import GradSink, for_autograd
from parallax.mesh import Axis
from parallax.rng import keep_mask, kept, mask_seeds, threshold
from parallax.tensor.layers import add_into, initialize, replicated

__all__ = ["LayerNorm", "RMSNorm", "keyed_dropout", "wide_of"]


def _send(sink: GradSink | None, parameter: nn.Parameter | None, compute: Any) -> Tensor | None:
    """Route one gradient: to autograd without a sink, else into the sink. compute() returns it."""
    if parameter is None or not parameter.requires_grad:
        return None
    if sink is None:
        return compute().to(parameter.dtype)
    sink.add(parameter, lambda out: add_into(out, compute()))
    return None


def _rms_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = wide_of(x)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
    return (wide * rstd).to(x.dtype).mul_(weight), rstd


def _rms_backward(grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    normal, wide = wide_of(x) * rstd, wide_of(grad)
    scaled = wide * weight
    along = (scaled * normal).mean(-1, keepdim=True)
    return scaled.sub_(normal * along).mul_(rstd).to(x.dtype)


def _rms_weight_grad(grad: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    return (wide_of(grad) * (wide_of(x) * rstd)).reshape(-1, x.shape[-1]).sum(0)


def _has_kernel(x: Tensor, layer: RMSNorm) -> bool:
    """Whether torch has the norm as one kernel: on a GPU, where written out it moves ten times the memory. The kernel
    rounds the weight's gradient to its dtype before it is added up in float32, as those of all other layers are.
    """
    known = x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward")
    return known and not layer.compiled and x.dtype == layer.weight.dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter | None, layer: RMSNorm) -> Tensor:
        if _has_kernel(x, layer):
            y, rstd = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], layer.weight, layer.eps)
        else:
            y, rstd = pick(_rms_forward, layer.compiled)(x, layer.weight, layer.eps)
        ctx.layer = layer
        ctx.save_for_backward(x, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        layer: RMSNorm = ctx.layer
        x, rstd = ctx.saved_tensors
        if _has_kernel(x, layer):  # both gradients in one pass, in a split backward too
            options = (rstd, layer.weight, [True, layer.weight.requires_grad])
            grad_x, found = torch.ops.aten._fused_rms_norm_backward(grad.contiguous(), x, x.shape[-1:], *options)
            return grad_x, _send(layer.sink, layer.weight, lambda: found), None
        grad_x = pick(_rms_backward, layer.compiled)(grad, x, rstd, layer.weight)
        weigh = pick(_rms_weight_grad, layer.compiled)
        return grad_x, _send(layer.sink, layer.weight, lambda: weigh(grad, x, rstd)), None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None, layer: LayerNorm
    ) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], layer.weight, layer.bias, layer.eps)
        ctx.layer = layer
        ctx.save_for_backward(x, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        layer: LayerNorm = ctx.layer
        x, mean, rstd = ctx.saved_tensors
        weight, bias = layer.weight, layer.bias
        # One pass for all three: in a split backward too, whose second half would have to read everything again.
        mask = [True, weight.requires_grad, bias is not None and bias.requires_grad]
        grad_x, weight_grad, bias_grad = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x, x.shape[-1:], mean, rstd, weight, bias, mask
        )
        sent_weight = _send(layer.sink, weight, lambda: weight_grad)
        return grad_x, sent_weight, _send(layer.sink, bias, lambda: bias_grad), None


def wide_of(x: Tensor) -> Tensor:
    """At least float32: what lies between the inputs and the result is not computed in bfloat16."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last dim (arXiv:1910.07467). [..., D] -> [..., D]; weight [D], replicated
    on tensor.

    Collectives: none; with sequence_parallel the weight gradient is a partial sum over tensor. compiled: its arithmetic
    goes through torch.compile.
    """

    compiled = False

    def __init__(
        self,
        hidden: int,
        tensor: Axis,
        *,
        sequence_parallel: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.sink: GradSink | None = None
        self.layouts = {"weight": replicated(tensor, (hidden,), sequence_parallel, mean=1.0)}
        self.weight = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x.contiguous(), for_autograd(self.weight, self.sink, x), self)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last dim. [..., D] -> [..., D]; weight and bias [D], replicated on
    tensor.

    Collectives: none; with sequence_parallel the gradients of weight and bias are partial sums over tensor.
    """

    def __init__(
        self,
        hidden: int,
        tensor: Axis,
        *,
        bias: bool = True,
        sequence_parallel: bool = False,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.sink: GradSink | None = None
        self.layouts = {
            "weight": replicated(tensor, (hidden,), sequence_parallel, mean=1.0),
            "bias": replicated(tensor, (hidden,), sequence_parallel),
        }
        self.weight = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(hidden, device=device, dtype=dtype)) if bias else None
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        known = (for_autograd(parameter, self.sink, x) for parameter in (self.weight, self.bias))
        return _LayerNorm.apply(x.contiguous(), *known, self)


def _dropped(x: Tensor, seeds: Tensor, columns: Tensor, least: int, share: float) -> Tensor:
    return x * kept(seeds, columns, least).to(x.dtype).div_(share)


def keyed_dropout(x: Tensor, rows: Tensor, key: int, drop: float, compiled: bool = False) -> Tensor:
    """Dropout whose mask depends on (key, global row, column) alone.

    x: [..., C]; rows: int64 [...], the global position of each row; key: from (seed, step, layer). compiled: through
    torch.compile, which makes one kernel of some twenty: the same mask.
    """
    if drop == 0.0:
        return x
    if compiled or x.is_cuda:  # all at once
        seeds, columns = mask_seeds(rows, x.shape[-1], key)
        return pick(_dropped, compiled)(x, seeds.view(*rows.shape, 1), columns, threshold(drop), 1.0 - drop)
    return x * keep_mask(rows, x.shape[-1], key, drop).to(x.dtype).div_(1.0 - drop)
