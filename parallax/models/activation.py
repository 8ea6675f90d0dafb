"""The activations of the MLP: GELU by its tanh formula, and SwiGLU. Either keeps one tensor of its input's size.

On a CPU torch's GELU computes the tanh itself, at ten times the time of a sigmoid, and again in the backward: 1.32 ms
forward and backward of 512 x 1024 float32 on one core of an AMD EPYC (Zen 5). By 0.5 x (1 + tanh(u)) = x sigmoid(2 u),
where u = c (x + a x^3), with the derivative made in the forward and kept in place of the input, it is 0.60 ms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallax.compiled import pick
from parallax.tensor.norms import wide_of

__all__ = ["gelu", "swiglu"]

TWO_C = 2 * math.sqrt(2 / math.pi)
A = 0.044715
CHUNK = 1 << 17
"""Elements worked on at once: what is made on the way stays in the cache."""


def gelu(x: Tensor, compiled: bool = False, overwrite: bool = False) -> Tensor:
    """gelu(x, approximate="tanh") (arXiv:1606.08415, section 2), of any shape. In bfloat16 computed in float32.

    overwrite: nobody else has or needs x, and on a CPU the result may take its memory: it is in the cache, where memory
    that is asked for is not.
    """
    if not x.is_cpu and not compiled:
        return F.gelu(x, approximate="tanh")
    return _Gelu.apply(x, compiled, overwrite)


def swiglu(x: Tensor, compiled: bool = False) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202) of x = [..., gate and up side by side]: half as wide. Keeps x alone."""
    return _SwiGLU.apply(x, compiled)


def _gelu_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(x) and its derivative, both of x's dtype."""
    y, slope = _by_sigmoid(wide_of(x), _two_c(x))
    return y.to(x.dtype), slope.to(x.dtype)


def _two_c(x: Tensor) -> Tensor:
    return torch.full((), TWO_C, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _by_sigmoid(
    x: Tensor, two_c: Tensor, y: Tensor | None = None, slope: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """gelu(x) and its derivative, in the memory of `y`, which may be x, and `slope` where these are given."""
    s = torch.addcmul(two_c, x, x, value=TWO_C * A).mul_(x).sigmoid_()
    slope = torch.addcmul(two_c, x, x, value=TWO_C * A * 3, out=slope)
    y = torch.mul(s, x, out=y)
    rest = torch.addcmul(y, y, s, value=-1)  # x s (1 - s), which the derivative of 2u comes to
    return y, torch.addcmul(s, rest, slope, out=slope)


def _in_chunks(x: Tensor, overwrite: bool) -> tuple[Tensor, Tensor]:
    """As `_gelu_and_slope`, a part after the other."""
    y, slope, two_c = x if overwrite else torch.empty_like(x), torch.empty_like(x), _two_c(x)
    for start in range(0, x.numel(), CHUNK):
        size = (min(CHUNK, x.numel() - start),)
        parts = [each.as_strided(size, (1,), each.storage_offset() + start) for each in (x, y, slope)]
        if two_c.dtype == x.dtype:
            _by_sigmoid(parts[0], two_c, *parts[1:])
        else:
            for part, made in zip(parts[1:], _by_sigmoid(wide_of(parts[0]), two_c), strict=True):
                part.copy_(made)
    return y, slope


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compiled: bool, overwrite: bool) -> Tensor:
        y, slope = pick(_gelu_and_slope, True)(x) if compiled else _in_chunks(x.contiguous(), overwrite)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def _swiglu_forward(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_backward(x: Tensor, grad: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return torch.cat([grad_gate, grad * F.silu(gate)], dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compiled: bool) -> Tensor:
        ctx.compiled = compiled
        ctx.save_for_backward(x)
        return pick(_swiglu_forward, compiled)(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return pick(_swiglu_backward, ctx.compiled)(x, grad), None
