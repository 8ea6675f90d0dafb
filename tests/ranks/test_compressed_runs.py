"""Compression in whole runs: copies stay copies, a pipeline shows in no bit, and what is owed outlives a restart."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax import checkpoint
from parallax.batches import token_batches
from parallax.corpus import corpus_for
from parallax.data.feedback import Compressed
from parallax.errors import CheckpointError
from parallax.resume import Checkpoints
from parallax.step import train_step
from tests.cases import BASE, GPT2, LLAMA, TIED, advance, assemble_whole, gather_parameters, make_batch, start, worst

KINDS: dict[str, dict[str, Any]] = {
    "onebit": {"data.compression": "onebit"},
    "topk": {"data.compression": "topk", "data.compression_ratio": 0.05},
    "powersgd": {"data.compression": "powersgd", "data.compression_rank": 2},
    "adasum": {"data.reduction": "adasum"},
}
SMALL = {"model.layers": 3, "model.hidden": 24, "model.heads": 6, "model.ffn": 36, "corpus.sequence_length": 8}
SMALL |= {"dtype": "float32"}
# Learned positions are a matrix that every tensor rank has; with one key head all of them have the same one.
COPIES = SMALL | GPT2 | TIED | {"model.bias": "false", "model.kv_heads": 1, "check_replicas_every": 1}


def copies(mesh: str, changes: dict[str, Any]) -> list[Any]:
    run, state = start(mesh, **changes)
    rows = advance(run, state, 20)
    return [rows, gather_parameters(run, state)]


@pytest.mark.parametrize("kind", KINDS)
def test_copies_stay_equal_for_20_steps(ranks, kind: str):
    """Checked after every step: data ranks, both uses of the tied weight, positions, norms and the one key head."""
    found = ranks(8, copies, "2x2x2", COPIES | KINDS[kind])
    assert all(len(rows) == 20 and rows == found[0][0] for rows, _ in found)
    assemble_whole([parameters for _, parameters in found])


def rows_of(mesh: str, changes: dict[str, Any]) -> list[Any]:
    run, state = start(mesh, **changes)
    return advance(run, state, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_equals_no_pipeline_bit_for_bit(ranks, kind: str):
    """Every parameter is compressed by itself, so it makes no difference which others are in its bucket."""
    size = 2 if kind == "adasum" else 3
    changes = SMALL | LLAMA | TIED | KINDS[kind] | {"data.bucket_bytes": 12000}  # buckets end elsewhere
    alone = ranks(size, rows_of, f"{size}x1x1", changes)[0]
    assert ranks(2 * size, rows_of, f"{size}x1x2", changes)[0] == alone


def test_adasum_takes_dot_products_over_tensor(ranks):
    changes = SMALL | LLAMA | {"dtype": "float64", "model.kv_heads": 1} | KINDS["adasum"]
    alone = ranks(4, rows_of, "4x1x1", changes)[0]
    assert worst(ranks(8, rows_of, "4x2x1", changes)[0], alone) <= 1e-10
    assert worst(ranks(2, rows_of, "2x1x1", changes)[0], alone) > 1e-3, "another number of ranks is another rule"


def scaled(window: int, kind: str) -> list[Any]:
    changes = {"dtype": "float16", "precision.loss_scale": 256.0, "precision.loss_scale_window": window}
    run, state = start("2x1x1", **SMALL | GPT2 | KINDS[kind] | changes | {"optimizer.lr": 1e-4})
    return advance(run, state, 5)


@pytest.mark.parametrize("kind", ["topk", "powersgd"])
def test_what_is_owed_does_not_depend_on_the_loss_scale(ranks, kind: str):
    """A scale that doubles at every step and one that never does: float16 rounding apart, the same."""
    changing, constant = (ranks(2, scaled, window, kind)[0] for window in (1, 1000))
    assert worst(changing, constant) < 0.01


# --- what is owed, in checkpoints ---------------------------------------------------------------


def owed_of(run: Any) -> dict[str, list[Any]]:
    """What this rank owes: name -> [(data rank, box, values)]."""
    found: dict[str, list[Any]] = {}
    if isinstance(run.sync, Compressed):
        for part, values in run.sync.owed():
            found.setdefault(part.spec.name, []).append((run.mesh.grad.rank, part.spec.box, values.clone()))
    return found


def total(every: list[Any], when: str) -> dict[str, Tensor]:
    """The sum over data ranks of what is owed, each box once, in float64."""
    whole: dict[str, Tensor] = {}
    seen = set()
    for found in every:
        for name, boxes in found[when].items():
            for data_rank, box, values in boxes:
                if (name, data_rank, box) in seen:
                    continue
                seen.add((name, data_rank, box))
                shape = found["shapes"][name]
                part = whole.setdefault(name, torch.zeros(shape, dtype=torch.float64))
                part[tuple(slice(a, b) for a, b in box)] += values.double()
    return whole


def go(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str = "none") -> dict[str, Any]:
    """Resume as wished, advance, save."""
    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    before = owed_of(run)
    rows = advance(run, state, num_steps)
    found = {"rows": rows, "before": before, "after": owed_of(run), "parameters": gather_parameters(run, state)}
    found["shapes"] = {spec.name: spec.global_shape for specs in run.specs.values() for spec in specs}
    checkpoints.save(state)
    return found


LOSSY = ["onebit", "topk", "powersgd"]


@pytest.mark.parametrize("kind", LOSSY)
def test_two_and_two_steps_are_four_bit_for_bit(ranks, tmp_path: Path, kind: str):
    changes = SMALL | LLAMA | TIED | KINDS[kind]
    straight = ranks(8, go, "2x2x2", changes, str(tmp_path / "a"), 4)
    first = ranks(8, go, "2x2x2", changes, str(tmp_path / "b"), 2)
    second = ranks(8, go, "2x2x2", changes, str(tmp_path / "b"), 2, "auto")
    assert first[0]["rows"] + second[0]["rows"] == straight[0]["rows"]
    for rank in range(8):
        for name, boxes in straight[rank]["after"].items():
            for (_, _, values), (_, _, again) in zip(boxes, second[rank]["after"][name], strict=True):
                assert values.equal(again), f"what rank {rank} owes of {name}"
    whole, again = (assemble_whole([found["parameters"] for found in run]) for run in (straight, second))
    assert all(values.equal(again[name]) for name, values in whole.items())


def test_nothing_owed_is_lost_on_another_mesh(ranks, tmp_path: Path):
    """More and fewer data ranks, other tensor and pipeline sizes, another compressor; alone the first step pays all."""
    before: list[Any] = []
    for mesh, kind in (("4x1x1", "topk"), ("2x2x1", "powersgd"), ("3x1x2", "onebit"), ("1x1x1", "powersgd")):
        size = math.prod(map(int, mesh.split("x")))
        changes = SMALL | LLAMA | TIED | KINDS[kind]
        found = ranks(size, go, mesh, changes, str(tmp_path), 1, "auto")
        if before:
            saved, loaded = total(before, "after"), total(found, "before")
            assert saved.keys() == loaded.keys() and all(values.any() for values in saved.values())
            for name, values in saved.items():
                torch.testing.assert_close(loaded[name], values, rtol=1e-6, atol=1e-9, msg=f"{name} {mesh}")
        before = found
    assert not any(values.any() for values in total(before, "after").values()), "one rank owes nobody"
    manifest = checkpoint.read_manifest(checkpoint.find(tmp_path / "checkpoints")[-1])
    assert not any(name.startswith(("owed/", "warm/")) for name in manifest.tensors)


def refused(mesh: str, changes: dict[str, Any], output: str) -> str:
    run, state = start(mesh, **changes | {"output": output, "resume": "auto"})
    try:
        Checkpoints(run, Path(output)).resume(state)
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_run_that_could_not_pay_is_refused_and_told_how(ranks, tmp_path: Path):
    changes = SMALL | LLAMA
    ranks(2, go, "2x1x1", changes | KINDS["powersgd"], str(tmp_path), 1)
    for other in ({}, {"data.zero": 1}, {"data.compression": "bfloat16"}):
        for text in ranks(2, refused, "2x1x1", changes | other, str(tmp_path)):
            assert re.search(
                "from data.compression=powersgd, and this run would lose them; set data.compression as", text
            )
    paying = {"data.compression": "topk", "data.compression_ratio": 1}
    ranks(2, go, "2x1x1", changes | paying, str(tmp_path), 1, "auto")
    assert ranks(2, refused, "2x1x1", changes, str(tmp_path)) == ["", ""]
    assert ranks(2, refused, "2x1x1", changes | KINDS["onebit"], str(tmp_path)) == ["", ""], "it begins with no debts"


def back(output: str) -> list[bool]:
    """Save, go on, and back: what is owed, and PowerSGD's factors, are those that were saved."""
    run, state = start("2x1x1", **SMALL | LLAMA | KINDS["powersgd"] | {"on_nan": "rollback", "output": output})
    checkpoints = Checkpoints(run, Path(output))
    advance(run, state, 2)
    checkpoints.save(state)
    assert isinstance(run.sync, Compressed)
    saved = [values.clone() for _, values in run.sync.owed()] + [q.clone() for q in run.sync.compressor.warm.values()]
    advance(run, state, 1)
    run.sync.zero()  # a step that is not taken
    run.pipeline.run(make_batch(run.config, run.mesh, 3).split(run.schedule.num_microbatches), scale=1.0)
    checkpoints.roll_back(state)
    now = [values for _, values in run.sync.owed()] + list(run.sync.compressor.warm.values())
    return [a.equal(b) for a, b in zip(saved, now, strict=True)]


def test_a_roll_back_takes_back_what_is_owed(ranks, tmp_path: Path):
    assert all(all(same) for same in ranks(2, back, str(tmp_path)))


# --- training -----------------------------------------------------------------------------------


def learn(changes: dict[str, Any], num_steps: int) -> float:
    """The mean loss of the last 20 steps on real text."""
    options = BASE | {"dtype": "float32", "model.layers": 2, "model.hidden": 64, "model.heads": 4, "model.ffn": 128}
    options |= {"model.vocab": 256, "corpus.sequence_length": 64, "optimizer.lr": 1e-3, "optimizer.warmup_steps": 20}
    run, state = start("4x1x1", **options | {"steps": num_steps} | changes)
    corpus = corpus_for(run.config)
    losses = []
    for batch, _ in zip(token_batches(corpus.train, seed=1, **run.share), range(num_steps), strict=False):
        losses.append(train_step(run, state, batch).loss)
    return sum(losses[-20:]) / 20


def learn_forgetful(changes: dict[str, Any], num_steps: int) -> float:
    """The same, but what is not sent is lost."""
    honest = Compressed.publish

    def publish(self: Compressed) -> None:
        honest(self)
        self.reset(owes=False)

    Compressed.publish = publish  # type: ignore[method-assign]
    return learn(changes, num_steps)


SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.3, "optimizer.momentum": 0.9}
FINER = {"onebit": {}, "topk": {"data.compression_ratio": 0.2}, "powersgd": {"data.compression_rank": 8}, "adasum": {}}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_comes_close_to_that_without_compression(ranks, optimizer: str):
    """Within 3 percent with SGD, for which it was made; with AdamW within 5, sending up to four times that."""
    base = SGD if optimizer == "sgd" else {}
    kinds = {k: base | v for k, v in KINDS.items() if k != "adasum"}
    kinds = kinds if base else {k: v | FINER[k] for k, v in KINDS.items()}
    plain = ranks(4, learn, base, 200)[0]
    excess = {kind: ranks(4, learn, changes, 200)[0] / plain - 1 for kind, changes in kinds.items()}
    print(optimizer, f"without {plain:.4f};", {kind: f"{more:+.2%}" for kind, more in excess.items()})
    assert all(more < (0.03 if base else 0.05) for more in excess.values())
    if not base:
        lost = ranks(4, learn_forgetful, kinds["powersgd"], 200)[0] / plain - 1
        print(f"powersgd without feedback {lost:+.2%}")
        assert excess["powersgd"] < 0.03 < lost, "without feedback it is worse"
