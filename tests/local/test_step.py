"""The optimizer, clipping, the norm, and the model's own arithmetic, on one rank."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from parallax.batches import IGNORE
from parallax.errors import MeshError
from parallax.mesh import init_mesh
from parallax.models.costs import unit_activations, unit_costs
from parallax.step import clip_gradients, evaluate, train_step
from tests.cases import GPT2, LLAMA, TIED, VARIANTS, advance, make_batch, make_config, start


def reference_steps(changes: dict[str, Any], num_steps: int) -> list[tuple[float, float]]:
    """The same model trained by torch's own AdamW and clip_grad_norm_, on whole batches, with autograd alone."""
    run, _ = start("1x1x1", **changes | {"batch.num_microbatches": 1})
    (model,) = run.stages.values()
    from parallax.gradients import attach

    attach(model, None)
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.data, parameter.grad = parameter.data.clone(), None
    decays = {n: not (n.endswith("bias") or "norm" in n) for n in parameters}
    config = run.config.optimizer
    groups = [
        {"params": [p for n, p in parameters.items() if decays[n] == d], "weight_decay": config.weight_decay * d}
        for d in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=False, foreach=False)
    rows = []
    for step in range(num_steps):
        batch = make_batch(run.config, run.mesh, step)
        loss = model(None, batch.split(1)[0], 1.0 / batch.num_tokens)
        optimizer.zero_grad()
        loss.backward()
        # The hooks of the flat buffers would take the gradients away.
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step, run.config.steps)
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return rows


def test_the_flat_optimizer_is_torch_s_adamw():
    """Accumulation over microbatches, clipping, decay groups and the learning rate, against plain torch."""
    changes = GPT2 | {"optimizer.weight_decay": 0.3, "optimizer.max_grad_norm": 0.2, "optimizer.warmup_steps": 3}
    import parallax.data.countdown as countdown

    run, state = start("1x1x1", **changes | {"batch.num_microbatches": 6})
    ours = advance(run, state, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(countdown.Countdown, "_by_autograd", lambda self, placed, parameter: None)
        theirs = reference_steps(changes, 5)
    assert max(norm for _, norm in ours) > 0.2, "the clip is at work"
    for (loss, norm), (other, other_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other, rel=1e-9) and norm == pytest.approx(other_norm, rel=1e-6)


def test_clipping_scales_to_the_bound_and_zero_leaves_alone():
    grads = [torch.full((4,), 3.0), torch.full((2,), 4.0)]
    norm = math.sqrt(4 * 9 + 2 * 16)
    clip_gradients(grads, norm, 0.0)
    assert grads[0][0] == 3.0
    clip_gradients(grads, norm, 100.0)
    assert grads[0][0] == 3.0
    clip_gradients(grads, norm, 1.0)
    assert sum(float(g.square().sum()) for g in grads) == pytest.approx(1.0, rel=1e-5)


def test_a_norm_that_is_not_finite_stops_before_the_parameters_change():
    run, state = start("1x1x1", **LLAMA)
    advance(run, state, 1)
    (flat,) = run.flats.values()
    before = flat.values.clone()
    flat.values[5] = float("nan")
    with pytest.raises(FloatingPointError, match="step 2: the gradient norm is nan") as caught:
        train_step(run, state, make_batch(run.config, run.mesh, 1))
    assert any("[rank 0 pipeline0 data0 tensor0] in step 2" in note for note in caught.value.__notes__)
    flat.values[5] = before[5]
    assert torch.equal(flat.values, before) and state.step == 1


def test_bfloat16_keeps_float32_masters():
    """Updates too small for bfloat16 are not lost."""
    run, state = start("1x1x1", **LLAMA | {"dtype": "bfloat16", "optimizer.lr": 1e-5})
    (flat,) = run.flats.values()
    state_of = lambda: torch.cat(state.optimizer.flat_state(0)["parameters"])  # noqa: E731
    masters = state_of()
    assert flat.values.dtype == torch.bfloat16 and masters.dtype == torch.float32
    first = masters.clone()
    advance(run, state, 3)
    masters = state_of()
    assert torch.equal(flat.values, masters.bfloat16())
    moved = masters != first
    rounded_away = moved & (masters.bfloat16() == first.bfloat16())
    assert moved.float().mean() > 0.9 and rounded_away.float().mean() > 0.3


def test_evaluation_changes_nothing_and_drops_nothing():
    run, state = start("1x1x1", **GPT2 | {"model.dropout": 0.5})
    batches = [make_batch(run.config, run.mesh, 7), make_batch(run.config, run.mesh, 8)]
    (flat,) = run.flats.values()
    values, grads = flat.values.clone(), flat.grads.clone()
    loss = evaluate(run, batches)
    assert evaluate(run, batches) == loss
    assert torch.equal(values, flat.values) and torch.equal(grads, flat.grads)
    total = sum(evaluate(run, [b]) * b.num_tokens for b in batches)
    assert loss == pytest.approx(total / sum(b.num_tokens for b in batches), rel=1e-12), "a mean over tokens"
    assert math.isnan(evaluate(run, []))
    assert advance(run, state, 1)[0][0] != pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("variant", [*VARIANTS, "gpt2-longer"])
def test_the_counted_parameters_are_the_model_s(variant: str):
    changes = GPT2 | {"model.max_positions": 99} if variant == "gpt2-longer" else VARIANTS[variant]
    config = make_config("1x1x1", **changes)
    run, _ = start("1x1x1", **changes)
    held: dict[str, int] = {}
    for specs in run.specs.values():
        for spec in specs:
            if not spec.tied:
                held[spec.name] = math.prod(spec.global_shape)
    counted = {name: params for name, _, params in unit_costs(config.model, config.corpus.sequence_length)}
    for name, params in counted.items():
        mine = "final_norm." if name == "head" else None
        assert params == sum(n for k, n in held.items() if k.startswith(f"{name}.") or mine and k.startswith(mine)), (
            name
        )
    assert run.plan.num_parameters == sum(held.values()) == sum(counted.values())


def test_known_models_have_their_known_sizes():
    """GPT-2 small, and TinyLlama's 1.1 B."""
    gpt2 = make_config("1x1x1", **GPT2 | TIED | {
        "model.layers": 12, "model.hidden": 768, "model.heads": 12, "model.ffn": 3072, "model.vocab": 50257,
        "corpus.sequence_length": 1024,
    })  # fmt: skip
    assert sum(p for _, _, p in unit_costs(gpt2.model, 1024)) == 124_439_808
    longer = dataclasses.replace(gpt2.model, max_positions=1024)
    assert sum(p for _, _, p in unit_costs(longer, 64)) == 124_439_808
    llama = make_config("1x1x1", **{
        "model.layers": 22, "model.hidden": 2048, "model.heads": 32, "model.kv_heads": 4, "model.ffn": 5632,
        "model.vocab": 32000,
    })  # fmt: skip
    assert sum(p for _, _, p in unit_costs(llama.model, 2048)) == 1_100_048_384


def test_flops_are_the_matrix_products():
    """Counted against torch's own counter, attention's masked half apart."""
    from torch.utils.flop_counter import FlopCounterMode

    run, _ = start("1x1x1", **GPT2 | {"batch.num_microbatches": 1})
    (model,) = run.stages.values()
    batch = make_batch(run.config, run.mesh, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(None, batch.split(1)[0], 1.0)
    tokens = batch.tokens_BT.numel()
    length, width = run.config.corpus.sequence_length, run.config.model.hidden
    ours = sum(flops for _, flops, _ in unit_costs(run.config.model, length)) * tokens
    attention = 2 * 2.0 * width * length * run.config.model.layers * tokens  # both products, nothing masked
    counted = counter.get_total_flops()
    known = any("scaled_dot_product" in str(op) for op in counter.get_flop_counts()["Global"])
    assert ours + attention / 2 == pytest.approx(counted + (0 if known else attention), rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "recompute"),
    [
        ("gpt2-tied", "none"),
        ("llama", "none"),
        ("llama-padded", "none"),
        ("qwen3", "none"),
        ("gpt2-dropout", "none"),
        ("llama", "full"),
        ("gpt2-dropout", "full"),
        ("gpt2-tied", "every-2"),
        ("gpt2-tied", "selective"),
        ("gpt2-dropout", "selective"),
    ],
)
def test_the_predicted_activations_are_what_autograd_keeps(variant: str, recompute: str):
    """Distinct memory that the forward of one microbatch leaves behind, parameters apart, within a tenth."""
    wide = {"model.hidden": 96, "model.heads": 12, "model.kv_heads": 6, "model.layers": 3, "corpus.sequence_length": 64}
    changes = VARIANTS[variant] | wide | {"model.ffn": 256, "dtype": "float32", "batch.num_microbatches": 4}
    run, _ = start("1x1x1", **changes | {"recompute": recompute})
    (model,) = run.stages.values()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype.is_floating_point:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    microbatch = make_batch(run.config, run.mesh, 0).split(4)[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(None, microbatch, 1.0)
    elements = sum(unit_activations(run.config.model, recompute=recompute)) * microbatch.tokens_BT.numel()
    if (
        variant == "gpt2-dropout" and recompute == "none"
    ):  # the probabilities that attention with dropout writes out are not in the prediction
        assert sum(kept.values()) >= 0.9 * 4 * elements
    else:
        assert sum(kept.values()) == pytest.approx(4 * elements, rel=0.1)
    assert loss.requires_grad


@pytest.mark.parametrize(
    ("variant", "length"), [("gpt2-tied-dropout", 24), ("llama", 24), ("gpt2-tied", 96), ("llama", 96)]
)
def test_recomputation_changes_no_bit(variant: str, length: int):
    """24 tokens have torch's attention, 96 attention in blocks."""
    changes = VARIANTS[variant] | {"dtype": "float32", "corpus.sequence_length": length}
    found = {}
    for mode in ("none", "selective", "full", "every-3"):
        run, state = start("1x1x1", **changes | {"recompute": mode})
        calls: list[str] = []
        for layer in run.stages[0].layers.values():
            layer.mlp.register_forward_pre_hook(lambda module, args, calls=calls: calls.append("forward"))
        found[mode] = advance(run, state, 3)
        again = {"none": 0, "selective": 0, "full": 7, "every-3": 3}[mode]
        assert len(calls) == (7 + again) * run.batch.num_microbatches * 3, mode
    assert all(rows == found["none"] for rows in found.values())


def test_ignored_targets_do_not_count():
    run, state = start("1x1x1", **LLAMA)
    batch = make_batch(run.config, run.mesh, 0)
    assert 0 < batch.num_tokens < batch.targets_BT.numel()
    result = train_step(run, state, batch)
    assert result.tokens == state.tokens == batch.num_tokens == int((batch.targets_BT != IGNORE).sum())
    assert result.loss == pytest.approx(math.log(101), rel=0.02), "a fresh model knows nothing: ln V"


def test_a_mesh_of_one_needs_no_process_group():
    mesh = init_mesh("1x1x1", device_type="cpu")
    assert not torch.distributed.is_initialized()
    assert all(axis.group is None for axis in mesh.axes)


def test_an_unknown_device_is_refused():
    with pytest.raises(MeshError, match="device=gpu is unknown"):
        init_mesh("1x1x1", device_type="gpu")
