"""Products of a linear layer in 8-bit floating point: e4m3 forward, e5m2 for gradients (arXiv:2209.05433), scaled by
the largest number of each tensor as it is now ("dynamic scaling")."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from parallax.errors import ConfigError

__all__ = ["Quantize", "accumulate_weight_grad", "input_grad", "linear", "quantize", "require_float8"]

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
CAPABILITY = (8, 9)
TINY = 1e-30

Quantize = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""`quantize`, or what a compiler makes of it: a pass for the largest number and one for the rest, in place of six."""


def require_float8(device: torch.device) -> None:
    """Raise ConfigError unless the device multiplies 8-bit floats: NVIDIA Ada, Hopper or later."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    raise ConfigError(
        f"dtype=float8 needs a GPU of compute capability 8.9 or later (H100, L40S), and {name} has no such products; "
        "set dtype=bfloat16"
    )


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(x in 8 bits, what to multiply it by): the largest number of x becomes the largest that dtype has."""
    most = torch.finfo(dtype).max
    scale = most / torch.linalg.vector_norm(x, math.inf).float().clamp(min=TINY)
    return (x.float() * scale).clamp_(-most, most).to(dtype), scale.reciprocal()


def multiply(a: Tensor, b: Tensor, a_dtype: torch.dtype, b_dtype: torch.dtype, narrow: Quantize) -> Tensor:
    """a b^T for a [M, K] and b [N, K], in bfloat16 or float32 as a is; M, N and K multiples of 16."""
    (a8, a_scale), (b8, b_scale) = narrow(a.contiguous(), a_dtype), narrow(b.contiguous(), b_dtype)
    out = torch.float32 if a.dtype == torch.float32 else torch.bfloat16
    # The name in torch.nn.functional came after torch 2.11.
    return torch._scaled_mm(a8, b8.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out)


def linear(x_ND: Tensor, weight_FD: Tensor, narrow: Quantize) -> Tensor:
    """x W^T."""
    return multiply(x_ND, weight_FD, FORWARD, FORWARD, narrow)


def input_grad(grad_NF: Tensor, weight_FD: Tensor, narrow: Quantize) -> Tensor:
    """g W."""
    return multiply(grad_NF, weight_FD.t(), BACKWARD, FORWARD, narrow)


def accumulate_weight_grad(grad_NF: Tensor, x_ND: Tensor, out_FD: Tensor, narrow: Quantize) -> None:
    """out += g^T x."""
    out_FD.add_(multiply(grad_NF.t(), x_ND.t(), BACKWARD, FORWARD, narrow))
