"""What scripts do with a wrapped model besides training it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from tests.ranks.test_wrap_join import batch, net


def clipped_by_torch(zero: int, dtype: torch.dtype) -> tuple[float, float, list[str], bool]:
    """torch's norm, ours, the warnings, and whether torch's clip has clipped what ours measures."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net().to(dtype), mesh, zero=zero)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    for step in range(2):
        model(batch(mesh.rank, step).to(dtype)).square().mean().backward()
        ours = optimizer.clip_grad_norm_(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            theirs = float(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
        clipped = optimizer.clip_grad_norm_(0) < 0.0101
        optimizer.step()
    return theirs, ours, [str(w.message) for w in caught], clipped


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_own_clip_clips_or_says_that_it_cannot(ranks, dtype: torch.dtype):
    for theirs, ours, said, clipped in ranks(2, clipped_by_torch, 0, dtype):
        assert theirs == pytest.approx(ours, rel=1e-5) and clipped and not said
    for zero in (1, 2):
        for theirs, _, said, clipped in ranks(2, clipped_by_torch, zero, dtype):
            assert theirs == 0.0 and not clipped and "optimizer.clip_grad_norm_" in said[0]


class Opaque:
    def __init__(self, x: Tensor) -> None:
        self.x = x


class OpaqueBlock(nn.Linear):
    def forward(self, x: Tensor | Opaque) -> Opaque:  # type: ignore[override]
        return Opaque(super().forward(x.x if isinstance(x, Opaque) else x))


def outside_of_their_block() -> dict[str, object]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(net(), mesh, zero=3)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    found: dict[str, object] = {}
    for step in range(2):
        model(batch(mesh.rank, step)).square().mean().backward()
        optimizer.step()
        found["read"] = float(model.module[0].weight.norm())
    with model.gathered():
        found["gathered"] = float(model.module[0].weight.norm())
    parent = nn.Module()
    parent.inner = model
    found["state"] = {name: float(value.norm()) for name, value in parent.state_dict().items()}
    found["metadata"] = parent.state_dict()._metadata["inner.0"]["version"]
    opaque = parallax.data_parallel(nn.Sequential(OpaqueBlock(4, 4), OpaqueBlock(4, 4)), mesh, zero=3)
    try:
        opaque(torch.ones(1, 4))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def test_zero_3_survives_who_reads_outside_of_a_block(ranks):
    for found in ranks(2, outside_of_their_block, timeout_s=60):
        assert found["read"] != found["read"], "a parameter that is not here reads as NaN"
        assert found["state"]["inner.0.weight"] == found["gathered"] > 0
        assert len(found["state"]) == 4 and found["metadata"] == 1
        assert "block 0 through a Opaque" in found["refused"] and "gather='step'" in found["refused"]


def dropped_by_the_model() -> tuple[float, float]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    norms = []
    for drops in (True, False):
        model = parallax.data_parallel(net(), mesh)
        optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
        if drops:
            with model.accumulate():
                model(100 * batch(mesh.rank, 0)).square().mean().backward()
            model.zero_grad()
        model(batch(mesh.rank, 1)).square().mean().backward()
        norms.append(optimizer.clip_grad_norm_(0))
    return norms[0], norms[1]


def test_the_models_zero_grad_drops_what_was_accumulated(ranks):
    for dropped, fresh in ranks(2, dropped_by_the_model):
        assert dropped == fresh


def resumed(zero: int, optimizer_first: bool) -> list[Tensor]:
    """The masters after 6 steps, without and with a restart after 3."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    found = []
    for restarts in (False, True):
        model = parallax.data_parallel(net().bfloat16(), mesh, zero=zero)
        optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=1e-3)
        for step in range(6):
            model(batch(mesh.rank, step).bfloat16()).float().square().mean().backward()
            optimizer.step()
            if restarts and step == 2:
                saved = model.state_dict(), copy.deepcopy(optimizer.state_dict())
                model = parallax.data_parallel(net().bfloat16(), mesh, zero=zero)
                optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=1e-3)
                loads = [(model, saved[0]), (optimizer, saved[1])]
                for target, state in reversed(loads) if optimizer_first else loads:
                    target.load_state_dict(state)
        found.append(torch.cat([m.flatten() for m in optimizer.whole_state_dict()["masters"].values()]))
    return found


@pytest.mark.parametrize(("zero", "optimizer_first"), [(0, False), (0, True), (3, False)])
def test_a_bfloat16_run_resumes_bit_for_bit(ranks, zero: int, optimizer_first: bool):
    for whole, with_restart in ranks(2, resumed, zero, optimizer_first):
        assert whole.equal(with_restart) and whole.dtype == torch.float32


def scaled() -> tuple[list[Tensor], list[float], str]:
    """With torch's GradScaler, ours and DDP's; on one rank alone the gradients of step 1 overflow."""
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_mesh("2x1x1", device_type="cpu")
    states, scales = [], []
    for ours in (True, False):
        model = parallax.data_parallel(net().float(), mesh) if ours else DistributedDataParallel(net().float())
        make = parallax.optimizer if ours else lambda m, kind, **options: kind(m.parameters(), **options)
        optimizer = make(model, torch.optim.SGD, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            optimizer.zero_grad()
            loss = model(batch(mesh.rank, step).float()).square().mean()
            scaler.scale(loss * (float("inf") if step == mesh.rank == 1 else 1.0)).backward()
            if step > 1:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
        states.append(torch.cat([p.detach().flatten() for p in model.module.parameters()]))
        scales.append(scaler.get_scale())
    model = parallax.data_parallel(net().float(), mesh, zero=1)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batch(0, 0).float()).mean()).backward()
    try:
        scaler.step(optimizer)
    except ValueError as error:
        return states, scales, str(error)
    return states, scales, ""


def test_a_grad_scaler_works_on_whole_gradients(ranks):
    for (ours, theirs), scales, refused in ranks(2, scaled):
        torch.testing.assert_close(ours, theirs)
        assert scales == [512.0, 512.0]
        assert "zero=1" in refused and "use zero=0" in refused


ONE = "1x1x1"


def test_a_module_on_meta_is_refused():
    with torch.device("meta"):
        module = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="weight is on the meta device .*to_empty"):
        parallax.data_parallel(module, init_mesh(ONE, device_type="cpu"))


def test_sparse_gradients_are_refused():
    module = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    with pytest.raises(ConfigError, match="0 has sparse gradients"):
        parallax.data_parallel(module, init_mesh(ONE, device_type="cpu"))


def test_what_is_unfrozen_after_wrapping_is_named():
    module = net()
    module[0].requires_grad_(False)
    model = parallax.data_parallel(module, init_mesh(ONE, device_type="cpu"))
    model(batch(0, 0))
    module[0].requires_grad_(True)
    model.zero_grad()
    model.begin_step()
    with pytest.raises(ConfigError, match="0.weight was frozen"):
        model(batch(0, 0))


def test_a_wrapped_module_is_not_converted():
    model = parallax.data_parallel(net(), init_mesh(ONE, device_type="cpu"))
    assert model.to("cpu") is model and model.double() is model
    with pytest.raises(ConfigError, match="stays torch.float64 on cpu"):
        model.float()
    with pytest.raises(ConfigError, match="stays torch.float64 on cpu"):
        nn.Sequential(model).float()
    model.module.float()
    with pytest.raises(ConfigError, match="were torch.float64 when wrapped"):
        model(batch(0, 0).float())


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon, torch.optim.LBFGS, torch.optim.SparseAdam])
def test_an_optimizer_that_is_not_elementwise_is_refused(kind: type[torch.optim.Optimizer]):
    model = parallax.data_parallel(nn.Linear(4, 4), init_mesh(ONE, device_type="cpu"))
    with pytest.raises(ConfigError, match=f"{kind.__name__} does not treat each element"):
        parallax.optimizer(model, kind, lr=0.1)


def test_step_hooks_are_called_and_other_parameters_refused():
    model = parallax.data_parallel(net().bfloat16(), init_mesh(ONE, device_type="cpu"))
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    seen: list[Tensor] = []
    keep = lambda *_: seen.append(model.module[0].weight.detach().clone())  # noqa: E731
    handles = [optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(keep)]
    for _ in range(2):
        model(batch(0, 0).bfloat16()).square().mean().backward()
        optimizer.step()
        for handle in handles:
            handle.remove()
    before, after = seen
    assert not before.equal(after)
    with pytest.raises(ConfigError, match="add others to the module"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
