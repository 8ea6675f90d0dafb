"""The state of a wrapped module's optimizer: one rank saves, all load, at any zero, on any number of ranks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from parallax.tensor.plan import shard_module
from tests.ranks.workers import over_sockets

OPTIMIZERS: dict[str, Any] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
}
NO_DECAY = ["*bias", "scale"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.tensor(2.0))  # no dims, as Adam's step has none
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x) * self.scale


def steps(model: Any, optimizer: Any, numbers: range, num_ranks: int = 1, rank: int = 0) -> None:
    for number in numbers:
        x = torch.randn(12, 6, generator=torch.Generator().manual_seed(number)).double()
        model(x.chunk(num_ranks)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def of_torch(kind: str) -> tuple[Net, torch.optim.Optimizer]:
    net = Net()
    make, options = OPTIMIZERS[kind]
    plain = [p for n, p in net.named_parameters() if n.endswith("bias") or n == "scale"]
    decayed = [p for n, p in net.named_parameters() if n.endswith("weight")]
    return net, make([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], **options)


def save(kind: str, zero: int, num_ranks: int, path: str) -> dict[str, Tensor]:
    mesh = init_mesh(f"{num_ranks}x1x1", device_type="cpu")
    make, options = OPTIMIZERS[kind]
    model = parallax.data_parallel(Net(), mesh, zero=zero, no_decay=NO_DECAY, bucket_bytes=300)
    optimizer = parallax.optimizer(model, make, **options)
    steps(model, optimizer, range(3), num_ranks, mesh.rank)
    state = {"model": model.state_dict(), "optimizer": optimizer.whole_state_dict()}
    if mesh.rank == 0:
        torch.save(state, path)
    steps(model, optimizer, range(3, 6), num_ranks, mesh.rank)
    return model.state_dict()


def load(kind: str, zero: int, num_ranks: int, path: str) -> dict[str, Tensor]:
    mesh = init_mesh(f"{num_ranks}x1x1", device_type="cpu")
    make, options = OPTIMIZERS[kind]
    model = parallax.data_parallel(Net(), mesh, zero=zero, no_decay=NO_DECAY)
    optimizer = parallax.optimizer(model, make, **options | {"lr": 55.0})
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    steps(model, optimizer, range(3, 6), num_ranks, mesh.rank)
    return model.state_dict()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_rank_saves_and_any_zero_and_number_of_ranks_goes_on(ranks, tmp_path: Path, kind: str):
    net, optimizer = of_torch(kind)
    steps(net, optimizer, range(3))
    own = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(own, tmp_path / "torch")
    steps(net, optimizer, range(3, 6))
    expected = net.state_dict()
    paths = [tmp_path / "torch"]
    for zero, num_ranks in ((0, 2), (1, 3), (3, 2)) if kind == "adamw" else ((2, 2),):
        paths.append(tmp_path / f"{zero}")
        for found in ranks(num_ranks, save, kind, zero, num_ranks, str(paths[-1])):
            assert_close(found, expected)
    for path in paths:
        for zero, num_ranks in ((0, 1), (1, 2), (3, 3)):
            for found in ranks(num_ranks, load, kind, zero, num_ranks, str(path)):
                assert_close(found, expected)
        net, optimizer = of_torch(kind)  # and torch's own optimizer does
        saved = torch.load(path, weights_only=True)
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        steps(net, optimizer, range(3, 6))
        assert_close(net.state_dict(), expected)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-11, msg=name)


def parts(path: str) -> dict[str, Any]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Net().bfloat16(), mesh, zero=1)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=0.01)
    x = torch.ones(2, 6).bfloat16()
    model(x).sum().backward()
    optimizer.step()
    mine, state = copy.deepcopy(optimizer.state_dict()), model.state_dict()
    if mesh.rank == 0:
        torch.save(mine, path)
    parallax.comm.barrier(mesh.grad, mesh.device)
    model(x).sum().backward()
    optimizer.step()
    expected = model.state_dict()
    errors = []
    for zero, given in ((1, torch.load(path)), (3, mine), (0, mine)):
        other = parallax.data_parallel(Net().bfloat16(), mesh, zero=zero)
        with pytest.raises(ConfigError) as error:
            parallax.optimizer(other, torch.optim.AdamW, lr=0.01).load_state_dict(given)
        errors.append(str(error.value))
    model = parallax.data_parallel(Net().bfloat16(), mesh, zero=1)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=0.01)
    model.load_state_dict(state)
    optimizer.load_state_dict(mine)
    model(x).sum().backward()
    optimizer.step()
    return {"errors": errors, "same": all(v.equal(expected[n]) for n, v in model.state_dict().items())}


def test_a_part_is_for_its_own_rank_alone(ranks, tmp_path: Path):
    """Who lets rank 0 save and all load would give every rank the moments of the first."""
    first, second = ranks(2, parts, str(tmp_path / "part"))
    assert first["errors"][:2] == second["errors"][:2], "the same on every rank"
    for error in first["errors"] + second["errors"]:
        assert "is the part of rank" in error and "optimizer.whole_state_dict()" in error
    assert "part of rank 0 of 2 at zero=1, and rank 1 of 2 at zero=1" in first["errors"][0]
    assert first["same"] and second["same"]


def masters(zero: int) -> list[dict[Any, Tensor]]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    found = []
    saved: dict[str, Any] = {}
    for _ in range(2):
        model = parallax.data_parallel(Net().bfloat16(), mesh, zero=zero)
        optimizer = parallax.optimizer(model, torch.optim.SGD, lr=1e-5, momentum=0.9)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        else:
            for _ in range(3):
                model(torch.ones(2, 6).bfloat16()).sum().backward()
                optimizer.step()
        saved = {"model": model.state_dict(), "optimizer": optimizer.whole_state_dict()}
        found.append(saved["optimizer"]["masters"])
    return found


@pytest.mark.parametrize("zero", [0, 3])
def test_masters_of_narrow_parameters_go_along(ranks, zero: int):
    for before, after in ranks(2, masters, zero):
        assert before.keys() == after.keys() and len(before) == 7
        assert all(values.dtype == torch.float32 and values.equal(after[n]) for n, values in before.items())
        assert not all(values.bfloat16().float().equal(values) for values in before.values())


WRONG = {
    "another model": (lambda: nn.Linear(4, 4), {}, "groups of [2] parameters, this optimizer of [7]"),
    "another shape": (Net, {"shape": True}, "the parameter (16, 6)"),
    "without decay": (Net, {"no_decay": NO_DECAY}, "groups of [7] parameters, this optimizer of [3, 4]"),
    "another count of steps": (Net, {"step": True}, "the state step of scale is 1.0 and of"),
    "not all of it": (Net, {"without": True}, "have other kinds of state"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_state_that_does_not_fit_is_refused(how: str):
    make, what, text = WRONG[how]
    mesh = init_mesh("1x1x1", device_type="cpu")
    net = make()
    plain = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    saved = plain.state_dict()
    if what.get("shape"):
        saved["state"][1]["exp_avg"] = torch.zeros(5)
    if what.get("step"):
        saved["state"][2]["step"] = torch.tensor(9.0)
    if what.get("without"):
        del saved["state"][3]
    model = parallax.data_parallel(Net(), mesh, no_decay=what.get("no_decay", ()))
    with pytest.raises(ConfigError) as error:
        parallax.optimizer(model, torch.optim.AdamW).load_state_dict(saved)
    assert text in str(error.value)


def groups() -> list[int]:
    """One bucket, cut in two: the weights for the first rank, the biases for the second."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(nn.Bilinear(4, 4, 4), mesh, zero=3, no_decay=["bias"])
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
    model(torch.ones(1, 4), torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    whole = optimizer.whole_state_dict()
    optimizer.load_state_dict(whole)
    return [len(group["params"]) for group in whole["param_groups"]]


def test_every_rank_has_every_group(ranks):
    assert ranks(2, groups) == [[1, 1], [1, 1]]


WRITES: dict[str, Any] = {
    "data.clamp_": lambda net: [p.data.clamp_(-0.01, 0.01) for p in net.parameters()],
    "zero_": lambda net: [p.zero_() for p in net.parameters()],
    "load_state_dict": lambda net: net.load_state_dict({n: v / 2 for n, v in net.state_dict().items()}),
}


def written(zero: int, how: str) -> dict[str, Tensor]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Net().bfloat16(), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=1e-3)
    for _ in range(2):
        model(torch.ones(2, 6).bfloat16()).sum().backward()
        optimizer.step()
        with torch.no_grad(), model.gathered():
            WRITES[how](model.module)
    before = model.state_dict()
    model(torch.ones(2, 6).bfloat16()).sum().backward()
    optimizer.step()
    return {name: value.float() - before[name].float() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", WRITES)
def test_what_a_script_writes_into_narrow_parameters_stays(ranks, how: str):
    """Masters of their own would undo it with the next step: that one is small, and what was written large."""
    for zero in (0, 1, 2):
        for found in ranks(2, over_sockets, written, zero, how):
            for name, change in found.items():
                assert float(change.abs().max()) < 0.02, f"{name} at zero={zero}"


def over_tensor() -> str:
    mesh = init_mesh("1x2x1", device_type="cpu")
    model = parallax.data_parallel(shard_module(nn.Sequential(nn.Linear(4, 8)), {"0": "column"}, mesh.tensor), mesh)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=0.01)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)  # its own
    if mesh.rank:
        saved["parallax"]["tensor_rank"] = 0  # of the other
    with pytest.raises(ConfigError) as error:
        optimizer.load_state_dict(saved)
    return str(error.value)


def test_what_tensor_ranks_hold_is_not_the_same(ranks):
    first, second = ranks(2, over_tensor)
    assert first == second and "tensor rank 0 of 2 does not fit rank 1 of 2" in first
