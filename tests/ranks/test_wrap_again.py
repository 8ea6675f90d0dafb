"""Who owns a parameter, and what may become of it while it is wrapped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from tests.ranks.test_wrap_join import batch, net

ONE = "1x1x1"


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def wrapped_again(zero: int) -> tuple[dict[str, Tensor], list[str], int]:
    """The head alone, then all: what plain torch does with requires_grad and a new optimizer."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    module = net()
    module[0].requires_grad_(False)
    model = parallax.data_parallel(module, mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    trained(model, optimizer, mesh.rank, range(2))
    module.requires_grad_(True)
    said = []
    for attempt in (lambda: parallax.data_parallel(module, mesh, zero=zero), lambda: model(batch(0, 0))):
        try:
            attempt()
        except ConfigError as error:
            said.append(str(error))
    assert model.unwrap() is module
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    hooks += sum(len(p._post_accumulate_grad_hooks or ()) for p in module.parameters())
    for use in (lambda: model(batch(0, 0)), optimizer.step, model.state_dict):
        try:
            use()
        except ConfigError as error:
            said.append(str(error))
    again = parallax.data_parallel(module, mesh, zero=zero)
    trained(again, parallax.optimizer(again, torch.optim.SGD, lr=0.1), mesh.rank, range(2, 4))
    state = {name: value.clone() for name, value in again.unwrap().state_dict().items()}
    return state, said, hooks


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_module_that_is_unwrapped_is_wrapped_again(ranks, zero: int):
    module = net()
    module[0].requires_grad_(False)
    for steps in (range(2), range(2, 4)):
        momentum = 0.9 if steps.start == 0 else 0.0
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1, momentum=momentum)
        for step in steps:
            for rank in range(2):
                (module(batch(rank, step)).square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        module.requires_grad_(True)
    for state, said, hooks in ranks(2, wrapped_again, zero, timeout_s=60):
        for name, values in module.state_dict().items():
            torch.testing.assert_close(state[name], values, rtol=1e-9, atol=1e-12, msg=f"{name} zero={zero}")
        assert "3.weight is wrapped already" in said[0] and "`model.unwrap()`" in said[0]
        assert "0.weight was frozen" in said[1] and "wrap `model.unwrap()` again" in said[1]
        assert len(said) == 5 and all("was unwrapped" in text for text in said[2:])
        assert hooks == 0


@pytest.mark.parametrize("zero", [0, 3])
def test_a_parameter_is_of_one_wrapped_module_alone(zero: int):
    mesh = init_mesh(ONE, device_type="cpu")
    trunk = nn.Linear(4, 4)
    actor, critic = nn.Sequential(trunk, nn.Linear(4, 2)), nn.Sequential(trunk, nn.Linear(4, 1))
    model = parallax.data_parallel(actor, mesh, zero=zero)
    with pytest.raises(ConfigError, match="0.weight is wrapped already, .* wrap one module that holds both"):
        parallax.data_parallel(critic, mesh, zero=zero)
    with pytest.raises(ConfigError, match="module.0.weight is wrapped already"):
        parallax.data_parallel(model, mesh, zero=zero)
    model.unwrap()
    parallax.data_parallel(nn.ModuleDict({"actor": actor, "critic": critic}), mesh, zero=zero)


def test_what_is_unwrapped_has_memory_of_its_own():
    module = net().bfloat16()
    before = [p.detach().clone() for p in module.parameters()]
    model = parallax.data_parallel(module, init_mesh(ONE, device_type="cpu"))
    model(batch(0, 0).bfloat16()).float().mean().backward()
    model.unwrap()
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == len(before)
    assert all(p.equal(b) and p.grad is None for p, b in zip(module.parameters(), before, strict=True))
    module(batch(0, 0).bfloat16()).float().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in module.parameters())


def unwrapped_within(zero: int) -> bool:
    module = net()
    before = [p.detach().clone() for p in module.parameters()]
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(module, mesh, zero=zero)
    with model.gathered():
        model.unwrap()
    same = all(p.equal(b) for p, b in zip(module.parameters(), before, strict=True))
    model = parallax.data_parallel(module, mesh, zero=zero)
    model(batch(0, 0))
    with model.accumulate():
        model.unwrap()
    module(batch(0, 0)).mean().backward()
    return same and all(p.equal(b) for p, b in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_module_may_be_unwrapped_where_it_is_gathered(ranks, zero: int):
    assert ranks(2, unwrapped_within, zero, timeout_s=60) == [True, True]
