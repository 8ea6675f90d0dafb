"""Products in 8 bits: close to those in 32, in both directions, and refused where no hardware has them."""

from __future__ import annotations

import pytest
import torch

from parallax.compiled import pick
from parallax.config import ModelConfig
from parallax.errors import ConfigError
from parallax.mesh import Axis, planned_mesh
from parallax.models.transformer import Transformer
from parallax.tensor import float8
from parallax.tensor.layers import ColumnParallelLinear, RowParallelLinear
from tests.cases import make_config


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left.float() - right.float()).norm() / right.float().norm())


def test_the_scale_fits_each_tensor():
    """Numbers of any size come through: to the 3 bits behind the point of e4m3, the 2 of e5m2."""
    for dtype, bound in ((torch.float8_e4m3fn, 2**-4), (torch.float8_e5m2, 2**-3)):
        for size in (1e-20, 1.0, 1e20):
            x = torch.tensor([1.0, -0.77, 0.4, 0.013]) * size
            eight, scale = float8.quantize(x, dtype)
            assert eight.dtype == dtype
            assert ((eight.float() * scale - x).abs() <= bound * x.abs()).all()
    eight, scale = float8.quantize(torch.zeros(4), torch.float8_e4m3fn)
    assert not eight.float().any() and bool(scale.isfinite())


@pytest.mark.timeout(600)
def test_a_compiler_makes_the_same_bits():
    model = Transformer(
        ModelConfig(), planned_mesh("1x1x1", 0), range(2), sequence_length=8, float8=True, compiled=True
    )
    layer = model.layers["0"].mlp.up
    assert layer.narrow is pick(float8.quantize, True)
    x = torch.randn(40, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        (found, found_scale), (wanted, scale) = layer.narrow(x, dtype), float8.quantize(x, dtype)
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)) and torch.equal(found_scale, scale)


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_and_its_gradients(kind: type, dtype: torch.dtype):
    torch.manual_seed(0)
    layers = [kind(64, 48, Axis("tensor"), dtype=dtype) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].narrow = float8.quantize
    x = torch.randn(32, 64, dtype=dtype)
    grad = torch.randn(32, 48, dtype=dtype)
    found = []
    for layer in layers:
        mine = x.clone().requires_grad_()
        y = layer(mine)
        y.backward(grad)
        found.append([y.detach(), mine.grad, layer.weight.grad, layer.bias.grad])
    for plain, eight in zip(*found, strict=True):
        assert plain.dtype == eight.dtype and plain.shape == eight.shape
    errors = [relative(eight, plain) for plain, eight in zip(*found, strict=True)]
    assert errors[0] < 0.05 and errors[1] < 0.08 and errors[2] < 0.08 and errors[3] == 0
    assert min(errors[:3]) > 0.005, "it was in 8 bits"


def test_it_is_refused_where_there_is_no_hardware():
    from parallax.assemble import assemble
    from parallax.mesh import init_mesh

    config = make_config("1x1x1", dtype="float8", **{"corpus.sequence_length": 32, "batch.num_microbatches": None})
    with pytest.raises(ConfigError, match="this CPU has no such products; set dtype=bfloat16"):
        assemble(config, init_mesh("1x1x1", device_type="cpu"))
