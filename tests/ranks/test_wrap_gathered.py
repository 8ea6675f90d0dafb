"""What a script may do while it has every parameter whole."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.mesh import init_mesh
from tests.ranks.workers import over_sockets


class Net(nn.Module):
    """Three blocks, and a parameter in none of them, which stays from the forward on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.linspace(1.0, 2.0, 3))
        self.blocks = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * self.scale  # its backward reads the scale


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).double()


def train(model: Any, optimizer: Any, how: str, x: Any) -> dict[str, Tensor]:
    whole = getattr(model, "gathered", nullcontext)
    for step in range(3):
        with whole() if how == "step within" else nullcontext():
            with whole() if how == "forward within" else nullcontext():
                loss = model(x(step)).square().mean()
            if how == "state between":
                model.state_dict()
            with whole() if how == "backward within" else nullcontext():
                loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


HOWS = ["forward within", "backward within", "step within", "state between"]


def wrapped(zero: int, how: str, options: dict[str, Any]) -> dict[str, Tensor]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Net(), mesh, zero=zero, **options)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=0.01)
    return train(model, optimizer, how, lambda step: batch(step).chunk(2)[mesh.rank])


@pytest.mark.parametrize("how", HOWS)
def test_a_step_in_whole_or_in_part_within_it_is_a_step(ranks, how: str):
    net = Net()
    expected = train(net, torch.optim.AdamW(net.parameters(), lr=0.01), how, batch)
    for zero, options in ((1, {}), (3, {}), (3, {"gather": "step"})):
        for found in ranks(2, over_sockets, wrapped, zero, how, options):
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-11, msg=f"{name} {zero} {options}")


def within(zero: int) -> dict[str, bool]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Net(), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    net = Net()

    def same(what: nn.Module = net) -> bool:
        pairs = zip(model.module.parameters(), what.parameters(), strict=True)
        return all(bool(mine.isclose(theirs, rtol=1e-12).all()) for mine, theirs in pairs)

    found = {}
    with model.gathered():
        found["at first"] = same()
        model.state_dict()
        found["after state_dict"] = same()
        with torch.no_grad():
            model(batch(0))
        found["after a forward"] = same()
        with model.gathered():
            found["in another"] = same()
        found["after another"] = same()
        if mesh.rank == 0:
            model.eval()
            found["alone"] = model(batch(0)).isclose(net(batch(0))).all().item()
            model.train()
        model(batch(0)).sum().backward()
        optimizer.step()
        net(batch(0)).sum().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
        found["after a step"] = same()
        if zero == 3:
            with torch.no_grad():
                model.module.scale.zero_()
    if zero == 3:
        with torch.no_grad():
            model(batch(0))
        found["and nothing else"] = model(batch(1)).isclose(net(batch(1))).all().item()
        found["read outside"] = bool(model.module.blocks[0].weight.isnan().all())
    return found


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_every_parameter_is_whole_until_the_outermost_ends(ranks, zero: int):
    for found in ranks(2, over_sockets, within, zero):
        assert all(found.values()), found
