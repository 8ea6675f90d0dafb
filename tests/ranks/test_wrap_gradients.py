"""What a script does to gradients between backward and step, and when they are there."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from tests.ranks.test_wrap_join import batch, net

Body = Callable[[Any, Any, Tensor, int], None]


def plain(body: Body, kind: Any, options: dict[str, Any], steps: int) -> dict[str, Tensor]:
    """One process that sees both ranks' batches."""
    module = net()
    optimizer = kind(module.parameters(), **options)
    for step in range(steps):
        body(module, optimizer, torch.cat([batch(rank, step) for rank in range(2)]), step)
    return {name: value.clone() for name, value in module.state_dict().items()}


def wrapped(body: Body, kind: Any, options: dict[str, Any], steps: int, zero: int = 0) -> Any:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh, zero=zero, bucket_bytes=100)
    optimizer = parallax.optimizer(model, kind, **options)
    try:
        for step in range(steps):
            body(model, optimizer, batch(mesh.rank, step), step)
    except (ConfigError, RuntimeError) as error:
        return str(error)
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(found: Any, expected: dict[str, Tensor]) -> None:
    assert isinstance(found, dict), found
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=name)


def assigns(model: Any, optimizer: Any, x: Tensor, step: int) -> None:
    """Masks, gradient surgery, a gradient that is dropped, as in DINO; then a clip."""
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("0.weight"):
            parameter.grad = parameter.grad * 0.5
        elif name.endswith("0.bias"):
            parameter.grad.data = parameter.grad.data.clamp(min=0.0)
        elif name.endswith("3.weight") and step < 2:
            parameter.grad = None
    if hasattr(optimizer, "clip_grad_norm_") and step % 2:
        optimizer.clip_grad_norm_(0.05)
    else:
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    optimizer.zero_grad()


def by_hand(model: Any, optimizer: Any, x: Tensor, step: int) -> None:
    """A step that is skipped, its gradients dropped without zero_grad."""
    model(x).square().mean().backward()
    if step != 1:
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None


def own(model: Any, optimizer: Any, x: Tensor, step: int) -> None:
    """A gradient that the script computes itself, before the backward."""
    module = getattr(model, "module", model)
    module[0].bias.requires_grad_(False)
    module[0].bias.grad = torch.full((6,), float(x.detach().mean()), dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


SGD = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1})


@pytest.mark.parametrize("body", [assigns, by_hand, own])
def test_the_step_takes_what_the_script_left_in_grad(ranks, body: Body):
    expected = plain(body, *SGD, 4)
    for found in ranks(2, wrapped, body, *SGD, 4, timeout_s=60):
        same(found, expected)


def assigns_where_cut(model: Any, optimizer: Any, x: Tensor, step: int) -> None:
    model(x).square().mean().backward()
    module = model.module
    module[3].weight.grad = torch.zeros(2, 6, dtype=torch.float64)
    optimizer.clip_grad_norm_(1.0)
    module[0].weight.grad = torch.ones(6, 4, dtype=torch.float64)
    optimizer.step()


@pytest.mark.parametrize("zero", [1, 3])
def test_a_gradient_is_not_assigned_where_ranks_have_parts(ranks, zero: int):
    first, second = ranks(2, wrapped, assigns_where_cut, *SGD, 1, zero, timeout_s=60)
    assert first == second and "0.weight.grad was assigned" in first and "with zero=0" in first


@dataclasses.dataclass
class Answer:
    logits: Tensor


class Odd(nn.Module):
    """What torch's pytree cannot open, a loss that is no forward, a parameter that is returned."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how = net(), how

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        return Answer(y) if self.how == "dataclass" else (y, self.net[0].weight) if self.how == "leaf" else y

    def loss(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


def trained(how: str, model: Any, optimizer: Any, rank: int | None) -> tuple[dict[str, Tensor], int]:
    """Three steps that torch clips, whichever way the backward takes. On both ranks' batches where rank is None."""
    module: Odd = getattr(model, "module", model)
    apart = model.accumulate if rank is not None else contextlib.nullcontext
    for step in range(3):
        x = torch.cat([batch(part, step) for part in ([rank] if rank is not None else [0, 1])])
        model.train(how != "eval")
        if how == "method":
            module.loss(x).backward()
        elif how == "retain":
            with apart():
                y = model(x)
                y.square().mean().backward(retain_graph=True)
            y.abs().mean().backward()
        elif how == "unused":
            model(x)
            with apart():
                model(2 * x).square().mean().backward()
            model(x).square().mean().backward()
        elif how == "late":
            y = model(x)
            with apart():
                model(2 * x).square().mean().backward()
            y.square().mean().backward()
        elif how == "of inputs":
            x.requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().mean(), x)
            model(x.detach() + 0.1 * slope.sign()).square().mean().backward()
        elif how == "leaf":
            model(x)
            with apart():
                y, weight = model(x)
                (y.square().mean() + weight.square().mean()).backward()
            y, weight = model(x)
            (y.square().mean() + weight.square().mean()).backward()
        else:
            y = model(x)
            (y.logits if how == "dataclass" else y).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    hooks = len(module.net[0].weight._backward_hooks or ())
    return {name: value.clone() for name, value in model.state_dict().items()}, hooks


def trained_on_ranks(how: str) -> tuple[dict[str, Tensor], int]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(Odd(how), mesh, bucket_bytes=100)
    return trained(how, model, parallax.optimizer(model, torch.optim.SGD, lr=0.1), mesh.rank)


WAYS = ["forward", "eval", "dataclass", "method", "retain", "unused", "late", "of inputs", "leaf"]


@pytest.mark.parametrize("how", WAYS)
def test_gradients_are_reduced_when_backward_returns(ranks, how: str):
    module = Odd(how)
    expected, _ = trained(how, module, torch.optim.SGD(module.parameters(), lr=0.1), None)
    for found, hooks in ranks(2, trained_on_ranks, how, timeout_s=60):
        same(found, expected)
        assert hooks == 0, "no hook stays on a parameter that a forward returns"


def one_rank_without(how: str) -> str:
    """The last rank's loss does not depend on the model."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    y = model(batch(mesh.rank, 0))
    loss = torch.zeros((), requires_grad=True) if mesh.rank else y.square().mean()
    loss.backward()
    if how == "synchronize":
        optimizer.synchronize()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return str([float(p.detach().norm()) for p in model.parameters()])


def test_a_rank_without_gradients_steps_behind_no_clip(ranks):
    first, second = ranks(2, one_rank_without, "step", timeout_s=60)
    assert "no gradient reached" in second and "optimizer.synchronize()" in second and "[" in first
    first, second = ranks(2, one_rank_without, "synchronize", timeout_s=60)
    assert first == second and "[" in first


def test_who_looks_at_gradients_that_add_up_is_told():
    model = parallax.data_parallel(net(), init_mesh("1x1x1", device_type="cpu"))
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with model.accumulate():
        model(batch(0, 0)).square().mean().backward()
    with pytest.warns(UserWarning, match="while gradients add up"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    with pytest.warns(UserWarning, match="while gradients add up"):
        dict(model.named_parameters())
    optimizer.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(model.parameters())


def sent_by_groups() -> list[dict[str, int]]:
    """Over the copies of a shard, in a step and in what drops gradients."""
    mesh = init_mesh("4x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh, zero=1, shard_size=2)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    copies, sent = model.sync.replicas, []
    for act in (lambda: model(batch(mesh.rank, 0)).square().mean().backward(), optimizer.step, model.zero_grad):
        before = dict(copies.traffic)
        act()
        sent.append({kind: n - before.get(kind, 0) for kind, n in copies.traffic.items() if n != before.get(kind, 0)})
    return sent


def test_who_drops_gradients_sends_nothing(ranks):
    for backward, step, dropped in ranks(4, sent_by_groups, timeout_s=60):
        assert list(backward) == ["all_reduce"] and not step and not dropped


def test_a_narrow_gradient_may_be_assigned():
    """Of the parameter's own dtype, where the gradients that are reduced are wider."""
    model = parallax.data_parallel(net().bfloat16(), init_mesh("1x1x1", device_type="cpu"))
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.5)
    model.module[3].requires_grad_(False)
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(batch(0, 0).bfloat16()).float().square().mean().backward()
        for parameter in model.module[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved = {name: (before[name] - p).detach().float() for name, p in model.named_parameters()}
        torch.testing.assert_close(moved["module.0.bias"], torch.full((6,), 0.5), rtol=0.02, atol=0)
        assert not moved["module.3.bias"].any()
