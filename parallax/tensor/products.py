"""The three products of a linear layer, in the layer's own precision."""

from __future__ import annotations

from torch import Tensor, nn

from parallax.tensor import float8

__all__ = ["accumulate_weight_grad", "input_grad", "linear"]


def linear(x_ND: Tensor, weight: Tensor, bias: Tensor | None, eight_bits: bool) -> Tensor:
    """x W^T + b."""
    if not eight_bits:
        return nn.functional.linear(x_ND, weight, bias)
    y = float8.linear(x_ND, weight)
    return y if bias is None else y.add_(bias)


def input_grad(grad_NF: Tensor, weight: Tensor, eight_bits: bool) -> Tensor:
    """g W."""
    return float8.input_grad(grad_NF, weight) if eight_bits else grad_NF @ weight


def accumulate_weight_grad(grad_NF: Tensor, x_ND: Tensor, out_FD: Tensor, eight_bits: bool) -> None:
    """out += g^T x, in the buffer itself where the dtypes allow."""
    if eight_bits:
        float8.accumulate_weight_grad(grad_NF, x_ND, out_FD)
    elif out_FD.dtype == grad_NF.dtype:
        out_FD.addmm_(grad_NF.t(), x_ND)
    else:
        out_FD.add_(grad_NF.t() @ x_ND)
