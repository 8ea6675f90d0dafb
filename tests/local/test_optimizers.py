"""The optimizers against plain formulas on whole matrices, and what keeps their state elsewhere or in less."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from parallax.errors import ConfigError
from parallax.optimizers import train
from parallax.optimizers.chance import Rows, bits_by_box, places_of
from parallax.optimizers.muon import orthogonalise
from parallax.precision.rounding import round_stochastically
from parallax.rng import derive_key, random_bits
from tests.cases import GPT2, LLAMA, TIED, advance, assemble_whole, gather_parameters, make_batch, start

KINDS = ("parameters", "exp_avg", "exp_avg_sq")


def whole(run: Any, state: Any, kind: str = "parameters") -> dict[str, Tensor]:
    return assemble_whole([gather_parameters(run, state, kind)])


def gradients(run: Any) -> dict[str, Tensor]:
    (flat,) = run.flats.values()
    return {
        spec.name: spec.view(flat.grad(placed)).clone()
        for placed in flat.placed
        for spec in placed.specs
        if not spec.tied
    }


def reference(name: str, p: Tensor, g: Tensor, state: dict[str, Tensor], lr: float, decay: float, hidden: bool) -> None:
    """One update of one whole parameter, as the papers write it."""
    m = state.setdefault("m", torch.zeros_like(p))
    if name == "sgd":
        g = g + decay * p
        m.mul_(0.9).add_(g)
        p.sub_(lr * (g + 0.9 * m))
    elif name == "lion":
        update = torch.sign(0.9 * m + (1 - 0.9) * g)
        p.sub_(lr * (update + decay * p))
        m.copy_(0.99 * m + (1 - 0.99) * g)
    elif name == "muon" and hidden:
        m.copy_(0.9 * m + (1 - 0.9) * g)
        update = orthogonalise((1 - 0.9) * g + 0.9 * m) * 0.2 * max(p.shape) ** 0.5
        p.sub_(lr * (update + decay * p))
    else:
        v = state.setdefault("v", torch.zeros_like(p))
        t = state.setdefault("t", torch.zeros(())).add_(1).item()
        m.copy_(0.9 * m + 0.1 * g)
        v.copy_(0.99 * v + 0.01 * g * g)
        p.mul_(1 - lr * decay).sub_(lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8))


@pytest.mark.parametrize("name", ["sgd", "lion", "muon", "adamw"])
def test_an_update_is_the_paper_s(name: str):
    changes = LLAMA | {"optimizer.name": name, "optimizer.momentum": 0.9, "optimizer.betas": "0.9,0.99"}
    changes |= {"optimizer.weight_decay": 0.3, "optimizer.max_grad_norm": 0, "optimizer.no_decay": "embedding.*"}
    run, state = start("1x1x1", **changes)
    (specs,) = run.specs.values()
    expected = whole(run, state)
    states: dict[str, dict[str, Tensor]] = {n: {} for n in expected}
    for step in range(3):
        advance(run, state, 1)
        lr = run.config.optimizer.lr_at(step, run.config.steps)
        for spec in specs:
            decays = len(spec.global_shape) > 1 and not spec.name.startswith("embedding")
            hidden = spec.name.startswith("layers.") and len(spec.global_shape) > 1
            g = gradients(run)[spec.name]
            reference(name, expected[spec.name], g, states[spec.name], lr, 0.3 if decays else 0.0, hidden)
    for key, values in whole(run, state).items():
        assert torch.allclose(values, expected[key], rtol=1e-9, atol=1e-12), key


def test_an_orthogonal_matrix_has_the_singular_vectors_and_values_about_one():
    generator = torch.Generator().manual_seed(1)
    for shape in [(40, 24), (24, 40), (32, 32)]:
        matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.T @ orthogonalise(matrix) @ vh.T
        values = inner.diagonal()
        assert (inner - torch.diag(values)).abs().max() < 1e-9
        assert values.min() > 0.3 and values.max() < 1.3
        theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
        assert (orthogonalise(matrix) - theirs).abs().max() < 0.03, "torch's runs in bfloat16"


def test_bfloat16_is_rounded_by_chance():
    x = torch.tensor([1.0, 1.0 + 2**-9, -3.0 - 2**-7 * 1.5, 1e-30, 0.0]).repeat_interleave(20000)
    rounded = round_stochastically(x, random_bits(torch.arange(len(x)), (0, 1), 7).view(-1)).float()
    for values, exact in zip(rounded.view(5, -1), x.view(5, -1)[:, 0], strict=True):
        ulp = abs(exact.item()) * 2**-7
        assert (values - exact).abs().max() <= ulp, "one of the two neighbours"
        assert abs(values.double().mean().item() - exact.item()) <= 0.02 * ulp + 1e-45, "the mean is what was rounded"
    assert set(rounded.view(5, -1)[0].tolist()) == {1.0} and len(set(rounded.view(5, -1)[1].tolist())) == 2


def run_with(changes: dict[str, Any], num_steps: int = 3) -> dict[str, dict[str, Tensor]]:
    run, state = start("1x1x1", **GPT2 | TIED | {"dtype": "float32"} | changes)
    advance(run, state, num_steps)
    return {kind: whole(run, state, kind) for kind in KINDS}


@pytest.mark.parametrize("chunk", [192, 1 << 22])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_elsewhere_is_the_same_state(monkeypatch, chunk: int, dtype: str):
    """Chunks of any size, masters and moments apart from the model: bit for bit."""
    here = run_with({"dtype": dtype})
    monkeypatch.setattr(train, "CHUNK", chunk)
    there = run_with({"dtype": dtype, "optimizer.offload": "true"})
    for kind in KINDS:
        assert all(values.equal(there[kind][name]) for name, values in here[kind].items()), kind


@pytest.mark.parametrize("chunk", [37, 500, 1 << 20])
def test_a_gpu_draws_the_same_bits(chunk: int):
    """All boxes of a chunk at once or one after the other: matrices, vectors, parts of rows, padding between them."""
    run, _ = start("1x1x1", **GPT2 | TIED | {"dtype": "float32"})
    for flat in run.flats.values():
        for index, segment in enumerate(flat.segments):
            pieces = [piece for piece in flat.pieces if piece.segment == index]
            pieces = pieces[:3] + pieces[4:]  # a gap
            keys = [derive_key("bits", piece.spec.name) for piece in pieces]
            for begin in range(0, segment.stop - segment.start, chunk):
                cut = slice(begin, min(begin + chunk, segment.stop - segment.start))
                places, size = places_of(pieces, cut), cut.stop - cut.start
                by_box, at_once = bits_by_box(places, keys, size), Rows(places, size, torch.device("cpu")).bits(keys)
                used = torch.zeros(size, dtype=torch.bool)
                for place in places:
                    used[place.start : place.stop] = True
                assert at_once.shape == by_box.shape and at_once[used].equal(by_box[used])
                assert not by_box[~used].any()


def test_bfloat16_state_does_not_depend_on_chunks_and_follows_float32(monkeypatch):
    wide, narrow = run_with({}), run_with({"optimizer.state_dtype": "bfloat16"})
    monkeypatch.setattr(train, "CHUNK", 192)
    chunked = run_with({"optimizer.state_dtype": "bfloat16"})
    for kind in KINDS:
        for name, values in narrow[kind].items():
            assert values.equal(chunked[kind][name]), (kind, name)
            if kind != "parameters" and not name.endswith("k.bias"):  # whose gradient is rounding alone
                assert values.dtype == torch.bfloat16
                assert (values.float() - wide[kind][name]).norm() <= 2**-7 * wide[kind][name].norm() + 1e-12, name


def test_small_changes_come_through_on_average():
    """A second moment that decays by less than bfloat16 can say: rounded to nearest it would never change."""
    run, state = start(
        "1x1x1", **{"dtype": "float32", "optimizer.state_dtype": "bfloat16", "optimizer.betas": "0.9,0.999"}
    )
    (flat,) = run.flats.values()
    for moments in state.optimizer.state[0]:
        moments["exp_avg_sq"].fill_(1.0)
    run.sync.zero()
    for placed in flat.placed:
        flat.grad(placed).zero_()
    for _ in range(100):
        state.optimizer.step_at(0.0)
    values = torch.cat([m["exp_avg_sq"].float() for m in state.optimizer.state[0]])
    values = values[values != 1.0]  # padding is not rounded by chance
    assert len(values) > 10000 and abs(values.mean().item() - 0.999**100) < 0.002


def test_fused_weights_decay_alike():
    with pytest.raises(ConfigError, match="attention.q.weight.*must decay alike"):
        start("1x1x1", **LLAMA, **{"optimizer.no_decay": "*.attention.q.weight"})


@pytest.mark.parametrize("patterns", ["*embedding*,head.*", "*.bias,*norm*", "*norm*"])
def test_patterns_that_most_models_know_may_match_nothing_in_this_one(patterns: str):
    """The head of a tied model has the embedding's name; a model without biases has none."""
    start("1x1x1", **TIED, **{"optimizer.no_decay": patterns})


@pytest.mark.parametrize("patterns", ["layer.1.*", "*norm*,head.wieght", "*.bias,*.biases"])
def test_a_name_that_no_parameter_has_is_refused(patterns: str):
    with pytest.raises(ConfigError, match="is no parameter's name; names are such as "):
        start("1x1x1", **TIED, **{"optimizer.no_decay": patterns})


def test_gradients_are_there_for_the_reference():
    """The reference would agree with anything if there were none."""
    run, state = start("1x1x1", **LLAMA)
    advance(run, state, 1)
    assert all(g.abs().max() > 0 for g in gradients(run).values())
    assert make_batch(run.config, run.mesh, 0).num_tokens > 0
