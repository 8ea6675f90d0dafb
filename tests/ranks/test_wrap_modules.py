"""Modules with something unusual in them: what is wrapped as it is, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh

STRIDED: dict[str, Callable[[], Tensor]] = {
    "slice": lambda: torch.randn(20)[::2],
    "columns": lambda: torch.randn(4, 6)[:, 1:4],
    "expanded": lambda: torch.randn(1).expand(10000),
    "int16": lambda: torch.randint(9, (5,)).to(torch.int16),
    "float8": lambda: torch.randn(5).to(torch.float8_e4m3fn),
}


def strided_buffers() -> dict[str, Tensor]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    torch.manual_seed(mesh.rank)
    net = nn.Linear(6, 3)
    for name, make in STRIDED.items():
        net.register_buffer(name, make())
    model = parallax.data_parallel(net, mesh)
    return {name: buffer.float().clone() for name, buffer in model.module.named_buffers()}


@pytest.mark.parametrize("shared", ["0", "1"])
def test_buffers_of_any_stride_and_dtype_are_those_of_the_first_rank(ranks, shared: str):
    first, second = ranks(2, with_shared_memory, shared, strided_buffers)
    torch.manual_seed(0)
    nn.Linear(6, 3)
    for name, make in STRIDED.items():
        expected = make().float()
        assert first[name].equal(expected) and second[name].equal(expected), name


def with_shared_memory(shared: str, function: Callable[[], object]) -> object:
    import os

    os.environ["PARALLAX_SHARED_MEMORY"] = shared
    return function()


@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_a_sparse_buffer_is_refused_by_name(layout: str):
    net = nn.Linear(6, 3)
    net.register_buffer("links", torch.eye(3).to_sparse(layout=getattr(torch, layout)))
    with pytest.raises(ConfigError, match=rf"links is of layout torch\.{layout}.*links\.to_dense"):
        parallax.data_parallel(net, init_mesh("1x1x1", device_type="cpu"))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Parameter(torch.randn(6, 40, dtype=torch.complex128))
        self.second = nn.Parameter(torch.randn(40, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.first @ self.second).abs()


def complex_steps(zero: int) -> tuple[list[float], dict[str, Tensor]]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Complex(), mesh, zero=zero, bucket_bytes=1000)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    norms = []
    for step in range(3):
        x = torch.full((2, 6), 1.0 + mesh.rank + step, dtype=torch.float64)
        model(x).square().mean().backward()
        norms.append(optimizer.clip_grad_norm_(0.5))
        optimizer.step()
    optimizer.load_state_dict(optimizer.whole_state_dict())
    return norms, model.state_dict()


def test_complex_parameters_train_and_clip(ranks):
    model = Complex()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = []
    for step in range(3):
        for rank in range(2):
            x = torch.full((2, 6), 1.0 + rank + step, dtype=torch.float64)
            (model(x).square().mean() / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    for zero in (0, 2, 3):
        for found, state in ranks(2, complex_steps, zero):
            assert found == pytest.approx(norms, rel=1e-9)
            for name, values in model.state_dict().items():
                torch.testing.assert_close(state[name], values, rtol=1e-9, atol=1e-11, msg=name)


def test_a_lazy_module_without_shapes_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2))
    with pytest.raises(ConfigError, match="1.weight is of a lazy module that has seen no input"):
        parallax.data_parallel(net, init_mesh("1x1x1", device_type="cpu"))
    net(torch.ones(1, 3))
    parallax.data_parallel(net, init_mesh("1x1x1", device_type="cpu"))


@pytest.mark.parametrize("value", [["a list"], {"weight": "a word"}, {"weight": ("a", "word")}, 3])
def test_an_attribute_that_happens_to_be_called_layouts_or_sparse_is_the_modules_own(value: object):
    net = nn.Linear(3, 4)
    net.layouts, net.sparse = value, True  # type: ignore[assignment]
    model = parallax.data_parallel(net, init_mesh("1x1x1", device_type="cpu"))
    assert model.state_dict().keys() == {"weight", "bias"}


@pytest.mark.parametrize("table", [nn.Embedding(4, 2, sparse=True), nn.EmbeddingBag(4, 2, sparse=True)])
def test_a_table_with_sparse_gradients_is_refused_by_name(table: nn.Module):
    with pytest.raises(ConfigError, match="0 has sparse gradients.*sparse=False"):
        parallax.data_parallel(nn.Sequential(table), init_mesh("1x1x1", device_type="cpu"))
