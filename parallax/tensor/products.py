"""The products of a linear layer, in the layer's own precision, by the faster library.

Note: float32 on a CPU. torch gives float32 products to MKL, which on processors that are not Intel's keeps to AVX2: 80
to 115 GFLOP/s a core of an AMD EPYC (Zen 5), where oneDNN, which torch has too, comes to 130 to 258 with AVX-512. So
there they go to oneDNN. Which one follows from the processor and the dtype alone: ranks of one kind of machine do the
same, today and after a restart. bfloat16 goes to oneDNN everywhere.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from parallax.processor import processor
from parallax.tensor import float8

__all__ = [
    "accumulate_weight_grad",
    "by_faster_library",
    "input_grad",
    "linear",
    "product",
    "suits_onednn",
]

MKLDNN: Any = torch.backends.mkldnn  # what it has is not declared


def linear(x_ND: Tensor, weight: Tensor, bias: Tensor | None, narrow: float8.Quantize | None = None) -> Tensor:
    """x W^T + b. narrow: the way into 8 bits, for products in 8 bits."""
    if narrow:
        y = float8.linear(x_ND, weight, narrow)
        return y if bias is None else y.add_(bias)
    if suits_onednn(x_ND) and x_ND.numel():  # the operator of torch's compiler adds the bias on the way
        return torch.ops.mkldnn._linear_pointwise(x_ND, weight, bias, "none", [], "")
    return nn.functional.linear(x_ND, weight, bias)


def input_grad(grad_NF: Tensor, weight: Tensor, narrow: float8.Quantize | None = None) -> Tensor:
    """g W."""
    return float8.input_grad(grad_NF, weight, narrow) if narrow else product(grad_NF, weight)


def accumulate_weight_grad(
    grad_NF: Tensor, x_ND: Tensor, out_FD: Tensor, narrow: float8.Quantize | None = None
) -> None:
    """out += g^T x, in the buffer itself where the dtypes allow."""
    if narrow:
        float8.accumulate_weight_grad(grad_NF, x_ND, out_FD, narrow)
    elif out_FD.dtype != grad_NF.dtype:
        out_FD.add_(product(grad_NF.t(), x_ND))
    else:
        with by_faster_library(grad_NF):
            out_FD.addmm_(grad_NF.t(), x_ND)


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b, of two matrices."""
    with by_faster_library(a_MK):
        return a_MK @ b_KN


def by_faster_library(x: Tensor) -> AbstractContextManager[Any]:
    """While it is entered, torch's products of tensors of this one's kind (mm, bmm, addmm, baddbmm) go to the faster
    library. Of use to no other operation, and set for the whole process: enter it for products alone.
    """
    return ONEDNN if suits_onednn(x) else NOTHING


def suits_onednn(x: Tensor) -> bool:
    """Whether products of this tensor go to oneDNN. Not where torch.compile traces them, and has ways of its own, nor
    for tensors that only stand for others.
    """
    plain = type(x) is Tensor and x.is_cpu and x.dtype == torch.float32
    return plain and not torch.compiler.is_compiling() and onednn_is_faster()


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512 and without tiles of bfloat16, and torch gives oneDNN products that
    it computes in float32.
    """
    here = processor()
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not MKLDNN.is_available():
        return False
    if here.vendor != "AuthenticAMD" or "amx_bf16" in here.flags or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return hasattr(MKLDNN, "matmul") and _keeps_every_bit()


class _OneDNN:
    """torch gives float32 products to oneDNN only where it may round their factors to bfloat16. oneDNN makes use of
    that on processors with tiles of bfloat16 (AMX) alone, and computes in float32 on all others.

    The setting is the process's: the first to enter notes what it was, and the last to leave, of all threads, puts it
    back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, "none"

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                own = MKLDNN.matmul.fp32_precision
                self._before = "none" if own == "none" or own == MKLDNN.fp32_precision else own
                MKLDNN.matmul.fp32_precision = "bf16"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                MKLDNN.matmul.fp32_precision = self._before


ONEDNN, NOTHING = _OneDNN(), nullcontext()


def _keeps_every_bit() -> bool:
    """Whether what was said of oneDNN is true here: products with one are the factor itself, which is not so rounded
    to bfloat16, nor to anything else below float32. Whatever surrounds the first product of a process: its answer
    stays.
    """
    with _disable_current_modes(), torch.autocast("cpu", enabled=False), torch.no_grad(), ONEDNN:
        one = torch.eye(64, dtype=torch.float32, device="cpu")
        fine = 1 + torch.arange(64 * 64, dtype=torch.float32, device="cpu").view(64, 64) * 2.0**-23
        found = fine @ one, one @ fine, torch.bmm(fine[None], one[None])[0], torch.zeros_like(one).addmm_(one, fine)
        return all(each.equal(fine) for each in found)
