"""Cross entropy over a vocabulary that is cut along tensor; the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallax.comm import all_gather
from parallax.mesh import Axis

__all__ = ["CrossEntropy", "vocab_parallel_cross_entropy"]

CHUNK_ELEMENTS = 1 << 20
"""Logits worked on at once: the temporaries of one chunk, not of [N, V], are what the loss needs beside its result."""


def vocab_parallel_cross_entropy(
    logits_Nv: Tensor,
    targets_N: Tensor,
    tensor: Axis,
    *,
    vocab_range: tuple[int, int],
    ignore_index: int = -100,
    overwrite: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """scale times the sum of -log softmax(logits)[target] over the tokens that are not ignored: a float64 scalar.

    logits_Nv: this rank's columns, for the vocabulary [start, stop) of vocab_range; columns beyond stop - start are
    padding and take no part. targets_N: int64, global ids. A sum, not a mean: the caller divides by the global token
    count through scale, by which the gradient is multiplied before it is rounded to the dtype of the logits. The
    gradient is taken in the forward, in chunks of tokens; with `overwrite` it replaces the logits in their own memory
    (then nothing else may need them), otherwise it takes one more copy of [N, v].
    Collectives: one all-gather of 3N numbers (each rank's maximum, sum of exponentials at that maximum, target logit).
    Source: arXiv:1909.08053, section 3, with the maximum and both sums in one message.
    """
    return _CrossEntropy.apply(logits_Nv, targets_N, tensor, vocab_range, ignore_index, overwrite, scale)


class CrossEntropy:
    """The loss of [N, v] logits, and what its gradient takes: see `vocab_parallel_cross_entropy`."""

    def __init__(
        self,
        logits: Tensor,
        targets_N: Tensor,
        tensor: Axis,
        vocab_range: tuple[int, int],
        ignore_index: int,
        scale: float = 1.0,
    ) -> None:
        start, stop = vocab_range
        self.logits, self.size = logits, stop - start
        self.valid = targets_N != ignore_index
        local = targets_N - start
        self.mine = self.valid & (local >= 0) & (local < stop - start)
        self.local = local.masked_fill(~self.mine, 0)
        self.chunks = _chunks(*logits.shape)
        maximum_N, log_sum_N, target_N = _statistics(logits, self.local, self.mine, tensor, self.size, self.chunks)
        self.normaliser_N = maximum_N + log_sum_N
        self.factor_N = self.valid.to(self.normaliser_N.dtype).mul_(scale)
        self.loss = (self.normaliser_N - target_N).masked_fill_(~self.valid, 0).double().sum() * scale

    def gradient(self, out: Tensor) -> Tensor:
        """The loss' gradient by the logits, written to `out`, which may be the logits themselves."""
        for rows in self.chunks:
            _gradient(self.logits, out, rows, self.normaliser_N, self.local, self.mine, self.factor_N, self.size)
        return out


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets_N: Tensor,
        tensor: Axis,
        vocab_range: tuple[int, int],
        ignore_index: int,
        overwrite: bool,
        scale: float,
    ) -> Tensor:
        found = CrossEntropy(logits, targets_N, tensor, vocab_range, ignore_index, scale)
        ctx.save_for_backward(found.gradient(logits if overwrite else torch.empty_like(logits)))
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad.mul_(grad_output.to(grad.dtype)), None, None, None, None, None, None)


def _chunks(num_tokens: int, width: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    return [slice(at, min(at + step, num_tokens)) for at in range(0, num_tokens, step)]


def _statistics(
    logits: Tensor, local: Tensor, mine: Tensor, tensor: Axis, size: int, chunks: list[slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """Per token, over the whole vocabulary: the maximum, log of the sum of exp(logit - maximum), the target's logit."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    own = torch.zeros(3, logits.shape[0], dtype=dtype, device=logits.device)
    own[0] = -torch.inf
    if size:
        for rows in chunks:
            chunk = logits[rows, :size].to(dtype)
            maximum = chunk.amax(-1)
            own[0, rows] = maximum
            own[2, rows] = chunk.gather(-1, local[rows, None]).squeeze(-1)
            own[1, rows] = (chunk - maximum[:, None]).exp_().sum(-1)
        own[2].masked_fill_(~mine, 0)
    every = all_gather(own[None], tensor)  # [tensor, 3, N]
    maximum = every[:, 0].amax(0)
    total = (every[:, 1] * (every[:, 0] - maximum).exp_()).sum(0)
    return maximum, total.log_(), every[:, 2].sum(0)


def _gradient(
    logits: Tensor,
    grad: Tensor,
    rows: slice,
    normaliser_N: Tensor,
    local: Tensor,
    mine: Tensor,
    factor_N: Tensor,
    size: int,
) -> None:
    """grad[rows] = factor * (softmax - one-hot), zero for ignored tokens and padded columns. grad may be the logits."""
    wide = logits[rows, :size].to(normaliser_N.dtype)
    chunk = torch.sub(wide, normaliser_N[rows, None]).exp_()
    if size:
        chunk.scatter_add_(-1, local[rows, None], -mine[rows, None].to(chunk.dtype))
    chunk.mul_(factor_N[rows, None])
    grad[rows, :size] = chunk
    grad[rows, size:] = 0
