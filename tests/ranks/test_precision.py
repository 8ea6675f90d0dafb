"""float16 with a loss scale that every rank agrees on, bfloat16, and gradients that travel in less than they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallax.precision.loss_scale import LossScale
from parallax.resume import Checkpoints
from parallax.step import train_step
from tests.cases import GPT2, LLAMA, TIED, advance, assemble_whole, gather_parameters, make_batch, start, worst

HALF = GPT2 | TIED | {"dtype": "float16", "model.dropout": 0.1, "precision.loss_scale": 1024.0}


def overflow(mesh: str, changes: dict[str, Any], bad_step: int, bad_rank: int) -> dict[str, Any]:
    """Train five steps, in one of which one rank's gradient overflows."""
    run, state = start(mesh, **changes)
    honest = run.pipeline.run
    rows, scales, before, after = [], [], {}, {}

    def faulty(microbatches: Any, *, scale: float) -> Any:
        loss = honest(microbatches, scale=scale)
        if state.step == bad_step and run.mesh.rank == bad_rank:
            flat = run.flats[max(run.flats)]
            flat.grads_of(flat.segments[0])[7] = float("inf")
        return loss

    run.pipeline.run = faulty  # type: ignore[method-assign]
    for step in range(5):
        if step == bad_step:
            before = gather_parameters(run, state)
        result = train_step(run, state, make_batch(run.config, run.mesh, state.step))
        if step == bad_step:
            after = gather_parameters(run, state)
        rows.append((result.loss, result.grad_norm, result.skipped))
        scales.append(state.loss_scale.value)
    same = all(a[1].equal(b[1]) for name in before for a, b in zip(before[name], after[name], strict=True))
    return {"rows": rows, "scales": scales, "unchanged": same, "skipped": state.loss_scale.skipped, "step": state.step}


@pytest.mark.parametrize(("mesh", "zero"), [("2x1x2", 0), ("2x1x2", 2), ("2x2x1", 3)])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks, mesh: str, zero: int):
    every = ranks(4, overflow, mesh, HALF | {"data.zero": zero}, 2, 3)
    assert all(found == every[0] for found in every), "every rank decides alike"
    found = every[0]
    assert found["unchanged"] and found["skipped"] == 1 and found["step"] == 5
    assert found["scales"] == [1024.0, 1024.0, 512.0, 512.0, 512.0]
    losses = [loss for loss, _, _ in found["rows"]]
    assert all(4 < loss < 5 for loss in losses) and len(set(losses)) == 5, "it goes on"
    reasons = [reason for _, _, reason in found["rows"]]
    assert [bool(reason) for reason in reasons] == [False, False, True, False, False]
    assert "the gradient norm is inf" in reasons[2] and "rank " in reasons[2] and "weight" in reasons[2]


def stopped(on_nan: str) -> str:
    changes = LLAMA | {"dtype": "float32", "on_nan": on_nan}
    run, state = start("2x1x1", **changes)
    (flat,) = run.flats.values()
    if run.mesh.rank == 1:
        place = flat.by_name["layers.3.mlp.up.weight"]
        place.parameter.data[0, 0] = float("nan")
    try:
        result = train_step(run, state, make_batch(run.config, run.mesh, 0))
        return result.skipped
    except FloatingPointError as error:
        return f"stopped: {error}"


def test_a_nan_names_the_parameter_and_the_rank_and_stops_or_skips(ranks):
    for text in ranks(2, stopped, "stop"):
        assert text.startswith("stopped: step 1: the gradient norm is nan") and "(rank 0, 1)" in text
    for text in ranks(2, stopped, "skip"):
        assert text.startswith("the gradient norm is nan")


def half_and_single(mesh: str) -> dict[str, Any]:
    out = {}
    for dtype in ("float32", "float16", "bfloat16"):
        run, state = start(mesh, **HALF | {"dtype": dtype})
        out[dtype] = advance(run, state, 8)
    for wish in ("bfloat16", "float16"):
        for zero in (0, 2):
            changes = HALF | {"dtype": "float32", "precision.reduce_dtype": wish, "data.zero": zero}
            run, state = start(mesh, **changes)
            out[f"reduced in {wish}, zero {zero}"] = advance(run, state, 8)
            out[f"bytes {wish} {zero}"] = dict(run.mesh.data.traffic)
    return out


def test_narrow_dtypes_follow_float32(ranks):
    found = ranks(2, half_and_single, "2x1x1")[0]
    for name, rows in found.items():
        if name.startswith("bytes"):
            continue
        for (loss, norm), (other, other_norm) in zip(rows, found["float32"], strict=True):
            assert loss == pytest.approx(other, rel=0.01), name
            assert norm == pytest.approx(other_norm, rel=0.05), name
        assert name == "float32" or rows != found["float32"], "the wish was heard"
    assert worst(found["reduced in bfloat16, zero 0"], found["reduced in bfloat16, zero 2"]) <= 1e-14, "one sum"


def resumed(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str) -> Any:
    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    rows = advance(run, state, num_steps)
    checkpoints.save(state)
    return {"rows": rows, "scale": state.loss_scale.state(), "parameters": gather_parameters(run, state)}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_resumed_float16_run_is_the_same_run(ranks, tmp_path: Path, zero: int):
    """The first scale overflows, so that a step is skipped before the restart, and the scale grows after it."""
    changes = HALF | {"data.zero": zero, "precision.loss_scale": 2.0**24, "precision.loss_scale_window": 2}
    straight = ranks(2, resumed, "2x1x1", changes, str(tmp_path / "a"), 10, "none")
    first = ranks(2, resumed, "2x1x1", changes, str(tmp_path / "b"), 5, "none")
    second = ranks(2, resumed, "2x1x1", changes, str(tmp_path / "b"), 5, "auto")
    assert repr(first[0]["rows"] + second[0]["rows"]) == repr(straight[0]["rows"])
    assert second[0]["scale"] == straight[0]["scale"] and straight[0]["scale"]["skipped_steps"] > 0
    ours = assemble_whole([part["parameters"] for part in second])
    for name, values in assemble_whole([part["parameters"] for part in straight]).items():
        assert torch.equal(values, ours[name]), name


def test_the_scale_halves_and_doubles():
    scale = LossScale(8.0, window=2)
    seen = []
    for finite in (False, True, True, True, False, False, False, False, False):
        scale.update(finite)
        seen.append(scale.value)
    assert seen == [4.0, 4.0, 8.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0] and scale.skipped == 6
    again = LossScale(1.0, window=2)
    again.load(scale.state())
    assert again == scale


def beyond_cure(value: float) -> str:
    """float16 with a parameter that is not a number, for good: halving the loss scale does not help."""
    run, state = start("1x1x1", **LLAMA | {"dtype": "float16", "on_nan": "stop", "precision.loss_scale": value})
    (flat,) = run.flats.values()
    flat.by_name["layers.3.mlp.up.weight"].parameter.data[0, 0] = float("nan")
    try:
        for _ in range(3):
            train_step(run, state, make_batch(run.config, run.mesh, state.step))
    except FloatingPointError as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("value", [1.0, 65536.0])
def test_float16_stops_where_no_loss_scale_helps(ranks, value: float):
    (text,) = ranks(1, beyond_cure, value)
    assert "step 1: the gradient norm is nan" in text and "in the output of layers.3.mlp.up" in text
