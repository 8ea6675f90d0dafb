"""The conjugate pairs of tensor parallelism: what one does forward, the other does backward (arXiv:1909.08053,
fig. 3; arXiv:2205.05198, fig. 5).

| op | forward | backward |
|---|---|---|
| copy_to | identity | all-reduce |
| reduce_from | all-reduce | identity |
| gather_tokens | all-gather | reduce-scatter |
| scatter_tokens | reduce-scatter | all-gather |
| slice_tokens | keep own slice | all-gather |
| gather_features | all-gather of the last dim | keep own slice |

Tokens are dim 0: a microbatch of B samples of T tokens is [N, D] with N = B*T, sample after sample. A rank's slice of
the sequence is a contiguous slice of those N tokens, so gathering and scattering copy no transposes.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from parallax.comm import all_gather, all_reduce, reduce_scatter
from parallax.errors import ConfigError
from parallax.mesh import Axis

__all__ = [
    "copy_to",
    "gather_features",
    "gather_tokens",
    "reduce_from",
    "scatter_tokens",
    "slice_tokens",
    "token_range",
]


def token_range(num_tokens: int, tensor: Axis) -> tuple[int, int]:
    """This rank's (start, stop) of N tokens. Raises ConfigError where tensor does not divide N."""
    if num_tokens % tensor.size:
        raise ConfigError(
            f"sequence parallelism cuts {num_tokens} tokens (microbatch size x sequence length) into tensor="
            f"{tensor.size} equal slices, which does not divide; choose a sequence length that is a multiple"
        )
    step = num_tokens // tensor.size
    return tensor.rank * step, (tensor.rank + 1) * step


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.tensor), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        return all_reduce(x.clone(memory_format=torch.contiguous_format), tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return all_gather(x, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter(grad, ctx.tensor), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return reduce_scatter(x, tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.tensor), None


class _SliceTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        start, stop = token_range(x.shape[0], tensor)
        return x[start:stop].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather(grad, ctx.tensor), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor, ctx.width = tensor, x.shape[-1]
        parts = all_gather(x.reshape(1, -1, ctx.width), tensor)
        return rearrange(parts, "rank n f -> n (rank f)").view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(-1, ctx.tensor.rank * ctx.width, ctx.width), None


def copy_to(x_ND: Tensor, tensor: Axis) -> Tensor:
    """Enter a tensor-parallel region with a replicated activation: the f of Megatron-LM.

    Forward: nothing. Backward: all-reduce of N*D elements.
    x_ND: replicated on tensor. Returns: the same values.
    """
    return x_ND if tensor.group is None else _CopyTo.apply(x_ND, tensor)


def reduce_from(x_ND: Tensor, tensor: Axis) -> Tensor:
    """Sum partial activations over tensor: the g of Megatron-LM.

    Forward: all-reduce of N*D elements. Backward: nothing.
    x_ND: partial sums, same shape on every tensor rank. Returns: the sum, replicated on tensor.
    """
    return x_ND if tensor.group is None else _ReduceFrom.apply(x_ND, tensor)


def gather_tokens(x_nD: Tensor, tensor: Axis) -> Tensor:
    """Leave sequence parallelism before a tensor-parallel region.

    Forward: all-gather of N*D elements. Backward: reduce-scatter of N*D elements (gradients are partial sums).
    x_nD: this rank's tokens. Returns: x_ND, all tokens.
    """
    return x_nD if tensor.group is None else _GatherTokens.apply(x_nD, tensor)


def scatter_tokens(x_ND: Tensor, tensor: Axis) -> Tensor:
    """Sum partial activations over tensor and keep this rank's tokens.

    Forward: reduce-scatter of N*D elements. Backward: all-gather of N*D elements.
    x_ND: partial sums. Returns: x_nD, the sum for this rank's tokens.
    """
    return x_ND if tensor.group is None else _ScatterTokens.apply(x_ND, tensor)


def slice_tokens(x_ND: Tensor, tensor: Axis) -> Tensor:
    """Enter sequence parallelism with a replicated activation: keep this rank's tokens.

    Forward: nothing. Backward: all-gather of N*D elements.
    x_ND: replicated on tensor. Returns: x_nD.
    """
    return x_ND if tensor.group is None else _SliceTokens.apply(x_ND, tensor)


def gather_features(x_Nf: Tensor, tensor: Axis) -> Tensor:
    """Make the output of a column-parallel layer whole on every rank.

    Forward: all-gather of N*F elements. Backward: nothing; the gradient must be the same on every rank.
    x_Nf: [..., f], this rank's features. Returns: [..., F].
    """
    return x_Nf if tensor.group is None else _GatherFeatures.apply(x_Nf, tensor)
