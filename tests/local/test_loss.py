"""The cross entropy on one rank; tests/ranks/test_layers.py cuts its vocabulary."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parallax.mesh import Axis
from parallax.tensor import fused_loss
from parallax.tensor import loss as loss_file
from parallax.tensor.fused_loss import linear_cross_entropy
from parallax.tensor.layers import ColumnParallelLinear
from parallax.tensor.loss import vocab_parallel_cross_entropy

ALONE = Axis("tensor")


@pytest.fixture(params=["in chunks", "whole, as on a GPU"])
def either(request, monkeypatch):
    """Both ways to take the loss; a GPU's is the same operations anywhere."""
    if request.param != "in chunks":
        for file in (loss_file, fused_loss):
            monkeypatch.setattr(file, "cross_entropy_of", loss_file.WholeCrossEntropy)


def ours(logits: Tensor, targets: Tensor, vocab: int, **options: bool) -> Tensor:
    return vocab_parallel_cross_entropy(logits, targets, ALONE, vocab_range=(0, vocab), **options)


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
@pytest.mark.parametrize("overwrite", [False, True])
def test_it_is_torch_s_sum_of_losses(monkeypatch, either, chunk: int, overwrite: bool):
    """Ignored targets count nothing; columns beyond the vocabulary are padding; any chunk size is the same."""
    monkeypatch.setattr(loss_file, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    logits = torch.randn(9, 16, dtype=torch.float64)
    logits[:, 13:] = 100.0  # padding must not reach the sum of exponentials
    targets = torch.randint(0, 13, (9,))
    targets[[2, 5]] = -100
    mine = logits.clone().requires_grad_()
    total = ours(mine * 1.0, targets, 13, overwrite=overwrite)
    (total * 0.25).backward()
    other = logits[:, :13].clone().requires_grad_()
    reference = F.cross_entropy(other, targets, reduction="sum")
    (reference * 0.25).backward()
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, reference, rtol=1e-12, atol=1e-12)
    assert mine.grad is not None and other.grad is not None
    torch.testing.assert_close(mine.grad[:, :13], other.grad, rtol=1e-12, atol=1e-12)
    assert not mine.grad[:, 13:].any() and not mine.grad[[2, 5]].any()


class Output(torch.nn.Module):
    tensor, sequence_parallel, sink = ALONE, False, None

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 22])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_fused_with_its_layer_it_is_the_same(monkeypatch, either, at_once: int, dtype: torch.dtype, bound: float):
    monkeypatch.setattr(fused_loss, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    x, weight = torch.randn(9, 6, dtype=dtype), torch.randn(16, 6, dtype=dtype)
    targets = torch.randint(0, 13, (9,))
    targets[[2, 5]] = -100
    found = []
    for fused in (True, False):
        layer, mine = Output(weight.clone()), x.clone().requires_grad_()
        if fused:
            total = linear_cross_entropy(mine, layer, targets, vocab_range=(0, 13))
        else:
            total = ours(F.linear(mine, layer.weight), targets, 13)
        (total * 0.25).backward()
        found.append((total.detach(), mine.grad, layer.weight.grad))
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(mine, layer, targets, vocab_range=(0, 13)), found[0][0])
    for left, right in zip(*found, strict=True):
        assert left is not None and right is not None and left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=bound, atol=bound)
    assert found[0][1][2].count_nonzero() == 0 and found[0][2][13:].count_nonzero() == 0


def test_the_logits_are_never_there():
    """Peak memory of forward and backward, in a process of its own: input, weight, their gradients, one chunk."""
    code = (
        "import torch; from parallax.memory import peak_memory_bytes as peak\n"
        "from parallax.mesh import Axis; from parallax.tensor import fused_loss as f\n"
        "torch.set_num_threads(1); N, D, V = 8192, 64, 16384\n"
        "layer = torch.nn.Linear(D, V, bias=False); layer.tensor = Axis('tensor')\n"
        "layer.sequence_parallel, layer.sink = False, None\n"
        "def go(n): f.linear_cross_entropy(torch.randn(n, D, requires_grad=True), layer,"
        " torch.randint(0, V, (n,)), vocab_range=(0, V)).backward()\n"
        "go(256); before = peak(torch.device('cpu')); go(N); print(peak(torch.device('cpu')) - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 20e6 < grown < 100e6, f"{grown / 1e6:.0f} MB; the logits alone are 537 MB"


def test_huge_logits_do_not_overflow(either):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 1e30, 0.0]], requires_grad=True)
    total = ours(logits * 1.0, torch.tensor([0, 1]), 3)
    total.backward()
    assert float(total.detach()) == 0.0
    assert logits.grad is not None and bool(logits.grad.isfinite().all())


def test_all_ignored_is_zero_loss_and_zero_gradient(either):
    logits = torch.randn(4, 5, requires_grad=True)
    total = ours(logits * 1.0, torch.full((4,), -100), 5)
    total.backward()
    assert float(total.detach()) == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_bfloat16_logits_are_summed_in_float32(either):
    torch.manual_seed(0)
    logits = torch.randn(8, 4096).bfloat16()
    targets = torch.randint(0, 4096, (8,))
    reference = F.cross_entropy(logits.double(), targets, reduction="sum")
    torch.testing.assert_close(ours(logits.clone(), targets, 4096), reference, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sure_token_s_gradient_is_not_lost_in_rounding(either, dtype: torch.dtype):
    """softmax - 1 of a probability of 0.9999: rounded to bfloat16 before the 1 is taken away it would be 0."""
    logits = torch.zeros(2, 16, dtype=dtype)
    logits[:, 3] = 12.0
    mine = logits.clone().requires_grad_()
    ours(mine * 1.0, torch.tensor([3, 3]), 16).backward()
    exact = logits.double().requires_grad_()
    F.cross_entropy(exact, torch.tensor([3, 3]), reduction="sum").backward()
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-2, atol=0)


def test_peak_memory_is_less_than_half_a_copy_of_the_logits():
    """Beside logits of 256 MB the overwriting loss needs its chunks alone: torch's own needs two more copies."""
    code = (
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "from parallax.memory import peak_memory_bytes\n"
        "from parallax.mesh import Axis\n"
        "from parallax.tensor.loss import vocab_parallel_cross_entropy as loss\n"
        "def peak(): return peak_memory_bytes(torch.device('cpu'))\n"
        "def run(n):\n"
        "    x = torch.zeros(n, 8192, requires_grad=True)\n"
        "    y = x * 1.0\n"
        "    before = peak()\n"
        "    loss(y, torch.zeros(n, dtype=torch.int64), Axis('tensor'), vocab_range=(0, 8192), overwrite=True)"
        ".backward()\n"
        "    return peak() - before\n"
        "run(8)\n"
        "print(run(8192))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    logits_bytes = 8192 * 8192 * 4
    # x.grad is the overwritten logits themselves times 1.0: one more copy belongs to the multiplication, not the loss.
    assert 0.9 * logits_bytes < int(done.stdout) < 1.5 * logits_bytes


@pytest.mark.parametrize("scale", [1 / 253, torch.tensor(1 / 253, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_is_not_rounded_to_bfloat16(either, fused: bool, scale: float | Tensor):
    """1/253 in bfloat16 is 0.3 % off, and so would be the gradients of all that is below the head."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 32, generator=generator).mul_(size).bfloat16() for n, size in ((256, 1.0), (64, 0.1)))
    targets = torch.randint(0, 64, (256,), generator=generator)
    narrow, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    options = {"vocab_range": (0, 64), "scale": scale}
    if fused:
        layer = ColumnParallelLinear(32, 64, ALONE, bias=False, dtype=torch.bfloat16)
        layer.weight.data.copy_(w)
        loss = linear_cross_entropy(narrow, layer, targets, **options)
    else:
        loss = vocab_parallel_cross_entropy(narrow @ w.T, targets, ALONE, **options)
    loss.backward()
    right = F.cross_entropy(exact @ w.double().T, targets, reduction="sum") / 253
    right.backward()
    assert loss.item() == pytest.approx(right.item(), rel=1e-2)
    along = (narrow.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(along - 1) < 1e-3
