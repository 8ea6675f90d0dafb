"""What transformers saved, begun from on any mesh; what a mesh saved, loaded by transformers."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax.cli import main
from tests.hf_models import MODELS, begin_apart, imported, load_hf_logits, save_hf_model, whole_logits

pytest.importorskip("transformers", reason="it is in the test extra")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, torch.Tensor]]:
    """Each model's directory and logits; the Llama in several files."""
    found = {}
    for name in MODELS:
        directory = tmp_path_factory.mktemp(name)
        found[name] = directory, save_hf_model(name, directory, max_shard_size="60KB" if name == "llama" else "5GB")
    assert (found["llama"][0] / "model.safetensors.index.json").exists()
    return found


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ("1x1x1", {}),
        ("1x4x1", {}),  # two ranks share each key/value head
        ("1x2x1", {"tensor.sequence_parallel": "true"}),
        ("2x1x2", {"data.zero": 1}),
        ("2x2x1", {"data.zero": 3, "model.vocab_multiple": 8}),
        pytest.param("2x2x2", {"data.zero": 2, "tensor.sequence_parallel": "true"}, marks=pytest.mark.slow),
        pytest.param(
            "4x1x2", {"data.zero": 3, "data.shard_size": 2, "batch.num_microbatches": 1}, marks=pytest.mark.slow
        ),
        pytest.param("1x2x3", {"pipeline.schedule": "zb-h1"}, marks=pytest.mark.slow),
    ],
)
def test_any_mesh_begins_with_the_weights_that_transformers_saved(ranks, models, tmp_path, mesh: str, changes: Any):
    """The same logits; and exported again from that mesh's checkpoint, the same bits."""
    from safetensors.torch import load_file

    size = math.prod(map(int, mesh.split("x")))
    directories = {name: str(directory) for name, (directory, _) in models.items()}
    every = ranks(size, imported, mesh, directories, changes, str(tmp_path))
    for name, (directory, logits) in models.items():
        assert all(rank[name]["read"] == rank[name]["owned"] for rank in every), "a rank reads what it owns, once"
        ours = whole_logits([rank[name] for rank in every])
        assert logits.abs().max() > 1
        assert (ours - logits).abs().max() <= 1e-4, name
        out = tmp_path / f"{name}-out"
        argv = ["checkpoint", "export", str(tmp_path / name / "checkpoints/step-00000000"), str(out), "--to", "hf"]
        family = name.partition("-")[0]
        assert main([*argv, "--family", family]) == 0
        before = {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}
        after = load_file(out / "model.safetensors")
        if "gpt2" in name:  # which trains on 16 tokens, and keeps all 20 positions
            assert after["transformer.wpe.weight"].shape[0] == 20
        assert before.keys() == after.keys()
        assert all(after[key].equal(value) for key, value in before.items())
        assert (load_hf_logits(out) - logits).abs().max() <= 1e-6


def test_a_file_that_one_rank_lacks_ends_all_with_the_same_words(ranks, models, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(models["llama"][0], broken)
    next(broken.glob("model-00002-*")).unlink()
    said = ranks(2, begin_apart, "1x2x1", [str(models["llama"][0]), str(broken)])
    assert said[0] == said[1] and "is missing; copy the model again (rank 1)" in said[0]
