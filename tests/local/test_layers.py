"""The layers on one rank: each is the torch module of its name, with and without a sink."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parallax.errors import ConfigError
from parallax.gradients import GradSink, attach
from parallax.mesh import Axis
from parallax.tensor.layers import ColumnParallelLinear, Piece, RowParallelLinear, VocabParallelEmbedding
from parallax.tensor.norms import LayerNorm, RMSNorm

ALONE = Axis("tensor")
F64 = torch.float64

LAYERS = {
    "column": lambda: ColumnParallelLinear(6, 10, ALONE, dtype=F64),
    "column-no-bias": lambda: ColumnParallelLinear(6, 10, ALONE, bias=False, dtype=F64),
    "row": lambda: RowParallelLinear(6, 10, ALONE, dtype=F64),
    "layernorm": lambda: LayerNorm(6, ALONE, dtype=F64),
    "layernorm-no-bias": lambda: LayerNorm(6, ALONE, bias=False, dtype=F64),
    "rmsnorm": lambda: RMSNorm(6, ALONE, dtype=F64),
}


def twin(layer: nn.Module) -> nn.Module:
    """torch's module with the same weights."""
    made: nn.Module
    if isinstance(layer, LayerNorm):
        made = nn.LayerNorm(6, bias=layer.bias is not None, dtype=F64)
    elif isinstance(layer, RMSNorm):
        made = nn.RMSNorm(6, eps=layer.eps, dtype=F64)
    else:
        made = nn.Linear(6, 10, bias=layer.bias is not None, dtype=F64)
    made.load_state_dict(layer.state_dict())
    return made


def scrambled(name: str) -> nn.Module:
    torch.manual_seed(1)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter))
    return layer


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)], ids=["flat", "batched"])
def test_a_layer_without_a_sink_is_torch_s_module(name: str, shape: tuple[int, ...]):
    layer = scrambled(name)
    x = torch.randn(shape, dtype=F64)
    ours, theirs = gradients(layer, x), gradients(twin(layer), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_agree_with_finite_differences(name: str):
    layer = scrambled(name)
    x = torch.randn(4, 6, dtype=F64, requires_grad=True)
    parameters = tuple(layer.parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        # The layer reads its own parameters: gradcheck perturbs them in place.
        return layer(x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("name", [*LAYERS, "embedding"])
def test_a_split_backward_is_the_whole_backward_bit_for_bit(name: str):
    """I then W adds the same bits as B, two microbatches long."""
    torch.manual_seed(2)
    if name == "embedding":
        layer: nn.Module = VocabParallelEmbedding(7, 6, ALONE)
        inputs = [torch.randint(0, 7, (5,)) for _ in range(2)]
    else:
        layer = scrambled(name).float()
        inputs = [torch.randn(5, 6, requires_grad=True) for _ in range(2)]
    found = []
    for split in (False, True):
        sink = GradSink()
        attach(layer, sink)
        buffers = {p: torch.zeros_like(p) for p in layer.parameters()}
        sink.buffer_of = buffers.__getitem__
        kept = []
        for x in inputs:
            if split:
                sink.keep()
            layer(x).square().sum().backward()
            if split:
                kept.append(sink.take())
                assert all(not buffer.any() for buffer in buffers.values()), "I touches no weight gradient"
        for work in kept:
            sink.run(work)
            assert not work, "what W has used is let go"
        found.append([buffers[p].clone() for p in layer.parameters()])
        assert all(p.grad is None for p in layer.parameters()), "with a sink nothing comes through autograd"
    assert all(b.any() for b in found[0])
    for whole, halves in zip(*found, strict=True):
        assert torch.equal(whole, halves)


def test_frozen_weights_get_no_gradient():
    layer = ColumnParallelLinear(6, 10, ALONE)
    sink = GradSink()
    attach(layer, sink)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.any()
    assert layer.weight.grad is None


def test_the_embedding_is_torch_s():
    torch.manual_seed(0)
    layer = VocabParallelEmbedding(11, 6, ALONE, dtype=F64)
    other = nn.Embedding(11, 6, dtype=F64)
    other.load_state_dict(layer.state_dict())
    ids = torch.tensor([[1, 10, 1], [0, 3, 1]])
    layer(ids).square().sum().backward()
    other(ids).square().sum().backward()
    assert torch.equal(layer(ids), other(ids))
    torch.testing.assert_close(layer.weight.grad, other.weight.grad)


def test_fused_pieces_are_canonical_parameters_of_their_own():
    layer = ColumnParallelLinear(4, 6, ALONE, pieces=[Piece("q", 4), Piece("k", 2)])
    assert [(piece.name, piece.global_shape) for piece in layer.layouts["weight"]] == [("q", (4, 4)), ("k", (2, 4))]
    with pytest.raises(ConfigError, match="sum to 6, out_features is 7"):
        ColumnParallelLinear(4, 7, ALONE, pieces=[Piece("q", 4), Piece("k", 2)])


@pytest.mark.parametrize("make", [ColumnParallelLinear, RowParallelLinear])
def test_a_size_that_does_not_divide_is_refused(make: type):
    axis = Axis("tensor", rank=1, ranks=(0, 1, 2), group=object())
    with pytest.raises(ConfigError, match="=10 does not divide by tensor=3"):
        make(10, 10, axis)


def test_two_layers_made_one_after_another_differ_and_a_seed_repeats_them():
    def pair() -> list[Tensor]:
        torch.manual_seed(5)
        return [ColumnParallelLinear(4, 4, ALONE).weight.detach() for _ in range(2)]

    first, again = pair(), pair()
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert 0.005 < float(torch.cat(first).std()) < 0.05


def test_bfloat16_norms_take_their_statistics_in_float32():
    x = (torch.randn(64, 512) + 30).bfloat16()
    for make, other in ((RMSNorm, nn.RMSNorm(512, eps=1e-5)), (LayerNorm, nn.LayerNorm(512))):
        y = make(512, ALONE, dtype=torch.bfloat16)(x).float()
        torch.testing.assert_close(y, other(x.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.timeout(300)
def test_torch_compile_takes_them():
    """In float32, where a processor may have its own way with products: the compiler has others."""
    layers = nn.Sequential(ColumnParallelLinear(64, 96, ALONE), RowParallelLinear(96, 64, ALONE))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    plain = gradients(layers, x)
    compiled = gradients(torch.compile(layers), x)  # type: ignore[arg-type]
    for found, wanted in zip(compiled[:2], plain[:2], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
