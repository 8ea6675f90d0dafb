"""Hooks of the script's own beside those that gather parameters."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.mesh import init_mesh
from tests.ranks.workers import over_sockets


class Scaled(nn.Module):
    """A hook on the whole module reads a weight that no block holds; hooks on two blocks read the blocks' own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(3))
        with warnings.catch_warnings():  # the old weight_norm, which is a hook, is deprecated
            warnings.simplefilter("ignore")
            norm = nn.utils.weight_norm
            self.layers = nn.Sequential(norm(nn.Linear(6, 16)), nn.Tanh(), norm(nn.Linear(16, 3)))
        self.register_forward_pre_hook(lambda module, args: setattr(module, "used", module.scale.exp()))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.used


def train(model: Any, optimizer: Any, num_ranks: int, rank: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(8, 6, generator=generator).double().chunk(num_ranks)[rank]
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def wrapped(zero: int) -> dict[str, Tensor]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Scaled().double(), mesh, zero=zero, bucket_bytes=100)
    return train(model, parallax.optimizer(model, torch.optim.AdamW, lr=0.01), 2, mesh.rank)


def test_a_hook_that_reads_weights_reads_those_of_this_step(ranks):
    """Over sockets, where a gathering is still under way when it has begun."""
    model = Scaled().double()
    expected = train(model, torch.optim.AdamW(model.parameters(), lr=0.01), 1, 0)
    for zero in (0, 1, 2, 3):
        for found in ranks(2, over_sockets, wrapped, zero):
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-11, msg=f"{name} zero={zero}")


def copies(zero: int) -> dict[str, Any]:
    """Copies of the module, made while it is whole, are called by one rank alone, and sent as files."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Net().double(), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with model.gathered():
        copied = copy.deepcopy(model.module)
        averaged = torch.optim.swa_utils.AveragedModel(model.module)
        file = io.BytesIO()
        torch.save(model.module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.ones(2, 6, dtype=torch.float64)
    found = {}
    mesh.grad.traffic.clear()
    if mesh.rank == 0:
        for name, other in (("copied", copied), ("averaged", averaged), ("loaded", loaded)):
            found[name] = bool(other(x).isclose(Net().double()(x)).all())
            other(x).sum().backward()
    found["nothing sent"] = not mesh.grad.traffic
    model(x).sum().backward()
    optimizer.step()
    return found


def test_copies_of_the_module_send_nothing(ranks):
    for zero in (1, 3):
        for found in ranks(2, copies, zero):
            assert all(found.values()), found


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def compiled(where: str) -> list[dict[str, Tensor]]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    found = []
    for zero in (0, 1, 3):
        net: Any = Net().double()
        if where == "inside":
            net = torch.compile(net, backend="aot_eager")
        model: Any = parallax.data_parallel(net, mesh, zero=zero)
        optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
        called = torch.compile(model, backend="aot_eager") if where == "outside" else model
        generator = torch.Generator().manual_seed(mesh.rank)
        for _ in range(3):
            called(torch.randn(4, 6, generator=generator).double()).square().mean().backward()
            optimizer.step()
        found.append({name.removeprefix("_orig_mod."): value for name, value in model.state_dict().items()})
    return found


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_a_compiler_leaves_the_gatherings_alone(ranks, where: str):
    expected, *_ = ranks(2, compiled, "nowhere")[0]
    for found in ranks(2, compiled, where):
        for of_zero in found:
            for name, values in expected.items():
                torch.testing.assert_close(of_zero[name], values, rtol=1e-9, atol=1e-11, msg=name)
