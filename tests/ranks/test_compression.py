"""Compressed sums against their formulas on the stacked gradients, in one process, and what they send."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallax.data.buckets import FlatBuffers
from parallax.data.choose import replicate
from parallax.data.feedback import Compressed
from parallax.mesh import init_mesh
from parallax.params import collect

STEPS = 5
SKIPPED = 2
"""A step whose gradients are not finite, and which is not taken."""
SCALES = (1.0, 1.0, 8.0, 4.0, 4.0)
RANK, RATIO = 2, 0.07


class Shapes(nn.Module):
    """A matrix, a box of three dims, a thin matrix that no factors make smaller, vectors, a scalar, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(29, 37))
        self.deep = nn.Parameter(torch.zeros(11, 5, 3))
        self.thin = nn.Parameter(torch.zeros(2, 9))
        self.norm_bias = nn.Parameter(torch.zeros(13))
        self.scale = nn.Parameter(torch.zeros(()))
        self.unused = nn.Parameter(torch.zeros(12, 20))
        self.frozen = nn.Parameter(torch.zeros(6, 6), requires_grad=False)


MATRICES = {"wide": (29, 37), "deep": (11, 15), "unused": (12, 20)}


def gradient(name: str, shape: tuple[int, ...], rank: int, step: int) -> Tensor | None:
    """What one rank has; a few steps without any for `unused`."""
    if name == "unused" and step in (0, 1):
        return None
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + len(name))
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if step == SKIPPED and name == "wide" and rank == 1:
        grad.view(-1)[3] = torch.inf
    return grad


def reduce_steps(size: int, dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """What each step applies, what this rank owes after it, and what it sent."""
    mesh = init_mesh(f"{size}x1x1", device_type="cpu")
    model = Shapes().to(dtype)
    flat = FlatBuffers(model, collect(model, mesh), bucket_bytes=1000, grad_dtype=dtype, ranks=size)
    assert len(flat.buckets) > 1
    sync = replicate(mesh, {0: flat}, {}, **options)
    steps = []
    for step in range(STEPS):
        mesh.grad.traffic.clear()
        scale = SCALES[step]
        sync.zero(scale)
        for placed in flat.placed:
            grad = gradient(placed.name, placed.shape, mesh.rank, step)
            if grad is not None:
                flat.add_grad(placed, (grad * scale).to(dtype))
        sync.reduce(0)
        sync.finish()
        applied = {p.name: p.of(flat.grads).double() / scale for p in flat.placed}
        if step != SKIPPED:
            sync.publish()
        owed = {}
        if isinstance(sync, Compressed):
            owed = {part.spec.name: values.double().clone() for part, values in sync.owed()}
        steps.append({"applied": applied, "owed": owed, "sent": dict(mesh.grad.traffic)})
    buckets = [(b.stop - b.start, [p.name for p in b.placed]) for b in flat.buckets]
    return {"steps": steps, "buckets": buckets, "shares memory": mesh.grad.board is not None}


def one_bit(deltas: list[Tensor], state: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    scales = [d.abs().view(d.shape[0], -1).mean(1).view(-1, *[1] * (d.dim() - 1)) for d in deltas]
    sent = [torch.where(d >= 0, 1.0, -1.0).double() * scale for d, scale in zip(deltas, scales, strict=True)]
    return sum(sent, torch.zeros_like(deltas[0])), [d - s for d, s in zip(deltas, sent, strict=True)]


def top_k(deltas: list[Tensor], state: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    sent = []
    for delta in deltas:
        least = delta.abs().view(-1).sort(descending=True).values[math.ceil(RATIO * delta.numel()) - 1]
        sent.append(torch.where(delta.abs() >= least, delta, 0.0))
    return sum(sent, torch.zeros_like(deltas[0])), [d - s for d, s in zip(deltas, sent, strict=True)]


def power_sgd(deltas: list[Tensor], state: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Algorithm 1 of the paper for the sum; columns by Gram and Schmidt, whose signs do not matter."""
    matrices = [d.view(d.shape[0], -1) for d in deltas]
    p = sum(matrices[1:], matrices[0]) @ state["q"]
    columns: list[Tensor] = []
    for column in p.T:
        for other in columns * 2:
            column = column - other * (other @ column)
        columns.append(column / column.norm())
    p = torch.stack(columns, 1)
    qs = [m.T @ p for m in matrices]
    state["q"] = sum(qs[1:], qs[0])
    shape = deltas[0].shape
    return (p @ state["q"].T).view(shape), [(m - p @ q.T).view(shape) for m, q in zip(matrices, qs, strict=True)]


LOSSY: dict[str, tuple[Any, dict[str, Any]]] = {
    "onebit": (one_bit, {}),
    "topk": (top_k, {"compression_ratio": RATIO}),
    "powersgd": (power_sgd, {"compression_rank": RANK, "seed": 5}),
}


def first_q(name: str) -> Tensor:
    """The first factor, as powersgd.py says: normal numbers by (seed, name, element)."""
    from parallax.rng import derive_key, fill_normal

    q = torch.empty(1, MATRICES[name][1], RANK, dtype=torch.float64)
    fill_normal(q, ((0, 1), (0, q.shape[1]), (0, RANK)), tuple(q.shape), derive_key(5, "powersgd", name), 0.0, 1.0)
    return q[0]


def reference(kind: str, size: int) -> list[dict[str, Any]]:
    """One process, one parameter after another: what each step applies and each rank owes."""
    compress, _ = LOSSY[kind]
    taken = set(MATRICES) | ({"thin"} if kind != "powersgd" else set())
    steps: list[dict[str, Any]] = [{"applied": {}, "owed": {}} for _ in range(STEPS)]
    for name, parameter in Shapes().named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(parameter.shape)
        owed = [torch.zeros(shape, dtype=torch.float64) for _ in range(size)]
        state = {"q": first_q(name)} if name in MATRICES else {}
        for step in range(STEPS):
            grads = [gradient(name, shape, rank, step) for rank in range(size)]
            deltas = [e if g is None else e + g for g, e in zip(grads, owed, strict=True)]
            if step == SKIPPED:
                steps[step]["owed"][name] = owed
                continue
            if name not in taken or all(not d.any() for d in deltas):
                applied, owed = sum(deltas[1:], deltas[0]), [torch.zeros_like(d) for d in deltas]
                if "q" in state:
                    state["q"] = torch.zeros_like(state["q"])
            elif kind == "powersgd" and not state["q"].any():
                # After zeros M Q is zero: orthonormal columns of it are the first unit vectors.
                rows = [d.view(d.shape[0], -1)[:RANK] for d in deltas]
                state["q"] = sum(rows[1:], rows[0]).T.clone()
                applied, after = torch.zeros_like(deltas[0]), [d.clone() for d in deltas]
                applied.view(shape[0], -1)[:RANK] = state["q"].T
                for left in after:
                    left.view(shape[0], -1)[:RANK] = 0
                owed = after
            else:
                applied, owed = compress(deltas, state)
            steps[step]["applied"][name], steps[step]["owed"][name] = applied, owed
    return steps


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("kind", LOSSY)
def test_the_formulas_on_stacked_gradients(ranks, kind: str, size: int):
    """Also: a skipped step leaves what is owed; the loss scale is divided out; every rank has the same bits."""
    options = LOSSY[kind][1] | {"compression": kind}
    found = ranks(size, reduce_steps, size, torch.float64, options)
    expected = reference(kind, size) if size > 1 else None
    for step in range(STEPS):
        for rank in range(size):
            here = found[rank]["steps"][step]
            for name, applied in here["applied"].items():
                if step == SKIPPED:
                    assert name != "wide" or size == 1 or not applied.isfinite().all(), (
                        "the norm must see what is not finite"
                    )
                    continue
                assert applied.equal(found[0]["steps"][step]["applied"][name]), "the same bits everywhere"
                if expected is None:  # alone there is nothing to compress
                    grad = gradient(name, tuple(applied.shape), 0, step)
                    assert applied.equal(torch.zeros_like(applied) if grad is None else grad)
                else:
                    torch.testing.assert_close(applied, expected[step]["applied"][name], rtol=1e-9, atol=1e-11)
            for name, owed in here["owed"].items():
                right = expected[step]["owed"][name][rank] if expected else torch.zeros_like(owed)
                torch.testing.assert_close(owed, right, rtol=1e-9, atol=1e-11, msg=f"{name} {step} {rank}")


@pytest.mark.parametrize("kind", LOSSY)
def test_nothing_is_lost(ranks, kind: str):
    """Over all steps: what was applied and what is owed at the end add up to the gradients."""
    size = 3
    found = ranks(size, reduce_steps, size, torch.float32, LOSSY[kind][1] | {"compression": kind})
    last = [found[rank]["steps"][-1]["owed"] for rank in range(size)]
    taken = [step for step in range(STEPS) if step != SKIPPED]
    for name, first in found[0]["steps"][0]["applied"].items():
        true, got = torch.zeros_like(first), torch.zeros_like(first)
        for step in taken:
            got += found[0]["steps"][step]["applied"][name]
            for rank in range(size):
                grad = gradient(name, tuple(first.shape), rank, step)
                true += 0 if grad is None else grad.float().double()
        still = sum((owed[name] for owed in last if name in owed), torch.zeros_like(first))
        torch.testing.assert_close(got + still, true, rtol=0, atol=3e-5)
        if name == "wide":
            assert still.abs().max() > 0.1, "something is owed, or this shows nothing"


def padded(count: int, size: int = 1) -> int:
    return -(-count // (64 * size)) * 64 * size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", LOSSY)
def test_a_step_sends_what_the_docstrings_say(ranks, kind: str, size: int):
    """On 4 ranks a sum over sockets is a reduce-scatter and an all-gather."""
    shapes = {name: tuple(p.shape) for name, p in Shapes().named_parameters()}
    for found in ranks(size, reduce_steps, size, torch.float32, LOSSY[kind][1] | {"compression": kind}):
        sums, gathered = 0, 0
        for num_elements, names in found["buckets"]:
            counts = {name: math.prod(shapes[name]) for name in names}
            matrices = [n for n in names if n in MATRICES or (kind != "powersgd" and n == "thin")]
            rest = sum(padded(counts[n]) for n in names if n not in matrices)
            if kind == "powersgd":
                ps = sum(padded(MATRICES[n][0] * RANK) for n in matrices)
                qs = sum(padded(MATRICES[n][1] * RANK) for n in matrices)
                sums += padded(ps + rest, size) + padded(qs, size)
            else:
                sums += padded(rest, size)
            if kind == "onebit" and matrices:
                gathered += num_elements // 8 + 4 * sum(shapes[n][0] for n in matrices)
            elif kind == "topk":
                gathered += 8 * sum(math.ceil(RATIO * counts[n]) for n in matrices)
        expected = {"all_gather": (size - 1) * gathered}
        if found["shares memory"]:
            expected["all_reduce"] = 2 * (size - 1) * 4 * sums // size
        elif size == 2:
            expected["all_reduce"] = 4 * sums
        else:
            expected["all_gather"] += (size - 1) * 4 * sums // size
            expected["reduce_scatter"] = (size - 1) * 4 * sums // size
        assert found["steps"][3]["sent"] == {kind: n for kind, n in expected.items() if n}


def adasum(grads: list[Tensor]) -> Tensor:
    if len(grads) == 1:
        return grads[0]
    pairs = []
    for a, b in zip(grads[::2], grads[1::2], strict=True):
        dot, aa, bb = (a * b).sum(), (a * a).sum(), (b * b).sum()
        pairs.append((1 - dot / (2 * aa) if aa else 1) * a + (1 - dot / (2 * bb) if bb else 1) * b)
    return adasum(pairs)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adasum_on_stacked_gradients(ranks, size: int):
    found = ranks(size, reduce_steps, size, torch.float64, {"reduction": "adasum"})
    for rank in found:
        for step in range(STEPS):
            for name, applied in rank["steps"][step]["applied"].items():
                if step == SKIPPED:
                    assert name != "wide" or size == 1 or not applied.isfinite().all()
                    continue
                assert applied.equal(found[0]["steps"][step]["applied"][name])
                grads = [gradient(name, tuple(applied.shape), r, step) for r in range(size)]
                known = [torch.zeros_like(applied) if g is None else g for g in grads]
                torch.testing.assert_close(applied, size * adasum(known), rtol=1e-11, atol=1e-12)
        num_elements = sum(count for count, _ in rank["buckets"])
        assert rank["steps"][0]["sent"].get("exchange", 0) == int(math.log2(size)) * 8 * num_elements


def equal_shares() -> tuple[Tensor, Tensor]:
    mesh = init_mesh("4x1x1", device_type="cpu")
    model = nn.Linear(5, 7, bias=False).double()
    flat = FlatBuffers(model, collect(model, mesh), bucket_bytes=64, grad_dtype=torch.float64, ranks=4)
    results = []
    for shared in (True, False):
        sync = replicate(mesh, {0: flat}, {}, reduction="adasum")
        share = torch.arange(35.0, dtype=torch.float64).view(7, 5)
        if not shared:  # orthogonal: each rank has a row of its own
            share = torch.zeros(7, 5, dtype=torch.float64)
            share[mesh.rank] = 1.0
        sync.zero()
        flat.add_grad(flat.placed[0], share)
        sync.reduce(0)
        sync.finish()
        results.append(flat.placed[0].of(flat.grads).clone())
    return results[0], results[1]


def test_adasum_of_equal_shares_is_their_sum_and_of_orthogonal_ones_n_times_it(ranks):
    for equal, orthogonal in ranks(4, equal_shares):
        torch.testing.assert_close(equal, 4 * torch.arange(35.0, dtype=torch.float64).view(7, 5), rtol=1e-15, atol=0)
        expected = torch.zeros(7, 5, dtype=torch.float64)
        expected[:4] = 4.0
        assert orthogonal.equal(expected)
