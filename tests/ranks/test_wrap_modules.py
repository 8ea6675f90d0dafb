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
