"""`parallax bench`: the speed of a configuration on this machine, mesh by mesh, and how much of it the machine allows.

The limit is the rate of plain matrix products, at the sizes of the model's own MLP, with all ranks at work at once.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallax.config import Config
from parallax.config_io import load
from parallax.memory import format_bytes
from parallax.parity import ask_ranks, untraced

__all__ = ["run_bench"]

DEFAULT_STEPS, WARM_UP = 8, 2
SECONDS = 0.5


def run_bench(argv: Sequence[str]) -> int:
    """`[mesh=A] [mesh=B ...] [steps=N] [key=value ...]`: print the table. Raises ConfigError before anything starts."""
    meshes = [argument.partition("=")[2] for argument in argv if argument.startswith("mesh=")]
    rest = [argument for argument in argv if not argument.startswith("mesh=")]
    if not any(argument.startswith("steps=") for argument in rest):
        rest.append(f"steps={DEFAULT_STEPS}")
    rest = untraced(rest)
    configs = [load([*rest, f"mesh={mesh}"]) for mesh in meshes or default_meshes()]
    print(
        f"{'mesh':<8} {'step':>9} {'tokens/s':>10} {'GFLOP/s':>8} {'of products':>11} {'peak of a rank':>14}",
        flush=True,
    )
    for config in configs:
        row = ask_ranks(config.mesh_shape, [*rest, f"mesh={config.mesh}"], "parallax.bench_command")
        step = statistics.median(row["seconds"])
        rate = row["flops"] / step
        print(
            f"{config.mesh:<8} {1000 * step:>6.0f} ms {row['tokens'] / step:>10,.0f} {rate / 1e9:>8.1f} "
            f"{rate / row['products']:>10.0%}  {format_bytes(row['peak']):>14}",
            flush=True,
        )
    return 0


def default_meshes() -> list[str]:
    """One rank, and as many as there are cores, or GPUs, along each axis."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1
    size = 1 << (count.bit_length() - 1)
    return ["1x1x1"] if size == 1 else ["1x1x1", f"{size}x1x1", f"1x{size}x1", f"1x1x{size}"]


def measure(config: Config) -> dict[str, Any]:
    """Steps of the recipe on the mesh of this process group, and the rate of products of all its ranks together."""
    import torch

    from parallax.assemble import DTYPES, assemble
    from parallax.batches import token_batches
    from parallax.comm import all_reduce, barrier
    from parallax.corpus import corpus_for
    from parallax.memory import peak_memory_bytes
    from parallax.mesh import init_mesh
    from parallax.step import train_step

    mesh = init_mesh(config.mesh, device_type=config.device)
    corpus = corpus_for(config)
    run, state = assemble(config, mesh)
    batches = token_batches(corpus.train, seed=config.seed, **run.share)
    seconds, tokens = [], 0
    for batch in itertools.islice(batches, WARM_UP + config.steps):
        barrier(mesh.world, mesh.device)
        begun = time.perf_counter()
        tokens = train_step(run, state, batch).tokens
        barrier(mesh.world, mesh.device)
        seconds.append(time.perf_counter() - begun)
    barrier(mesh.world, mesh.device)
    rows = run.batch.microbatch_size * config.corpus.sequence_length
    found = torch.tensor([product_rate(rows, config, DTYPES[config.dtype], mesh.device)], device=mesh.device)
    most = torch.tensor([float(peak_memory_bytes(mesh.device))], device=mesh.device)
    return {
        "seconds": seconds[WARM_UP:],
        "tokens": tokens,
        "flops": run.plan.flops_per_token * tokens,
        "products": float(all_reduce(found, mesh.world)),
        "peak": float(all_reduce(most, mesh.world, "max")),
    }


def product_rate(rows: int, config: Config, dtype: Any, device: Any) -> float:
    """FLOPs a second of this rank's up and down products, forward and backward."""
    import torch

    from parallax.tensor.products import linear, product

    hidden, width = config.model.hidden, max(1, config.model.ffn_size // config.mesh_shape.tensor)
    x, up = (torch.randn(size, hidden, device=device, dtype=dtype) for size in (rows, width))
    y = linear(x, up, None)

    def once() -> None:
        linear(x, up, None), product(y, up), product(y.t(), x)

    once()
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS:
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        count += 1
    return count * 6.0 * rows * hidden * width / (time.perf_counter() - begun)


def _worker() -> None:
    """One rank of a run: `python -m parallax.bench_command RESULT key=value ...`."""
    found = measure(load(sys.argv[2:]))
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    from parallax.launch import entrypoint

    entrypoint(_worker)
