"""The optimizer of a wrapped module, on one rank: weight decay, and what it refuses."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from parallax.tensor.plan import shard_module


def wrapped(**options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    return parallax.data_parallel(net, init_mesh("1x1x1", device_type="cpu"), **options)


DECAYING = {
    "its own default": (torch.optim.AdamW, {}),
    "written out": (torch.optim.AdamW, {"weight_decay": 0.01}),
    "a partial": (functools.partial(torch.optim.AdamW, weight_decay=0.01), {}),
    "a function": (lambda groups, **options: torch.optim.SGD(groups, weight_decay=0.01, **options), {}),
}


@pytest.mark.parametrize("how", DECAYING)
def test_no_decay_holds_wherever_the_weight_decay_comes_from(how: str):
    kind, options = DECAYING[how]
    model = wrapped(no_decay=["*bias"])
    optimizer = parallax.optimizer(model, kind, lr=1.0, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (model(torch.zeros(1, 4)) * 0).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (1.0 if name.endswith("bias") else 0.99), msg=name)


def test_an_optimizer_without_weight_decay_gets_none():
    make: Callable[..., torch.optim.Optimizer] = torch.optim.Rprop
    optimizer = parallax.optimizer(wrapped(no_decay=["*bias"]), make, lr=0.1)
    assert all("weight_decay" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_and_leaves_all_optimizers_as_they_were(copied: Callable[[Any], Any]):
    model = wrapped()
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match="neither copied nor pickled; keep optimizer.whole_state_dict"):
        copied(optimizer)
    before = model.state_dict()["0.bias"]
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert not before.equal(model.state_dict()["0.bias"])


def test_hooks_on_state_dicts_are_called_as_torchs_are():
    called: list[str] = []

    def on(optimizer: Any) -> None:
        optimizer.register_state_dict_pre_hook(lambda o: called.append("save"))
        optimizer.register_state_dict_pre_hook(lambda o: called.append("first"), prepend=True)
        optimizer.register_state_dict_post_hook(lambda o, state: state | {"mine": 1})
        optimizer.register_load_state_dict_pre_hook(lambda o, state: called.append(f"load {state.pop('mine')}"))
        optimizer.register_load_state_dict_post_hook(lambda o: called.append("loaded")).remove()
        optimizer.register_load_state_dict_post_hook(lambda o: called.append("done"))
        optimizer.load_state_dict(optimizer.state_dict())

    on(parallax.optimizer(wrapped(), torch.optim.SGD, lr=0.1))
    ours, called = called, []
    on(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    assert ours == called == ["first", "save", "load 1", "done"]


NAMES = (
    "FusedLAMB NovoGrad Prodigy DistributedShampoo SAM ESAM SAMWrapper AdamP KFAC LARSWrapper DAdaptAdam SOAP Adam_mini"
)


@pytest.mark.parametrize("name", NAMES.split())
def test_an_optimizer_that_looks_at_whole_tensors_is_refused(name: str):
    named = type(name, (torch.optim.AdamW,), {})
    model = wrapped()
    for kind in (named, type("Mine", (named,), {}), functools.partial(named), lambda groups, **o: named(groups, **o)):
        with pytest.raises(ConfigError, match=rf"{name} does not treat each.*elementwise=True"):
            parallax.optimizer(model, kind, lr=0.1)
        optimizer = parallax.optimizer(model, kind, lr=0.1, elementwise=True)
        assert optimizer.defaults["lr"] == 0.1


@pytest.mark.parametrize("name", ["Lion", "Adan", "AdamW8bit", "NAdam", "Sample", "Sophia", "MADGRAD", "AdaBelief"])
def test_an_optimizer_of_another_name_is_taken(name: str):
    parallax.optimizer(wrapped(), type(name, (torch.optim.SGD,), {}), lr=0.1)


@pytest.mark.parametrize("no_decay", [(), ("0.bias",)])
def test_what_shard_module_cuts_decays_as_torch_has_it(no_decay: tuple[str, ...]):
    torch.manual_seed(0)
    mesh = init_mesh("1x1x1", device_type="cpu")
    net = shard_module(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), {"0": "column", "2": "row"}, mesh.tensor
    )
    model = parallax.data_parallel(net, mesh, no_decay=no_decay)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=1.0, weight_decay=0.1)
    before = model.state_dict()
    (model(torch.zeros(1, 4)) * 0).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] * (1.0 if name in no_decay else 0.9), msg=name)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps, torch.optim.swa_utils.AveragedModel])
def test_a_copy_of_the_wrapped_module_is_refused_with_what_to_copy(copied: Callable[[Any], Any]):
    with pytest.raises(ConfigError, match=r"neither copied nor pickled; .*copy.deepcopy\(model.module\)"):
        copied(wrapped())
