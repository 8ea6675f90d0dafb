"""The products of a linear layer are the same whichever library computes them."""

from __future__ import annotations

from collections import Counter
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from parallax.processor import Processor
from parallax.tensor import products
from tests.cases import TIED, advance, start

WIDE = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2}


def can_have_onednn() -> bool:
    return hasattr(torch.ops.mkldnn, "_linear_pointwise") and products._keeps_every_bit()


@pytest.fixture(params=["by the rule", "onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "onednn" and not can_have_onednn():
        pytest.skip("torch has no oneDNN, or this processor multiplies in bfloat16 when it may")
    if request.param != "by the rule":
        monkeypatch.setattr(products, "onednn_is_faster", lambda: request.param == "onednn")
    return request.param


def near(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == exact.shape and found.is_contiguous()
    apart = (found.double() - exact).abs().max() / exact.abs().max()
    assert apart < WIDE[dtype], f"{apart} apart"


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("rows", "hidden", "width"), [(1, 1, 1), (7, 5, 3), (64, 33, 130), (512, 256, 768)])
def test_products(library: str, dtype: torch.dtype, rows: int, hidden: int, width: int):
    generator = torch.Generator().manual_seed(rows)
    x, w, b, g, before = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(rows, hidden), (width, hidden), (width,), (rows, width), (width, hidden)]
    )
    x64, w64, b64, g64, before64 = (t.double() for t in (x, w, b, g, before))
    near(products.linear(x, w, None), x64 @ w64.T, dtype)
    near(products.linear(x, w, b), x64 @ w64.T + b64, dtype)
    near(products.input_grad(g, w), g64 @ w64, dtype)
    near(products.product(g, w), g64 @ w64, dtype)
    out = before.clone()
    products.accumulate_weight_grad(g, x, out)
    near(out, before64 + g64.T @ x64, dtype)
    wide = before.float() if dtype == torch.bfloat16 else before.clone()  # gradients are summed in float32
    products.accumulate_weight_grad(g, x, wide)
    near(wide, before64 + g64.T @ x64, dtype)


def test_views_and_nothing(library: str):
    """What layers give: slices of a fused buffer, transposed views, a microbatch without tokens of one's own."""
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x, w = whole[:, 1:5], whole[:3, 2:6]
    near(products.linear(x, w, None), x.double() @ w.double().T, torch.float32)
    near(products.product(x.t(), whole), x.double().T @ whole.double(), torch.float32)
    empty, out = torch.empty(0, 4), torch.ones(3, 4)
    assert products.linear(empty, w, torch.ones(3)).shape == (0, 3)
    assert products.input_grad(torch.empty(0, 3), w).shape == (0, 4)
    products.accumulate_weight_grad(torch.empty(0, 3), empty, out)
    assert out.equal(torch.ones(3, 4))


def test_the_same_bits_every_time(library: str):
    x, w = torch.randn(512, 256), torch.randn(768, 256)
    first = products.linear(x, w, None)
    assert all(products.linear(x, w, None).equal(first) for _ in range(5))


def test_which_library_follows_from_the_processor_alone(monkeypatch: pytest.MonkeyPatch):
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512" and can_have_onednn()
    tiles = frozenset({"amx_bf16"})
    for vendor, flags, expected in (
        ("AuthenticAMD", frozenset[str](), wide),
        ("AuthenticAMD", tiles, False),  # there it would multiply in bfloat16
        ("GenuineIntel", frozenset[str](), False),
        ("", frozenset[str](), False),
    ):
        monkeypatch.setattr(products, "processor", lambda vendor=vendor, flags=flags: Processor(vendor, flags))
        assert products.onednn_is_faster.__wrapped__() is expected
    assert not any(products.suits_onednn(torch.ones(2, 2, dtype=dtype)) for dtype in (torch.float64, torch.bfloat16))


@pytest.mark.parametrize("where", [(torch.Tensor, "__matmul__"), (torch, "bmm"), (torch.Tensor, "addmm_")])
def test_a_library_that_rounds_is_not_used(where: tuple[Any, str], monkeypatch: pytest.MonkeyPatch):
    """Whatever oneDNN does with the leave to round that torch gives it: it is tried, and left alone if it takes it."""
    usual = getattr(*where)

    def rounding(*factors: torch.Tensor) -> torch.Tensor:
        if setting() == "bf16":
            factors = (*factors[:-2], *(each.bfloat16().float() for each in factors[-2:]))
        return usual(*factors)

    monkeypatch.setattr(*where, rounding)
    assert not products._keeps_every_bit()


@pytest.mark.skipif(not can_have_onednn(), reason="torch has no oneDNN, or it takes the leave to round")
def test_the_first_product_of_a_process_may_be_anywhere():
    """What is found then stays: it must not follow from what surrounds it."""
    default = torch.get_default_dtype()
    surroundings = (
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
        FakeTensorMode(),
        torch.inference_mode(),
    )
    try:
        for surrounding in surroundings:
            torch.set_default_dtype(torch.float64)
            with surrounding:
                assert products._keeps_every_bit()
    finally:
        torch.set_default_dtype(default)
    with FlopCounterMode(display=False) as counter:
        assert products._keeps_every_bit()
    assert counter.get_total_flops() == 0


class Products(TorchDispatchMode):
    """By name of the operation, how often oneDNN was to have it, and how often torch was left to choose."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, bool]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_linear_pointwise"):
            self.seen[name, products.ONEDNN._inside > 0 or name == "_linear_pointwise"] += 1
        return func(*args, **kwargs or {})


@pytest.mark.skipif(not can_have_onednn(), reason="torch has no oneDNN, or it takes the leave to round")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_gives_every_product_to_the_library(compiled: bool, monkeypatch: pytest.MonkeyPatch):
    """Of linear layers forward, by inputs and by weights, and of attention."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    small = {"model.layers": 2, "corpus.sequence_length": 128, "batch.global_size": 4, "batch.microbatch_size": 2}
    run, state = start("1x1x1", **TIED | small | {"dtype": "float32", "compile": compiled})
    advance(run, state, 1)
    with Products() as found:
        advance(run, state, 1)
    assert {inside for _, inside in found.seen} == {True}, found.seen
    assert {"mm", "addmm_", "bmm", "baddbmm_", "_linear_pointwise"} <= {name for name, _ in found.seen}, found.seen


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_the_setting_is_for_products_alone(library: str):
    """Nobody else meets it: not after an error, nor where one is within another; and what a user has set, stays."""
    x = torch.ones(64, 64)
    inside = "bf16" if products.suits_onednn(x) else "ieee"
    before = setting()
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    try:
        with pytest.raises(ZeroDivisionError), products.by_faster_library(x):
            with products.by_faster_library(x):
                products.product(x, x)
                assert setting() == inside
            assert setting() == inside
            _ = 1 / 0
        assert setting() == "ieee"
        products.linear(x, x, None), products.product(x, x), products.accumulate_weight_grad(x, x, x.clone())
        assert setting() == "ieee"
        torch.backends.mkldnn.matmul.fp32_precision = "none"  # it follows from what is set for all
        torch.backends.fp32_precision = "tf32"
        assert setting() == "tf32"
        products.product(x, x)
        assert setting() == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert setting() == "ieee"
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.skipif(not can_have_onednn(), reason="torch has no oneDNN, or it takes the leave to round")
def test_the_last_thread_to_leave_puts_the_setting_back():
    before = setting()
    first, second = Event(), Event()

    def stay(mine: Event, other: Event) -> None:
        with products.ONEDNN:
            mine.set()
            assert other.wait(60)

    with products.ONEDNN:
        thread = Thread(target=stay, args=(first, second))
        thread.start()
        assert first.wait(60)
    assert setting() == "bf16"  # the other is still in it
    second.set()
    thread.join()
    assert setting() == before


def test_tensors_that_only_stand_for_others():
    """Neither multiplied by a library that wants numbers, nor a reason to try which one it is."""
    products.onednn_is_faster.cache_clear()
    with FakeTensorMode():
        x, weight = torch.empty(64, 32), torch.empty(16, 32)
        assert products.linear(x, weight, None).shape == (64, 16)
        assert products.product(x, weight.t()).shape == (64, 16)
