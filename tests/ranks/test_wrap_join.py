"""Ranks with different numbers of batches: what goes on while some have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(6) if norm else nn.Identity()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Tanh(), nn.Linear(6, 2)).double()


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64)


def clipped(zero: int) -> dict[str, Tensor]:
    """Rank r has 1 + 2r batches, and clips."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with model.join(optimizer):
        for step in range(1 + 2 * mesh.rank):
            model(batch(mesh.rank, step)).square().mean().backward()
            optimizer.clip_grad_norm_(0.01)
            optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("zero", [0, 1])
def test_a_rank_without_batches_clips_with_the_others(ranks, zero: int):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        here = [0, 1] if step == 0 else [1]
        for rank in here:
            (model(batch(rank, step)).square().mean() / len(here)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2, clipped, zero, timeout_s=60):
        for name, values in model.state_dict().items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=name)


def statistics() -> tuple[int, Tensor]:
    """Rank 0 has one batch, rank 1 four."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(norm=True), mesh)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with model.join(optimizer):
        for step in range(1 + 3 * mesh.rank):
            model(batch(mesh.rank, step)).square().mean().backward()
            optimizer.step()
    norm = model.module[1]
    return int(norm.num_batches_tracked), norm.running_mean


def test_batch_statistics_go_on_when_the_first_rank_has_no_batches(ranks):
    (count, mean), (other_count, other_mean) = ranks(2, statistics)
    assert count == other_count == 4
    assert mean.equal(other_mean)


def saved_by_one(zero: int) -> dict[str, Tensor]:
    """A script for DDP: the first rank saves and the others go on."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(norm=True), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    state: dict[str, Tensor] = {}
    for step in range(3):
        model(batch(mesh.rank, step)).square().mean().backward()
        optimizer.step()
        if mesh.rank == 0 and step == 1:
            state = model.state_dict()
    return state or model.state_dict()


@pytest.mark.parametrize("zero", [0, 2])
def test_one_rank_may_save_below_level_3(ranks, zero: int):
    saved, after = ranks(2, saved_by_one, zero, timeout_s=60)
    assert int(saved["1.num_batches_tracked"]) == 2
    assert int(after["1.num_batches_tracked"]) == 3


def uneven(how: str) -> Any:
    """Rank r has 1 + 2r batches; the script itself changes gradients, without a word to the optimizer."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    if how == "eval":
        model.eval()
    try:
        with model.join(optimizer):
            for step in range(1 + 2 * mesh.rank):
                model(batch(mesh.rank, step)).square().mean().backward()
                changed(how, model, optimizer)
                optimizer.step()
    except ValueError as error:
        return str(error)
    return model.state_dict()


def changed(how: str, model: Any, optimizer: Any) -> None:
    if how == "dropped":
        model.module[0].weight.grad = None
        return
    if how == "assigned":
        model.module[0].weight.grad = model.module[0].weight.grad * 0.1
        if not isinstance(optimizer, torch.optim.SGD):
            optimizer.clip_grad_norm_(0.02)
            return
    nn.utils.clip_grad_norm_(model.parameters(), 0.01 if how != "assigned" else 0.02)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = net()


@pytest.mark.parametrize("how", ["clipped", "assigned", "eval"])
def test_a_rank_without_batches_follows_what_a_script_does_to_gradients(ranks, how: str):
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        here = [0, 1] if step == 0 else [1]
        for rank in here:
            (model.module(batch(rank, step)).square().mean() / len(here)).backward()
        changed(how, model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2, uneven, how, timeout_s=60):
        for name, values in model.module.state_dict().items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=name)


def test_a_gradient_that_is_none_cannot_be_followed(ranks):
    first, second = ranks(2, uneven, "dropped", timeout_s=60)
    assert first == second and "set to None" in first


def test_one_join_at_a_time():
    mesh = init_mesh("1x1x1", device_type="cpu")
    first, second = (parallax.data_parallel(net(), mesh) for _ in range(2))
    optimizers = [parallax.optimizer(model, torch.optim.SGD, lr=0.1) for model in (first, second)]
    under_way = pytest.raises(ConfigError, match="a join over these ranks is under way")
    with first.join(optimizers[0]), under_way, second.join(optimizers[1]):
        pass
    with second.join(optimizers[1]):
        pass


def with_a_rest(zero: int) -> dict[str, Tensor]:
    """Two backwards a step; rank 0 has three batches, of which the last makes no step, rank 1 four."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    with model.join(optimizer):
        for step in range(3 + mesh.rank):
            if step % 2:
                model(batch(mesh.rank, step)).square().mean().backward()
                optimizer.step()
            else:
                with model.accumulate():
                    model(batch(mesh.rank, step)).square().mean().backward()
    return model.state_dict()


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_what_a_rank_had_left_over_goes_into_nobody_s_step(ranks, zero: int):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for steps, here in (((0, 1), (0, 1)), ((2, 3), (1,))):
        for step in steps:
            for rank in here:
                (model(batch(rank, step)).square().mean() / len(here)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for found in ranks(2, with_a_rest, zero, timeout_s=60):
        for name, values in model.state_dict().items():
            torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=name)


def with_a_forward_too_many(zero: int) -> tuple[dict[str, Tensor], int]:
    """Rank 0 looks at its last loss and goes no further, as one does where it is not finite; rank 1 goes on."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    done = 0
    with model.join(optimizer):
        for step in range(3):
            loss = model(batch(mesh.rank, step)).square().mean()
            if mesh.rank == 0 and step == 1:
                break
            loss.backward()
            optimizer.step()
            done += 1
    return model.state_dict(), done


@pytest.mark.parametrize("zero", [0, 1])
def test_a_forward_without_a_backward_keeps_nobody_waiting(ranks, zero: int):
    (ours, few), (theirs, many) = ranks(2, with_a_forward_too_many, zero, timeout_s=60)
    assert (few, many) == (1, 3)
    assert all(values.equal(theirs[name]) for name, values in ours.items())


def with_a_step_skipped() -> str:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    try:
        with model.join(optimizer):
            for step in range(1 + 2 * mesh.rank):
                model(batch(mesh.rank, step)).square().mean().backward()
                if mesh.rank == 1 and step == 1:
                    model.zero_grad()
                    continue
                optimizer.step()
    except (ConfigError, RuntimeError) as error:
        return str(error)
    return ""


def test_a_step_that_others_wait_for_is_not_dropped(ranks):
    assert "wait for a step after this backward" in ranks(2, with_a_step_skipped, timeout_s=60)[1]


def after_a_join_that_failed() -> bool:
    mesh = init_mesh("1x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    model.unwrap()
    with pytest.raises(ConfigError, match="unwrapped"), model.join(optimizer):
        pass
    again = parallax.data_parallel(net(), mesh)
    with again.join(parallax.optimizer(again, torch.optim.SGD, lr=0.1)):
        pass
    return True


def test_a_join_that_cannot_begin_leaves_no_trace():
    assert after_a_join_that_failed()
