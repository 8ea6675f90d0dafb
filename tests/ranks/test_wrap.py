"""Any module, three lines: against one process that sees every rank's batch, and against torch's own DDP."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.errors import ConfigError
from parallax.mesh import init_mesh


class Blocks(nn.Module):
    """What makes a wrapper's life hard: a shared weight, parallel towers, buffers, a part that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(3)])
        self.towers = nn.ModuleList([nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)])
        self.norm = nn.BatchNorm1d(8)
        self.unused = nn.Linear(8, 3)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, use_all: bool = False) -> Tensor:
        h = self.embedding(x)
        for layer in self.layers:
            h = h + layer(h)
        left, right = (tower(h, h, h, need_weights=False)[0] for tower in self.towers)
        h = self.norm((h + left * right.tanh()).mean(1))
        return self.head(h) + (self.unused(h).sum() if use_all else 0.0)


def batches(num: int, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randint(0, 11, shape, generator=generator)  # noqa: E731
    return [(draw(size, 6), draw(size)) for _ in range(num)]


def seeded(seed: int) -> Blocks:
    torch.manual_seed(seed)
    return Blocks().double()


def loss_of(model: Any, batch: tuple[Tensor, Tensor], use_all: bool = False) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0], use_all), batch[1])


# The keys' bias has no gradient but rounding, which AdamW with a small epsilon would blow up.
OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
STEPS = 4


def reference(kind: str, num_ranks: int, accumulate: int, clip: float) -> dict[str, Tensor]:
    """One process: the mean of the gradients of all ranks' batches. BatchNorm sees each batch alone, as there."""
    model = seeded(0)
    make, options = OPTIMIZERS[kind]
    optimizer = make(model.parameters(), **options)
    data = batches(STEPS * num_ranks * accumulate)
    for step in range(STEPS):
        buffers = copy.deepcopy(dict(model.named_buffers()))
        first: dict[str, Tensor] = {}
        for rank in range(num_ranks):
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for micro in range(accumulate):
                batch = data[(step * num_ranks + rank) * accumulate + micro]
                (loss_of(model, batch, use_all=step == 2) / num_ranks).backward()
            if rank == 0:
                first = copy.deepcopy(dict(model.named_buffers()))
        for name, buffer in model.named_buffers():
            buffer.copy_(first[name])
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for parameter in model.parameters():  # an unused one counts as zero
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(kind: str, accumulate: int, clip: float, options: dict[str, Any]) -> dict[str, Any]:
    mesh = init_mesh("3x1x1", device_type="cpu")
    model = parallax.data_parallel(seeded(mesh.rank), mesh, bucket_bytes=600, **options)
    make, settings = OPTIMIZERS[kind]
    optimizer = parallax.optimizer(model, make, **settings)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    data = batches(STEPS * 3 * accumulate)
    for step in range(STEPS):
        for micro in range(accumulate):
            batch = data[(step * 3 + mesh.data.rank) * accumulate + micro]
            if micro < accumulate - 1:
                with model.accumulate():
                    loss_of(model, batch, use_all=step == 2).backward()
            else:
                loss_of(model, batch, use_all=step == 2).backward()
        if clip:
            optimizer.clip_grad_norm_(clip)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    state = model.state_dict()
    model.load_state_dict(state)
    again = model.state_dict()
    assert all(value.equal(again[name]) for name, value in state.items())
    model.eval()
    with torch.no_grad():
        assert model(data[0][0]).shape == (4, 11)
    return {"state": state, "traffic": dict(mesh.data.traffic)}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_three_lines_train_any_module(ranks, kind: str):
    for accumulate, clip in [(1, 0.0), (2, 0.05)]:
        expected = reference(kind, 3, accumulate, clip)
        for zero in (0, 1, 2, 3):
            for found in ranks(3, train, kind, accumulate, clip, {"zero": zero}):
                assert found["state"].keys() == expected.keys()
                for name, values in expected.items():
                    torch.testing.assert_close(
                        found["state"][name], values, rtol=1e-9, atol=1e-11, msg=f"{name} zero={zero}"
                    )


def uneven(zero: int) -> dict[str, Any]:
    """Rank r has 2 + r batches; the learning rate changes as they go."""
    mesh = init_mesh("3x1x1", device_type="cpu")
    model = parallax.data_parallel(seeded(0), mesh, zero=zero, broadcast_buffers=False)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    data = batches(12)
    model.module.norm.eval()
    with model.join(optimizer):
        for number in range(2 + mesh.data.rank):
            loss_of(model, data[number * 3 + mesh.data.rank]).backward()
            optimizer.step()
            scheduler.step()
    return {"state": model.state_dict(), "lr": optimizer.param_groups[0]["lr"]}


@pytest.mark.parametrize("zero", [0, 2])
def test_ranks_with_fewer_batches_hang_nobody(ranks, zero: int):
    model = seeded(0)
    model.norm.eval()
    data = batches(12)
    for number in range(4):
        here = [rank for rank in range(3) if number < 2 + rank]
        for rank in here:
            (loss_of(model, data[number * 3 + rank]) / len(here)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.data.sub_(0.1 * 0.5**number * parameter.grad)
                parameter.grad = None
    for found in ranks(3, uneven, zero):
        for name, values in model.state_dict().items():
            torch.testing.assert_close(found["state"][name], values, rtol=1e-9, atol=1e-12, msg=name)


def second_backward() -> str:
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = parallax.data_parallel(nn.Linear(4, 4), mesh)
    parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    try:
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("how", ["memory of its own", "create_graph"])
def test_what_is_done_to_a_gradient_once_changes_no_later_step(how: str):
    """Between backward and step a script may give `param.grad` other memory, or ask for a graph of the gradient."""
    found = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 11)).double()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrapped:
            model = parallax.data_parallel(model, init_mesh("1x1x1", device_type="cpu"))
            optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
        losses = []
        for step in range(5):
            x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            loss = model(x).square().mean()
            loss.backward(create_graph=how == "create_graph" and step == 2)
            if how == "memory of its own" and step == 1:
                for parameter in model.parameters():
                    parameter.grad.data = parameter.grad.data.clamp(-10, 10)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        found.append(losses)
    assert found[1] == pytest.approx(found[0], rel=1e-12)


def test_a_second_backward_without_accumulate_is_an_error(ranks):
    assert all("with model.accumulate()" in text for text in ranks(2, second_backward))


def narrow() -> list[float]:
    """bfloat16 parameters keep float32 masters, also where they are cut."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    found = []
    for zero in (0, 1, 2, 3):
        torch.manual_seed(0)
        model = parallax.data_parallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)).bfloat16(), mesh, zero=zero)
        optimizer = parallax.optimizer(model, torch.optim.SGD, lr=1e-4)
        generator = torch.Generator().manual_seed(mesh.rank)
        for _ in range(20):
            model(torch.rand(8, 64, generator=generator).bfloat16()).float().mean().backward()
            optimizer.step()
        found.append(float(sum(t.detach().double().sum() for t in model.state_dict().values())))
    return found


def test_bfloat16_is_the_same_at_every_level(ranks):
    for found in ranks(2, narrow):
        assert len(set(found)) == 1


def as_scripts_do() -> list[dict[str, Tensor]]:
    """zero_grad between forward and backward, a discarded backward, torch's own clipping: as with DDP."""
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_mesh("2x1x1", device_type="cpu")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    theirs = DistributedDataParallel(copy.deepcopy(plain))
    ours = parallax.data_parallel(plain, mesh, bucket_bytes=100)
    optimizers = [parallax.optimizer(ours, torch.optim.SGD, lr=0.3), torch.optim.SGD(theirs.parameters(), lr=0.3)]
    generator = torch.Generator().manual_seed(mesh.rank)
    for step in range(4):
        x = torch.rand(3, 5, generator=generator, dtype=torch.float64)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            if step == 2:  # looked at and thrown away
                model(x * 3).sum().backward()
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    return [ours.state_dict(), dict(theirs.module.state_dict())]


def test_scripts_written_for_ddp_get_its_numbers(ranks):
    for mine, theirs in ranks(2, as_scripts_do):
        for name, values in theirs.items():
            torch.testing.assert_close(mine[name], values, rtol=1e-12, atol=1e-14, msg=name)


class Frozen(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.blocks[1].requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
        return x * self.scale


def frozen(zero: int) -> dict[str, Tensor]:
    mesh = init_mesh("2x1x1", device_type="cpu")
    torch.manual_seed(3)
    model = parallax.data_parallel(Frozen().double(), mesh, zero=zero, no_decay=["*bias", "scale"])
    optimizer = parallax.optimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    for step in range(3):
        model(torch.full((1, 6), 1.0 + step + mesh.rank, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def test_frozen_parameters_stay_and_weight_decay_keeps_to_its_names(ranks):
    torch.manual_seed(3)
    model = Frozen().double()
    plain = [p for n, p in model.named_parameters() if n.endswith("bias") or n == "scale"]
    decayed = [p for n, p in model.named_parameters() if n.endswith("weight")]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    before = model.blocks[1].weight.clone()
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    for step in range(3):
        for rank in range(2):
            (model(torch.full((1, 6), 1.0 + step + rank, dtype=torch.float64)).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before.equal(model.blocks[1].weight)
    for zero in (0, 1, 3):
        for found in ranks(2, frozen, zero):
            for name, values in model.state_dict().items():
                torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-12, msg=f"{name} zero={zero}")


@pytest.mark.parametrize(
    ("mesh", "options", "text"),
    [
        ("1x1x1", {"zero": 4}, "zero=4 is unknown"),
        ("1x1x1", {"gather": "layer"}, "choose block or step"),
        ("1x1x1", {"shard_size": 2}, "needs zero=1 to 3"),
        ("1x1x1", {"compression": "zip"}, "choose none, float16, bfloat16, powersgd, onebit or topk"),
        ("1x1x1", {"compression": "onebit", "zero": 1}, "zero=1 cuts them; use zero=0"),
        ("1x1x1", {"compression": "topk", "compression_ratio": 0.0}, "compression_ratio=0.0 above 0"),
    ],
)
def test_a_wrong_option_is_named(mesh: str, options: dict[str, Any], text: str):
    with pytest.raises(ConfigError, match=text):
        parallax.data_parallel(nn.Linear(2, 2), init_mesh(mesh, device_type="cpu"), **options)
    with pytest.raises(ConfigError, match="no parameters that require"):
        parallax.data_parallel(nn.ReLU(), init_mesh(mesh, device_type="cpu"))


def arrays() -> dict[str, Any]:
    mesh = init_mesh("4x1x1", device_type="cpu")
    mine = np.arange(6, dtype=np.float32).reshape(2, 3) * (mesh.rank + 1)
    mine.flags.writeable = False
    scalar = np.float64(mesh.rank)
    out = {
        "mean": parallax.allreduce(mine, mesh),
        "max": parallax.allreduce(mine, mesh, "max"),
        "gathered": parallax.allgather(mine, mesh.data),
        "source 2": parallax.broadcast(mine, mesh, source=2),
        "scalar": parallax.allreduce(scalar, mesh),
        "torch": parallax.allreduce(torch.full((2,), float(mesh.rank)), mesh, "sum"),
        "mine": mine,
    }
    return out


def test_numpy_arrays_are_averaged(ranks):
    base = np.arange(6, dtype=np.float32).reshape(2, 3)
    for rank, found in enumerate(ranks(4, arrays)):
        assert all(type(found[name]) is np.ndarray and found[name].dtype == np.float32 for name in ("mean", "gathered"))
        np.testing.assert_array_equal(found["mean"], base * 2.5)
        np.testing.assert_array_equal(found["max"], base * 4)
        np.testing.assert_array_equal(found["gathered"], np.concatenate([base * k for k in (1, 2, 3, 4)]))
        np.testing.assert_array_equal(found["source 2"], base * 3)
        np.testing.assert_array_equal(found["mine"], base * (rank + 1))
        assert found["scalar"] == 1.5 and type(found["scalar"]) is np.float64
        assert found["torch"].tolist() == [6.0, 6.0]


def jax_program() -> list[float]:
    """A program that trains in JAX: its gradients are averaged over the mesh."""
    import jax
    import jax.numpy as jnp

    mesh = init_mesh("2x1x1", device_type="cpu")
    w = parallax.broadcast(jnp.full((3,), 1.0 + mesh.rank), mesh)
    x = jnp.arange(3.0) + mesh.rank
    for _ in range(3):
        grad = jax.grad(lambda w: ((w * x).sum() - 1.0) ** 2)(w)
        averaged = jax.tree.map(lambda g: parallax.allreduce(g, mesh), {"w": grad})
        w = w - 0.01 * averaged["w"]
    assert isinstance(w, jax.Array)
    return [float(value) for value in w]


def test_a_jax_program_averages_its_gradients(ranks):
    pytest.importorskip("jax")
    w = np.ones(3)
    for _ in range(3):
        grads = [2 * ((w * x).sum() - 1.0) * x for x in (np.arange(3.0), np.arange(3.0) + 1)]
        w = w - 0.01 * (grads[0] + grads[1]) / 2
    for found in ranks(2, jax_program, timeout_s=200):
        np.testing.assert_allclose(found, w, rtol=1e-5)


def test_what_is_no_array_is_refused():
    mesh = init_mesh("1x1x1", device_type="cpu")
    for call, text in (
        (lambda: parallax.allreduce([1.0], mesh), "list is no array"),
        (lambda: parallax.allreduce(np.arange(3), mesh), "op='sum'"),
        (lambda: parallax.allreduce(np.ones(3), mesh, "prod"), "op=prod is unknown"),
        (lambda: parallax.allgather(np.float32(1), mesh), "has none"),
        (lambda: parallax.broadcast(np.ones(3), mesh, source=1), "source=1 is no rank"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()
