"""Tiny models of the Hugging Face families, and the logits of either side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from parallax.assemble import Run, assemble
from parallax.batches import Batch
from parallax.checkpoint import files, hf_import
from parallax.config_io import load
from parallax.errors import CheckpointError
from parallax.mesh import init_mesh
from parallax.resume import Checkpoints
from parallax.step import TrainState, evaluate

LENGTH, SAMPLES, VOCAB = 16, 4, 101
GPT2: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 48, "n_head": 4, "n_layer": 3, "n_positions": 20, "n_inner": 80}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-bias-tied": (
        "LlamaForCausalLM",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": LENGTH, "head_dim": 8}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"layer_norm_epsilon": 1e-4}),
    "gpt2-untied": ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}),
}
BASE: dict[str, Any] = {
    "corpus.sequence_length": LENGTH,
    "batch.global_size": SAMPLES,
    "batch.num_microbatches": 2,
    "data.bucket_bytes": 8000,
}


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model.kv_heads": 2, "model.rope_theta": 700, "model.norm_eps": 1e-4},
    "llama-bias-tied": {"model.bias": "true", "model.tie_embeddings": "true", "model.head_dim": 8},
    "mistral": {"model.kv_heads": 1},
    "qwen3": {"model.qk_norm": "true", "model.head_dim": 16, "model.kv_heads": 2, "model.tie_embeddings": "true"},
    "gpt2": {"model.tie_embeddings": "true", "model.bias": "true", "model.norm_eps": 1e-4},
    "gpt2-untied": {"model.bias": "true"},
    "gpt2-unbiased": {},
}
"""The same families by our own keys."""
GPT2_SHAPE = {"model.positions": "learned", "model.norm": "layernorm", "model.activation": "gelu"}
SIZES = {"model.hidden": 48, "model.heads": 4, "model.layers": 3, "model.ffn": 80, "model.vocab": VOCAB}


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(3))


def save_hf_model(name: str, directory: Path, **options: Any) -> torch.Tensor:
    """Write a model with random weights, biases and norms too; returns its logits [B, T, V]."""
    import transformers

    architecture, arguments = MODELS[name]
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**arguments | {"bos_token_id": None, "eos_token_id": None})).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(directory, **options)
    return hf_logits(model)


def hf_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def load_hf_logits(directory: Path) -> torch.Tensor:
    """What transformers makes of a directory. Every tensor in it must have a place, and every place a tensor."""
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    return hf_logits(model.float().eval())


def run_of(mesh: str, changes: dict[str, Any]) -> tuple[Run, TrainState]:
    config = load([f"{key}={value}" for key, value in (BASE | changes | {"mesh": mesh}).items()])
    return assemble(config, init_mesh(mesh, device_type="cpu"))


def save_our_model(name: str, output: Path, **changes: Any) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor]]:
    """Save a checkpoint of a model with random weights, biases and norms too. Returns its directory, its logits
    and its parameters by canonical name."""
    shape = SHAPES[name] | (GPT2_SHAPE if name.startswith("gpt2") else {})
    run, state = run_of("1x1x1", SIZES | shape | {"output": str(output)} | changes)
    generator = torch.Generator().manual_seed(17)
    values = {}
    for stage, flat in run.flats.items():
        segments = state.optimizer.flat_state(stage)["parameters"]
        for segment in segments:
            segment.add_(torch.randn(segment.shape, generator=generator) * 0.1)
        for piece in flat.pieces:
            values[piece.spec.name] = segments[piece.segment][piece.start : piece.stop].view(piece.spec.global_shape)
    state.optimizer.publish()
    return Checkpoints(run, output).save(state), whole_logits([local_logits(run)]), values


def local_logits(run: Run) -> dict[str, Any]:
    """This rank's part of the logits of `tokens`, on the last stage: [its samples * T, its rows of the vocabulary]."""
    found: list[torch.Tensor] = []
    heads = [stage.head for stage in run.stages.values() if getattr(stage, "head", None) is not None]
    # The head gives the loss; without targets it gives the logits.
    hooks = [head.register_forward_hook(lambda head, args, loss: found.append(head.forward(args[0]))) for head in heads]
    data = run.mesh.data
    each = SAMPLES // data.size
    mine = slice(data.rank * each, (data.rank + 1) * each)
    samples = tokens()[mine]
    evaluate(run, [Batch(samples, samples, torch.arange(SAMPLES)[mine], 0)])
    for hook in hooks:
        hook.remove()
    if not heads:
        return {}
    start, stop = heads[0].vocab_range
    return {"data": data.rank, "start": start, "logits": torch.cat(found)[:, : stop - start]}


def whole_logits(parts: list[dict[str, Any]]) -> torch.Tensor:
    """[B, T, V] from the parts of all ranks."""
    parts = sorted((part for part in parts if "logits" in part), key=lambda part: (part["data"], part["start"]))
    rows = {part["data"]: [p["logits"] for p in parts if p["data"] == part["data"]] for part in parts}
    return torch.cat([torch.cat(columns, dim=1) for columns in rows.values()]).view(SAMPLES, LENGTH, VOCAB)


def imported(mesh: str, directories: dict[str, str], changes: dict[str, Any], save: str = "") -> dict[str, Any]:
    """This rank's logits of every model after init_from, and how many elements it read; `save`: where a checkpoint of
    each goes."""
    found = {}
    count = [0]

    def counted(*args: Any) -> torch.Tensor:
        count[0] += (part := files.read_part(*args)).numel()
        return part

    hf_import.read_part = counted
    for name, directory in directories.items():
        count[0] = 0
        run, state = run_of(mesh, changes | {"init_from": directory})
        checkpoints = Checkpoints(run, Path(save) / name)
        checkpoints.begin(state)
        pieces = [piece for flat in run.flats.values() for piece in flat.pieces]
        owned = sum(piece.stop - piece.start for piece in pieces)
        found[name] = local_logits(run) | {"read": count[0], "owned": owned}
        if save:
            checkpoints.save(state)
    return found


def begin_apart(mesh: str, directories: list[str]) -> str:
    """Each rank begins from a directory of its own: what it then says."""
    run, state = run_of(mesh, {"init_from": directories[0]})
    object.__setattr__(run.config, "init_from", directories[run.mesh.rank])
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(run, Path(directories[0])).begin(state)
    return str(caught.value)
