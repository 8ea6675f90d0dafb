"""What a script changes in a module after it was wrapped: new memory, new parameters, frozen ones."""

from __future__ import annotations

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

ONE = "1x1x1"


def halve(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data * 0.5


def by_vector(module: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector * 0.5, module.parameters())


def by_assign(module: nn.Module) -> None:
    module.load_state_dict({name: value * 0.5 for name, value in module.state_dict().items()}, assign=True)


def new_head(module: Any) -> None:
    module[3] = nn.Linear(6, 2).double()


CHANGES = {"data": halve, "vector": by_vector, "assign": by_assign, "head": new_head}


def run(change: Callable[[Any], None], when: str, wrapped: bool) -> dict[str, Tensor]:
    module = net()
    model: Any = parallax.data_parallel(module, init_mesh(ONE, device_type="cpu")) if wrapped else module
    make = parallax.optimizer if wrapped else lambda m, kind, **options: kind(m.parameters(), **options)
    optimizer = make(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    for step in range(4):
        if step == 1 and when == "before":
            change(module)
        model(batch(0, step)).square().mean().backward()
        if step == 1 and when == "after":
            change(module)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("change", [halve, by_vector])
@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_take_in_what_was_assigned(change: Callable[[Any], None], when: str):
    expected = run(change, when, wrapped=False)
    for name, value in run(change, when, wrapped=True).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14, msg=name)


def refused(zero: int, how: str, when: str) -> str:
    mesh = init_mesh("2x1x1", device_type="cpu")
    module = net()
    model = parallax.data_parallel(module, mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    try:
        for step in range(2):
            if when == "before":
                CHANGES[how](module)
            model(batch(mesh.rank, step)).square().mean().backward()
            if when == "after":
                CHANGES[how](module)
            elif when == "saved":
                CHANGES[how](module)
                model.state_dict()
            optimizer.step()
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("zero", "how", "when", "text"),
    [
        (0, "assign", "before", "0.weight is not the parameter that was wrapped"),
        (0, "head", "after", "3.weight is not the parameter that was wrapped"),
        (1, "data", "before", "was given other memory .* with zero=1"),
        (2, "vector", "after", "was given other memory .* with zero=2"),
        (3, "head", "before", "3.weight is not the parameter that was wrapped"),
        (3, "data", "before", "was given other memory .* with zero=3"),
        (3, "vector", "after", "was given other memory .* with zero=3"),
        (3, "data", "saved", "was given other memory .* with zero=3"),
    ],
)
def test_what_nothing_would_train_is_refused_by_name(ranks, zero: int, how: str, when: str, text: str):
    first, second = ranks(2, refused, zero, how, when, timeout_s=60)
    assert first == second
    with pytest.raises(ConfigError, match=text):
        raise ConfigError(first)
    assert "model.load_state_dict(state)" in first and "`model.unwrap()`" in first


def test_narrow_parameters_with_masters_take_in_nothing():
    module = net().bfloat16()
    model = parallax.data_parallel(module, init_mesh(ONE, device_type="cpu"))
    halve(module)
    with pytest.raises(ConfigError, match="torch.bfloat16 is not what the optimizer updates"):
        model(batch(0, 0).bfloat16())


OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "dampened": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
}


def frozen(kind: str, spans: list[int], zero: int | None, rank: int, dtype: torch.dtype = torch.float64) -> Any:
    """The first layer is frozen in the steps of `spans`. The state, and what was said; one process without zero."""
    module = net().to(dtype)
    make, options = OPTIMIZERS[kind]
    model: Any = module
    if zero is None:
        optimizer: Any = make(module.parameters(), **options)
    else:
        model = parallax.data_parallel(module, init_mesh("2x1x1", device_type="cpu"), zero=zero)
        optimizer = parallax.optimizer(model, make, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(6):
            module[0].requires_grad_(step not in spans)
            for part in [rank] if zero is not None else [0, 1]:
                loss = model(batch(part, step).to(dtype)).square().mean()
                (loss if zero is not None else loss / 2).backward()
            if zero is not None:
                optimizer.clip_grad_norm_(0.3)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return state, [str(w.message) for w in caught if "left out" in str(w.message)]


@pytest.mark.parametrize("whole", [False, True])
def test_what_was_left_out_is_known_after_a_restart(whole: bool):
    mesh = init_mesh("1x1x1", device_type="cpu")

    def begin() -> tuple[Any, Any]:
        model = parallax.data_parallel(net(), mesh)
        return model, parallax.optimizer(model, torch.optim.AdamW, lr=0.01)

    def step(model: Any, optimizer: Any) -> None:
        model(batch(0, 0)).square().mean().backward()
        optimizer.step()

    model, optimizer = begin()
    model.module[0].requires_grad_(False)
    with pytest.warns(UserWarning, match="left out"):
        step(model, optimizer)
    saved = optimizer.whole_state_dict() if whole else optimizer.state_dict()
    again, its = begin()
    its.load_state_dict(saved)
    with pytest.raises(ConfigError, match="0.bias was left out of 1 steps"):
        step(again, its)
    its.load_state_dict(begin()[1].state_dict())  # of one that left out nothing
    step(*begin())
    again.zero_grad()
    step(again, its)


def frozen_on_ranks(kind: str, spans: list[int], zero: int) -> Any:
    mesh = init_mesh("2x1x1", device_type="cpu")
    try:
        return frozen(kind, spans, zero, mesh.rank)
    except ConfigError as error:
        return {}, [str(error)]


@pytest.mark.parametrize(("kind", "spans"), [("sgd", [0, 1, 3]), ("adamw", [2, 3, 4, 5])])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_parameter_frozen_after_the_wrap_stays(ranks, kind: str, spans: list[int], zero: int):
    expected, _ = frozen(kind, spans, None, 0)
    for state, said in ranks(2, frozen_on_ranks, kind, spans, zero, timeout_s=60):
        for name, values in expected.items():
            torch.testing.assert_close(state[name], values, rtol=1e-9, atol=1e-11, msg=f"{name} zero={zero}")
        assert len(said) == (kind == "adamw")
        assert all("0.weight" in text or "0.bias" in text and "it must stay so" in text for text in said)


@pytest.mark.parametrize("kind", ["adamw", "dampened"])
@pytest.mark.parametrize("zero", [0, 2])
def test_it_does_not_come_back_to_an_optimizer_that_counts(ranks, kind: str, zero: int):
    first, second = ranks(2, frozen_on_ranks, kind, [0, 1], zero, timeout_s=60)
    assert first == second and "was left out of 2 steps" in first[1][0] and "`model.unwrap()`" in first[1][0]
