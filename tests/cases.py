"""Small models and batches that the tests share. Sizes that hide nothing: no two are equal, few divide evenly."""

from __future__ import annotations

from typing import Any

import torch

from parallax.assemble import Run, assemble
from parallax.batches import IGNORE, Batch
from parallax.config import Config
from parallax.config_io import load
from parallax.mesh import Mesh, init_mesh
from parallax.step import TrainState, evaluate, train_step

torch.set_num_threads(1)  # as the ranks have it: two threads add up in another order

BASE: dict[str, Any] = {
    "dtype": "float64",
    "model.layers": 7,  # no stage count of the tests divides the 9 units or the 7 layers
    "model.hidden": 48,
    "model.heads": 24,
    "model.ffn": 48,
    "model.vocab": 101,  # prime: no tensor size divides it
    "corpus.sequence_length": 24,
    "batch.global_size": 24,
    "batch.num_microbatches": 2,
    "optimizer.lr": 0.01,
    "optimizer.warmup_steps": 0,
    "data.bucket_bytes": 20000,  # several buckets
}
GPT2: dict[str, Any] = {
    "model.positions": "learned",
    "model.norm": "layernorm",
    "model.activation": "gelu",
    "model.bias": "true",
}
LLAMA: dict[str, Any] = {"model.kv_heads": 6}
QWEN3: dict[str, Any] = {"model.qk_norm": "true", "model.head_dim": 6}  # heads wider than the stream
TIED = {"model.tie_embeddings": "true"}
SEQUENCE_PARALLEL = {"tensor.sequence_parallel": "true"}

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2-tied": GPT2 | TIED,
    "gpt2-dropout-sp": GPT2 | SEQUENCE_PARALLEL | {"model.dropout": 0.2},
    "gpt2-tied-dropout": GPT2 | TIED | {"model.dropout": 0.2},
    "gpt2-dropout": GPT2 | {"model.dropout": 0.2},
    "llama": LLAMA,
    "llama-tied-sp": LLAMA | TIED | SEQUENCE_PARALLEL,
    "llama-padded": LLAMA | {"model.vocab_multiple": 16},
    "qwen3": LLAMA | QWEN3,
    "qwen3-tied-sp": LLAMA | QWEN3 | TIED | SEQUENCE_PARALLEL,
}


def fit_kv_heads(changes: dict[str, Any], tensor: int) -> dict[str, Any]:
    """Key/value heads that this tensor size shares or, at 4 and 8, repeats."""
    if "model.kv_heads" not in changes:
        return changes
    return changes | {"model.kv_heads": {4: 2, 8: 4}.get(tensor, 6)}


def make_config(mesh: str, **changes: Any) -> Config:
    options = BASE | changes | {"mesh": mesh}
    return load([f"{key}={value}" for key, value in options.items() if value is not None])


def make_batch(config: Config, mesh: Mesh, step: int) -> Batch:
    """Random tokens of which each sample ignores another share, so that no two microbatches count alike."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = config.batch.global_size or 24
    length = config.corpus.sequence_length
    tokens = torch.randint(0, config.model.vocab, (size, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    share = torch.linspace(0, 0.9, size)[:, None]
    targets[torch.rand(size, length, generator=generator) < share] = IGNORE
    each = size // mesh.data.size
    mine = slice(mesh.data.rank * each, (mesh.data.rank + 1) * each)
    parts = (tokens[mine, :-1].contiguous(), targets[mine], torch.arange(size)[mine])
    return Batch(*(part.to(mesh.device) for part in parts), step)


def start(mesh: str, *, on: str = "cpu", **changes: Any) -> tuple[Run, TrainState]:
    """on: the device, cpu or cuda."""
    config = make_config(mesh, **changes)
    return assemble(config, init_mesh(config.mesh, device_type=on))


def advance(run: Run, state: TrainState, num_steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    rows = []
    for _ in range(num_steps):
        result = train_step(run, state, make_batch(run.config, run.mesh, state.step))
        rows.append((result.loss, result.grad_norm))
    return rows


def train(mesh: str, changes: dict[str, Any], num_steps: int = 4) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, then (validation loss, 1)."""
    run, state = start(mesh, **changes)
    rows = advance(run, state, num_steps)
    return [*rows, (evaluate(run, [make_batch(run.config, run.mesh, 99)]), 1.0)]


def train_all(mesh: str, variants: dict[str, dict[str, Any]], num_steps: int = 4) -> dict[str, list[Any]]:
    return {name: train(mesh, changes, num_steps) for name, changes in variants.items()}


def gather_parameters(
    run: Run, state: TrainState, kind: str = "parameters"
) -> dict[str, list[tuple[Any, torch.Tensor]]]:
    """This rank's boxes of every canonical parameter: name -> [(box, values)]."""
    found: dict[str, list[tuple[Any, torch.Tensor]]] = {}
    for stage, flat in run.flats.items():
        segments = state.optimizer.flat_state(stage)[kind]
        for piece in flat.pieces:
            for box, start, stop in piece.boxes():
                if segments[piece.segment] is None:
                    continue
                values = segments[piece.segment][start:stop].view([b - a for a, b in box])
                found.setdefault(piece.spec.name, []).append((box, values.clone()))
    return found


def assemble_whole(parts: list[dict[str, list[tuple[Any, torch.Tensor]]]]) -> dict[str, torch.Tensor]:
    """The whole tensors from the boxes of all ranks. Boxes that several ranks hold must agree bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    every = [(name, box, values) for part in parts for name, boxes in part.items() for box, values in boxes]
    for name, box, _ in every:
        old = shapes.setdefault(name, [0] * len(box))
        shapes[name] = [max(size, stop) for size, (_, stop) in zip(old, box, strict=True)]
    for name, box, values in every:
        if name not in whole:
            whole[name] = torch.zeros(shapes[name], dtype=values.dtype)
            seen[name] = torch.zeros(shapes[name], dtype=torch.bool)
        cut = tuple(slice(a, b) for a, b in box)
        again = seen[name][cut]
        assert torch.equal(whole[name][cut][again], values[again]), f"replicas of {name} differ"
        whole[name][cut] = values
        seen[name][cut] = True
    assert all(mask.all() for mask in seen.values())
    return whole


def worst(rows: list[Any], reference: list[Any]) -> float:
    """The largest relative difference of losses and gradient norms."""
    assert len(rows) == len(reference)
    return max(
        abs(a / b - 1) for row, other in zip(rows, reference, strict=True) for a, b in zip(row, other, strict=True)
    )
