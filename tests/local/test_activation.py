"""The activations are torch's, forward and backward, and so is what torch.compile makes of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallax.compiled import require_compiler
from parallax.errors import ConfigError
from parallax.models import activation
from parallax.models.activation import gelu, swiglu
from parallax.models.attention import apply_rotary, rotary_table
from parallax.models.transformer import MLP
from tests.cases import VARIANTS, start, train, worst

NEAR = {torch.float64: 5e-14, torch.float32: 3e-6, torch.bfloat16: 8e-3}  # torch itself is 3e-6 off in float32


@pytest.mark.parametrize("dtype", NEAR)
def test_it_is_torchs(dtype: torch.dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, 3e38, -3e38])]).to(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, wanted = gelu(x), F.gelu(exact, approximate="tanh")
    y.backward(grad)
    wanted.backward(grad.double())
    assert y.dtype == dtype and x.grad is not None and exact.grad is not None
    usual = slice(0, -4)  # the rest is so large that only signs and zeros are of interest
    for mine, theirs in ((y, wanted), (x.grad, exact.grad)):
        apart = (mine.detach().double() - theirs.detach()).abs()[usual] / theirs.detach().abs()[usual].clamp(min=1)
        assert apart.max() <= NEAR[dtype]


@pytest.mark.parametrize("dtype", NEAR)
def test_parts_are_the_bits_of_the_whole(dtype: torch.dtype):
    x, grad = (torch.randn(2, activation.CHUNK - 5, dtype=torch.float64).to(dtype) for _ in range(2))
    x.requires_grad_()
    y = gelu(x)
    y.backward(grad)
    whole, slope = activation._gelu_and_slope(x.detach())
    assert torch.equal(y, whole) and x.grad is not None and torch.equal(x.grad, grad * slope)


@pytest.mark.parametrize("dtype", NEAR)
def test_in_the_memory_of_its_input_it_is_the_same(dtype: torch.dtype):
    begin = torch.randn(3, activation.CHUNK // 2, dtype=torch.float64).to(dtype).requires_grad_()
    found = []
    for overwrite in (False, True):
        x = begin * 1
        y = gelu(x, overwrite=overwrite)
        assert (y.data_ptr() == x.data_ptr()) is overwrite
        (grad,) = torch.autograd.grad(y.square().sum(), begin)
        found.append((y.detach(), grad))
    for apart, together in zip(*found, strict=True):
        assert apart.equal(together)
    narrow = (begin * 1)[:, ::2]  # of a view with gaps it makes a copy: the memory is not its own
    before = narrow.detach().clone()
    gelu(narrow, overwrite=True)
    assert narrow.equal(before)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_part_of_a_larger_tensor_and_a_single_number(overwrite: bool):
    larger = torch.randn(7, activation.CHUNK // 4, generator=torch.Generator().manual_seed(0))
    part = larger.clone()[2:]
    assert gelu(part, overwrite=overwrite).equal(gelu(larger)[2:])
    assert gelu(larger[0, 0]).equal(gelu(larger)[0, 0])


def test_who_needed_what_is_overwritten_is_told():
    begin = torch.randn(5, requires_grad=True)
    x = begin * 1
    square = x.square()
    gelu(x, overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_a_hook_sees_what_the_layer_returned():
    """Activations that somebody captures are not overwritten later, nor those of a layer put in another's place."""
    run, _ = start("1x1x1", **VARIANTS["gpt2-tied"])
    mlp = next(module for module in run.stages[0].modules() if isinstance(module, MLP))
    x = torch.randn(6, mlp.up.weight.shape[1], dtype=mlp.up.weight.dtype)
    expected = F.linear(x, mlp.up.weight, mlp.up.bias).detach()
    y = mlp(x).detach()
    seen: list[torch.Tensor] = []
    for register in (
        mlp.up.register_forward_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        hook = register(lambda module, given, made: seen.append(made.detach()) if module is mlp.up else None)
        assert mlp(x).equal(y) and torch.allclose(seen.pop(), expected)
        hook.remove()
    hook = mlp.up.register_full_backward_hook(lambda module, given, made: seen.append(made[0]))
    mlp(x.requires_grad_()).sum().backward()
    assert seen.pop().shape == expected.shape
    hook.remove()
    forward = mlp.up.forward
    mlp.up.forward = lambda x: (seen.append(made := forward(x)), made)[1]  # type: ignore[method-assign]
    assert mlp(x).equal(y) and torch.allclose(seen.pop(), expected)
    del mlp.up.forward
    squashed = torch.nn.Sequential(mlp.up, torch.nn.Sigmoid())  # whose backward needs what it returned
    mlp.up = squashed  # type: ignore[assignment]
    mlp(x).sum().backward()


def test_a_second_derivative_is_refused():
    """The derivative is kept as a number: nothing could tell where it came from."""
    x = torch.randn(5, requires_grad=True)
    (first,) = torch.autograd.grad(gelu(x * x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_large_stays_finite(dtype: torch.dtype):
    x = torch.tensor([1e4, -1e4, 1e18, -1e18], dtype=dtype, requires_grad=True)
    y = gelu(x)
    y.backward(torch.ones_like(y))
    assert y.tolist() == [x[0], 0, x[2], 0] and x.grad is not None and x.grad.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_swiglu_is_written_out(dtype: torch.dtype):
    x = torch.randn(7, 12, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    again = x.detach().clone().requires_grad_()
    grad = torch.randn(7, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y, wanted = swiglu(x), F.silu(again[:, :6]) * again[:, 6:]
    y.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("variant", ["gpt2-tied", "llama", "gpt2-dropout"])
def test_compiled_trains_the_same_model(variant: str):
    """In float64, to what the order of sums may change."""
    plain = train("1x1x1", VARIANTS[variant])
    assert worst(train("1x1x1", VARIANTS[variant] | {"compile": "true"}), plain) <= 1e-10


def test_compiled_positions_of_any_shapes_in_one_process():
    """As of models that are built after each other, and of a last batch that is smaller: each shape for itself, since
    torch fails to compile this once for all shapes.
    """
    torch._dynamo.reset()
    for length, heads, width in ((24, 6, 4), (24, 6, 8), (32, 12, 16), (7, 3, 10)):
        table = rotary_table(length, width, 1e4, torch.device("cpu"), torch.float32)
        x = torch.randn(2, length, 3 * heads, width, requires_grad=True)
        found = []
        for compiled in (True, False):
            y = apply_rotary(x, table, 2 * heads, compiled)
            found.append((y, *torch.autograd.grad(y.square().sum(), x)))
        for mine, plain in zip(*found, strict=True):
            torch.testing.assert_close(mine, plain)


def test_no_compiler_is_one_error_with_the_fix(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="there is no no-such-compiler; install g"):
        require_compiler("cpu")
