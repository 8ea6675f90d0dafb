"""The three products of a linear layer, in the layer's own precision, by the faster library.

Note: float32 on a CPU. torch gives float32 products to MKL, which on processors that are not Intel's keeps to AVX2: 105
to 115 GFLOP/s a core of an AMD EPYC (Zen 5), where oneDNN, which torch has too, comes to 210 to 255 with AVX-512. So
there they go to oneDNN, through the operator that torch's compiler uses. Which one follows from the processor and the
dtype alone: ranks of one kind of machine do the same, today and after a restart. bfloat16 goes to oneDNN everywhere.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from parallax.processor import processor
from parallax.tensor import float8

__all__ = ["accumulate_weight_grad", "input_grad", "linear", "product"]


def linear(x_ND: Tensor, weight: Tensor, bias: Tensor | None, eight_bits: bool = False) -> Tensor:
    """x W^T + b."""
    if not eight_bits:
        return _times_transposed(x_ND, weight, bias)
    y = float8.linear(x_ND, weight)
    return y if bias is None else y.add_(bias)


def input_grad(grad_NF: Tensor, weight: Tensor, eight_bits: bool = False) -> Tensor:
    """g W."""
    return float8.input_grad(grad_NF, weight) if eight_bits else product(grad_NF, weight)


def accumulate_weight_grad(grad_NF: Tensor, x_ND: Tensor, out_FD: Tensor, eight_bits: bool = False) -> None:
    """out += g^T x, in the buffer itself where the dtypes and the library allow."""
    if eight_bits:
        float8.accumulate_weight_grad(grad_NF, x_ND, out_FD)
    elif out_FD.dtype != grad_NF.dtype or suits_onednn(grad_NF):
        out_FD.add_(product(grad_NF.t(), x_ND))
    else:
        out_FD.addmm_(grad_NF.t(), x_ND)


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b, of two matrices."""
    return _times_transposed(a_MK, b_KN.t(), None) if suits_onednn(a_MK) else a_MK @ b_KN


def _times_transposed(a_MK: Tensor, b_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if suits_onednn(a_MK):
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_NK, bias_N, "none", [], "")
    return nn.functional.linear(a_MK, b_NK, bias_N)


def suits_onednn(x: Tensor) -> bool:
    """Whether products of this tensor go to oneDNN by the operator; an empty one has nothing to multiply."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and onednn_is_faster() and x.numel() > 0


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has the operator."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    return processor().vendor == "AuthenticAMD" and hasattr(torch.ops.mkldnn, "_linear_pointwise")
