"""Where the memory goes: what was predicted beside what the first step took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import reduce

import torch
from torch import Tensor

from parallax.assemble import Run
from parallax.comm import gather_json
from parallax.memory import format_bytes, peak_memory_bytes
from parallax.models.memory import StageMemory
from parallax.step import TrainState

__all__ = ["describe_memory", "held_bytes"]


def describe_memory(run: Run, state: TrainState) -> str:
    """One line for the rank that has had most, after a step: parameters, gradients, optimizer, activations, each with
    what was predicted for it.

    Activations are what is left of the peak (CUDA's allocator, or the resident set since the run was assembled) when
    the others are taken off; with zero=2 and 3 so are the buckets under way. Collectives: a JSON text over the world.
    """
    held = held_bytes(run, state)
    peak = peak_memory_bytes(run.mesh.device) - run.baseline_bytes
    rest = max(0, peak - sum(held.values()))
    wished = reduce(StageMemory.__add__, (run.plan.memory[stage] for stage in run.stages))
    mine = {name: [value, asdict(wished)[name]] for name, value in (held | {"activations": rest}).items()}
    every = gather_json(mine, run.mesh.world, run.mesh.device)
    rank = max(range(len(every)), key=lambda r: sum(value for value, _ in every[r].values()))
    names = {"activations": "activations and what is temporary"}
    parts = [f"{names.get(n, n)} {format_bytes(m)} ({format_bytes(p)})" for n, (m, p) in every[rank].items()]
    total = sum(value for value, _ in every[rank].values())
    return f"memory of rank {rank}, measured (predicted): {', '.join(parts)}; in all {format_bytes(total)}"


def held_bytes(run: Run, state: TrainState) -> dict[str, int]:
    """Bytes on this rank's device between two steps: parameters, gradients, optimizer."""
    device = run.mesh.device
    found = {"parameters": 0, "gradients": _bytes(run.sync.held(), device), "optimizer": 0}
    for stage, flat in run.flats.items():
        parameters, gradients = flat.held()
        found["parameters"] += _bytes(parameters, device)
        found["gradients"] += _bytes(gradients, device)
        masters = state.optimizer.masters[stage] if state.optimizer.apart else []
        moments = [tensor for kept in state.optimizer.state[stage] for tensor in kept.values()]
        found["optimizer"] += _bytes([*masters, *moments], device)
    return found


def _bytes(tensors: Iterable[Tensor], device: torch.device) -> int:
    return sum(t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type)
