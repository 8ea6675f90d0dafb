"""Cross entropy over a vocabulary that is cut along tensor; the logits are never gathered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallax.comm import all_gather
from parallax.mesh import Axis

__all__ = ["CrossEntropy", "WholeCrossEntropy", "cross_entropy_of", "vocab_parallel_cross_entropy"]

CHUNK_ELEMENTS = 1 << 20
"""Logits worked on at once on a CPU: the temporaries of one chunk, not of [N, V], are what the loss needs beside its
result, and they stay in its cache.
"""
WIDENED = 1 << 24
"""Logits that a GPU has in float32 at once, on their way to the softmax."""


def vocab_parallel_cross_entropy(
    logits_Nv: Tensor,
    targets_N: Tensor,
    tensor: Axis,
    *,
    vocab_range: tuple[int, int],
    ignore_index: int = -100,
    overwrite: bool = False,
    scale: float | Tensor = 1.0,
) -> Tensor:
    """scale times the sum of -log softmax(logits)[target] over the tokens that are not ignored: a float64 scalar.

    logits_Nv: this rank's columns, for the vocabulary [start, stop) of vocab_range; columns beyond stop - start are
    padding and take no part. targets_N: int64, global ids. A sum, not a mean: the caller divides by the global token
    count through scale (a number, or a scalar where the logits are), by which the gradient is multiplied before it is
    rounded to the dtype of the logits. The gradient is taken in the forward; with `overwrite` it replaces the logits in
    their own memory (then nothing else may need them), otherwise it takes one more copy of [N, v].
    Collectives: one all-gather of 3N numbers (each rank's maximum, sum of exponentials at that maximum, target logit).
    Source: arXiv:1909.08053, section 3, with the maximum and both sums in one message.
    """
    return _CrossEntropy.apply(logits_Nv, targets_N, tensor, vocab_range, ignore_index, overwrite, scale)


def cross_entropy_of(logits: Tensor, *args: Any) -> CrossEntropy:
    """The one that suits the device: `CrossEntropy(logits, *args)` takes the same."""
    return (WholeCrossEntropy if logits.is_cuda else CrossEntropy)(logits, *args)


class CrossEntropy:
    """The loss of [N, v] logits, and what its gradient takes, in chunks of tokens: see `vocab_parallel_cross_entropy`.

    out: [N, v], where the gradient will go, which may be the logits themselves; None where there will be none. Until
    then it holds the exponentials, if it is wide enough for them: they are not taken twice.
    """

    def __init__(
        self,
        logits: Tensor,
        targets_N: Tensor,
        tensor: Axis,
        vocab_range: tuple[int, int],
        ignore_index: int,
        scale: float | Tensor = 1.0,
        out: Tensor | None = None,
    ) -> None:
        start, stop = vocab_range
        self.logits, self.size, self.out = logits, stop - start, out
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.exponentials = out if out is not None and out.dtype == wide else None
        self.valid = targets_N != ignore_index
        local = targets_N - start
        self.mine = self.valid & (local >= 0) & (local < stop - start)
        self.local = local.masked_fill(~self.mine, 0)
        self.chunks = _chunks(logits.shape[0], logits.shape[1], CHUNK_ELEMENTS)
        own_3N = self._own_statistics(wide)
        every = all_gather(own_3N[None], tensor)  # [tensor, 3, N]
        maximum_N = every[:, 0].amax(0)
        sum_N = (every[:, 1] * (every[:, 0] - maximum_N).exp_()).sum(0)
        self.factor_N = self.valid.to(wide).mul_(scale)
        self.to_softmax_N = (own_3N[0] - maximum_N).exp_().div_(sum_N)
        self.normaliser_N = maximum_N + sum_N.log_()
        self.loss = (self.normaliser_N - every[:, 2].sum(0)).masked_fill_(~self.valid, 0).double().sum() * scale

    def _own_statistics(self, wide: torch.dtype) -> Tensor:
        """Of each token, over this rank's columns: maximum, sum of exp(logit - maximum), the target's logit or 0."""
        own = torch.zeros(3, self.logits.shape[0], dtype=wide, device=self.logits.device)
        own[0] = -torch.inf
        if not self.size:
            return own
        for rows in self.chunks:
            chunk = self.logits[rows, : self.size].to(wide)
            maximum = chunk.amax(-1)
            own[0, rows] = maximum
            own[2, rows] = chunk.gather(-1, self.local[rows, None]).squeeze(-1)
            place = None if self.exponentials is None else self.exponentials[rows, : self.size]
            own[1, rows] = torch.sub(chunk, maximum[:, None], out=place).exp_().sum(-1)
        own[2].masked_fill_(~self.mine, 0)
        return own

    def gradient(self) -> Tensor:
        """The loss' gradient by the logits, in `out`: factor (softmax - one-hot), zero for ignored tokens and padded
        columns. Once.
        """
        assert self.out is not None, "nobody has said where the gradient goes"
        for rows in self.chunks:
            place, factor_n = self.out[rows, : self.size], self.factor_N[rows]
            if self.exponentials is not None:
                chunk = place.mul_((self.to_softmax_N[rows] * factor_n)[:, None])
            else:
                wide = self.logits[rows, : self.size].to(factor_n.dtype)
                chunk = torch.sub(wide, self.normaliser_N[rows, None]).exp_().mul_(factor_n[:, None])
            if self.size:
                chunk.scatter_add_(-1, self.local[rows, None], (factor_n * self.mine[rows]).neg_()[:, None])
            if chunk is not place:
                place.copy_(chunk)
            self.out[rows, self.size :] = 0
        return self.out


class WholeCrossEntropy(CrossEntropy):
    """The same for a GPU, where every operation is a kernel to be launched and every pass one over its memory: all
    tokens at once, their probabilities by torch's own softmax and kept for the gradient.

    Beside the logits it takes 4 bytes for each (8 in float64); in bfloat16 it moves some 22 bytes a logit, forward and
    backward, where the passes of the chunks come to 58.
    """

    def _own_statistics(self, wide: torch.dtype) -> Tensor:
        own = torch.zeros(3, self.logits.shape[0], dtype=wide, device=self.logits.device)
        if not self.size:
            own[0] = -torch.inf
            return own
        logits = self.logits[:, : self.size]
        maximum_N, at_N = logits.max(-1)
        self.probabilities = torch.empty(logits.shape, dtype=wide, device=logits.device)
        for rows in _chunks(logits.shape[0], self.size, WIDENED):  # all but float16 is widened first, a copy
            torch.softmax(logits[rows], -1, dtype=wide, out=self.probabilities[rows])
        own[0] = maximum_N
        own[1] = self.probabilities.gather(-1, at_N[:, None]).squeeze(-1).reciprocal_()  # there it is 1 over the sum
        own[2] = logits.gather(-1, self.local[:, None]).squeeze(-1)
        own[2].masked_fill_(~self.mine, 0)
        self.sum_N = own[1]
        return own

    def gradient(self) -> Tensor:
        assert self.out is not None, "nobody has said where the gradient goes"
        if self.size:
            place, at = self.out[:, : self.size], self.local[:, None]
            share_N1 = (self.to_softmax_N * self.sum_N * self.factor_N)[:, None]
            target_N1 = self.probabilities.gather(-1, at) * share_N1 - (self.factor_N * self.mine)[:, None]
            torch.mul(self.probabilities, share_N1, out=place)
            place.scatter_(-1, at, target_N1.to(place.dtype))  # not added to what is rounded already
        self.out[:, self.size :] = 0
        return self.out


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
        scale: float | Tensor,
    ) -> Tensor:
        out = logits if overwrite else torch.empty_like(logits)
        found = cross_entropy_of(logits, targets_N, tensor, vocab_range, ignore_index, scale, out)
        ctx.save_for_backward(found.gradient())
        return found.loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad.mul_(grad_output.to(grad.dtype)), None, None, None, None, None, None)


def _chunks(num_tokens: int, width: int, at_once: int) -> list[slice]:
    step = max(1, at_once // max(1, width))
    return [slice(at, min(at + step, num_tokens)) for at in range(0, num_tokens, step)]
