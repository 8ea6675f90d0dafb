"""Compressed gradients: what is sent, what is owed, and that every rank ends with the same bits."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax.comm import all_gather, all_reduce
from parallax.data.compressed import CompressedSync, as_matrix
from parallax.resume import Checkpoints
from parallax.step import train_step
from tests.cases import GPT2, LLAMA, TIED, VARIANTS, advance, gather_parameters, make_batch, start

METHODS = ["bfloat16", "float16", "powersgd", "onebit", "topk"]
SMALL = {"model.layers": 3, "data.compression_rank": 2, "data.compression_ratio": 0.05}


def one_step_of(method: str, mesh: str) -> dict[str, Any]:
    """Two steps; of the second, for each compressed matrix: every rank's gradient and debts, and the sum applied."""
    run, state = start(mesh, **GPT2 | TIED | SMALL | {"data.compression": method, "optimizer.max_grad_norm": 0})
    sync = run.sync
    assert isinstance(sync, CompressedSync)
    advance(run, state, 1)
    owed = {placed: tensor.clone() for placed, tensor in sync.owed.items()}
    states = {placed: tensor.clone() for placed, tensor in sync.state.items()}
    grads: dict[Any, Tensor] = {}
    for flat in run.flats.values():
        honest = flat.take_grads

        def take(bucket: Any, honest: Any = honest) -> Tensor:
            whole = honest(bucket)
            grads.update({p: p.of(whole, bucket.start).clone() for p in bucket.placed})
            return whole

        flat.take_grads = take  # type: ignore[method-assign]
    advance(run, state, 1)
    found = {}
    axis = run.mesh.grad
    for flat in run.flats.values():
        for placed in flat.placed:
            if placed not in grads:
                continue
            applied = flat.grad(placed).clone()
            if placed not in owed:
                assert torch.allclose(applied, all_reduce(grads[placed].clone(), axis), rtol=1e-12, atol=1e-15)
                continue
            matrix = grads[placed].view(as_matrix(placed)) + owed[placed]
            every = all_gather(matrix[None].contiguous(), axis)
            left = all_gather(sync.owed[placed][None].contiguous(), axis)
            found[placed.name] = (every, left, applied.view(as_matrix(placed)), states.get(placed))
    return found


def reference(method: str, every: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """(the sum applied, what each rank has left) of the stacked matrices [n, A, B], as the papers write it."""
    if method == "powersgd":
        assert state is not None
        p, _ = torch.linalg.qr((every @ state).sum(0))
        said = p @ (p.T @ every)
    elif method == "onebit":
        scale = every.abs().mean((1, 2), keepdim=True)
        said = torch.where(every >= 0, scale, -scale)
    elif method == "topk":
        said = torch.zeros_like(every)
        k = max(1, round(0.05 * every[0].numel()))
        for row, matrix in zip(said, every, strict=True):
            border = matrix.abs().flatten().sort().values[-k]
            row[matrix.abs() >= border] = matrix[matrix.abs() >= border]
    else:
        dtype = getattr(torch, method)
        said = every.to(dtype)
        return said.sum(0, dtype=dtype), every - said
    return said.sum(0), every - said


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_its_formula_and_nothing_is_lost(ranks, method: str):
    for found in ranks(4, one_step_of, method, "2x2x1"):
        assert found
        for name, (every, left, applied, state) in found.items():
            total, rest = reference(method, every, state)
            exact = method not in ("bfloat16", "float16")  # whose sum rounds once more
            close = {"rtol": 1e-9, "atol": 1e-14} if exact else {"rtol": 0.01, "atol": 1e-5}
            torch.testing.assert_close(applied, total.double(), msg=name, **close)
            torch.testing.assert_close(left, rest, rtol=1e-9, atol=1e-14)
            if exact:
                torch.testing.assert_close(applied + left.sum(0), every.sum(0), rtol=1e-9, atol=1e-14)
            assert left.abs().sum() > 0, "it is a compression"


def checked(mesh: str, changes: dict[str, Any]) -> list[Any]:
    run, state = start(mesh, **changes | {"dtype": "float32", "check_replicas_every": 1})
    return advance(run, state, 8)


@pytest.mark.parametrize("mesh", ["2x2x2", "3x1x2"])
def test_copies_stay_equal(ranks, mesh: str):
    """Tied weights on two stages, key/value heads on several tensor ranks, three data ranks."""
    for method in METHODS:
        changes = LLAMA | TIED | SMALL | {"model.kv_heads": 1 if mesh[2] == "1" else 2, "data.compression": method}
        every = ranks(math.prod(map(int, mesh.split("x"))), checked, mesh, changes)
        assert all(rows == every[0] for rows in every), method


def traffic(method: str) -> tuple[Counter[str], int, int, list[tuple[int, int]]]:
    run, state = start("4x1x1", **GPT2 | SMALL | {"data.compression": method, "dtype": "float32"})
    sync = run.sync
    assert isinstance(sync, CompressedSync)
    advance(run, state, 1)
    before = Counter(run.mesh.data.traffic)
    advance(run, state, 1)
    (flat,) = run.flats.values()
    shapes = [as_matrix(p) for p in sync.owed]
    plain = sum(math.prod(p.shape) for b in flat.buckets for p in b.placed if p not in sync.owed)
    return Counter(run.mesh.data.traffic) - before, plain, len(flat.buckets), shapes


@pytest.mark.parametrize("method", METHODS)
def test_it_sends_what_it_says(ranks, method: str):
    sent, plain, buckets, shapes = ranks(4, traffic, method)[0]
    numbers = sum(a * b for a, b in shapes)
    summed, gathered = 4 * plain, 0.0  # bytes of messages
    if method in ("bfloat16", "float16"):
        summed += 2 * numbers
    elif method == "powersgd":
        summed += 4 * 2 * sum(a + b for a, b in shapes)
    elif method == "onebit":
        gathered = numbers / 8 + 4 * len(shapes)
    else:
        gathered = 8 * sum(round(0.05 * a * b) for a, b in shapes)
    padding = 3 * 4 * 4 * buckets  # each message to a multiple of the ranks
    assert sent["reduce_scatter"] == pytest.approx(summed * 3 / 4, abs=padding)
    assert sent["all_gather"] == pytest.approx(summed * 3 / 4 + gathered * 3, abs=padding)
    if method not in ("bfloat16", "float16"):
        assert sent["reduce_scatter"] + sent["all_gather"] < 0.5 * 2 * 4 * numbers * 3 / 4


def skipped(method: str) -> bool:
    run, state = start("2x1x1", **LLAMA | SMALL | {"data.compression": method, "on_nan": "skip", "dtype": "float32"})
    sync = run.sync
    assert isinstance(sync, CompressedSync)
    advance(run, state, 2)
    before = {placed: tensor.clone() for placed, tensor in sync.owed.items()}
    batch = make_batch(run.config, run.mesh, 2)
    (stage,) = run.stages.values()
    handle = stage.layers["1"].register_forward_hook(  # type: ignore[index,union-attr]
        lambda module, args, output: output * (float("nan") if run.mesh.rank == 1 else 1.0)
    )
    assert train_step(run, state, batch).skipped
    handle.remove()
    same = all(tensor.equal(sync.owed[placed]) for placed, tensor in before.items())
    return same and not train_step(run, state, batch).skipped


@pytest.mark.parametrize("method", ["powersgd", "onebit"])
def test_a_skipped_step_leaves_what_is_owed(ranks, method: str):
    assert all(ranks(2, skipped, method))


def go(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str) -> dict[str, Any]:
    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    sync = run.sync
    sums = {}
    if isinstance(sync, CompressedSync):
        for placed, owed in sync.owed.items():
            sums[placed.specs[0].name] = all_reduce(owed.clone(), run.mesh.grad)
    rows = advance(run, state, num_steps)
    if num_steps:
        checkpoints.save(state)
    after = {}
    if isinstance(sync, CompressedSync):
        for placed, owed in sync.owed.items():
            after[placed.specs[0].name] = all_reduce(owed.clone(), run.mesh.grad)
    return {"rows": rows, "parameters": gather_parameters(run, state), "before": sums, "after": after}


@pytest.mark.parametrize("method", ["powersgd", "topk"])
def test_a_resumed_run_is_the_same_run_and_owes_the_same_elsewhere(ranks, tmp_path: Path, method: str):
    changes = VARIANTS["gpt2-tied"] | SMALL | {"data.compression": method}
    straight = ranks(4, go, "2x1x2", changes, str(tmp_path / "a"), 4, "none")
    first = ranks(4, go, "2x1x2", changes, str(tmp_path / "b"), 2, "none")
    second = ranks(4, go, "2x1x2", changes, str(tmp_path / "b"), 2, "auto")
    for rank in range(4):
        assert first[rank]["rows"] + second[rank]["rows"] == straight[rank]["rows"]
        for name, boxes in straight[rank]["parameters"].items():
            assert all(a[1].equal(b[1]) for a, b in zip(boxes, second[rank]["parameters"][name], strict=True))
    owed: dict[str, Tensor] = {}
    for found in second:
        owed |= found["after"]
    elsewhere = ranks(3, go, "3x1x1", changes, str(tmp_path / "b"), 0, "auto")[0]
    assert elsewhere["before"].keys() == owed.keys()
    for name, total in elsewhere["before"].items():
        torch.testing.assert_close(total, owed[name], rtol=1e-12, atol=1e-15)
        assert total.abs().sum() > 0
    plain = ranks(1, go, "1x1x1", changes | {"data.compression": "none"}, str(tmp_path / "b"), 1, "auto")[0]
    assert math.isfinite(plain["rows"][0][0]), "a run that does not compress takes it up too"


def adasum(mesh: str) -> dict[str, tuple[Tensor, Tensor]]:
    run, state = start(mesh, **LLAMA | SMALL | {"model.kv_heads": 2, "model.vocab": 100, "data.reduction": "adasum"})
    grads: dict[str, Tensor] = {}
    for flat in run.flats.values():
        honest = flat.take_grads

        def take(bucket: Any, honest: Any = honest) -> Tensor:
            whole = honest(bucket)
            for placed in bucket.placed:
                for spec in placed.specs:
                    grads[spec.name] = spec.view(placed.of(whole, bucket.start)).clone()
            return whole

        flat.take_grads = take  # type: ignore[method-assign]
    run.sync.zero()
    batch = make_batch(run.config, run.mesh, 0)
    tokens = int(all_reduce(torch.tensor([batch.num_tokens]), run.mesh.grad))
    run.pipeline.run(batch.split(run.schedule.num_microbatches), scale=1 / tokens)
    found = {}
    for spec, combined in run.grads:
        every = all_gather(grads[spec.name][None].contiguous(), run.mesh.grad)
        if spec.shards and spec.tensor_ranks == (run.mesh.tensor.rank,):  # whole matrices for the dot products
            dim = spec.shards["tensor"]
            parts = all_gather(every.movedim(dim + 1, 0).contiguous(), run.mesh.tensor)
            whole = parts.movedim(0, dim + 1)
        else:
            whole = every
        box = tuple(slice(*cut) for cut in spec.box) if whole.shape[1:] == spec.global_shape else ...
        found[spec.name] = (combined.view(every.shape[1:]).clone(), pairwise(list(whole * len(every)))[box])
    return found


def pairwise(grads: list[Tensor]) -> Tensor:
    """The paper's recursion, on whole gradients."""
    while len(grads) > 1:
        grads = [
            (1 - (a * b).sum() / (2 * (a * a).sum())) * a + (1 - (a * b).sum() / (2 * (b * b).sum())) * b
            for a, b in zip(grads[::2], grads[1::2], strict=True)
        ]
    return grads[0]


@pytest.mark.parametrize("mesh", ["4x1x1", "2x2x1", "2x1x2"])
def test_adasum_is_the_paper_s(ranks, mesh: str):
    for found in ranks(4, adasum, mesh):
        for name, (combined, expected) in found.items():
            torch.testing.assert_close(combined, expected, rtol=1e-9, atol=1e-14, msg=name)


def learns(changes: dict[str, Any]) -> float:
    """The loss after 200 steps of SGD on four batches of random tokens, which can only be learned by heart."""
    options = {"dtype": "float32", "optimizer.name": "sgd", "optimizer.lr": 0.2, "optimizer.weight_decay": 0}
    run, state = start("2x1x1", **VARIANTS["llama"] | SMALL | options | {"optimizer.momentum": 0.9} | changes)
    batches = [make_batch(run.config, run.mesh, step) for step in range(4)]
    return [train_step(run, state, batches[step % 4]).loss for step in range(200)][-1]


@pytest.mark.slow
def test_two_hundred_steps_go_most_of_the_way(ranks):
    losses = {method: ranks(2, learns, {"data.compression": method})[0] for method in ["none", *METHODS]}
    losses["adasum"] = ranks(2, learns, {"data.reduction": "adasum"})[0]
    print(losses)
    begin = math.log(101)
    assert max(losses.values()) <= begin - 0.65 * (begin - losses["none"]), losses
