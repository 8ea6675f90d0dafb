"""Does another mesh train the same model? Runs one configuration on several meshes and compares every step.

The ranks are processes of their own: python for one, torchrun for more, on this machine's loopback.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax.config import Config
from parallax.config_io import load
from parallax.errors import ConfigError
from parallax.mesh import MeshShape

__all__ = [
    "BOUNDS",
    "Row",
    "ask_ranks",
    "compare",
    "relative",
    "run_parity",
    "run_ranks",
    "train_rows",
    "untraced",
    "write_rows",
]

BOUNDS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2, "float8": 1e-1}
"""The largest relative difference of loss or gradient norm that rounding explains in the first steps; later on training
spreads any rounding. A wrong reduction moves the norm by percents in the first step; in float64 nothing hides."""

DEFAULT_STEPS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One step on one mesh."""

    step: int
    loss: float
    grad_norm: float


def run_parity(argv: Sequence[str]) -> int:
    """`mesh=A mesh=B [mesh=C ...] [key=value ...]`: print the table; 0 if all agree with the first, else 1.

    Raises ConfigError for bad arguments, before anything is started.
    """
    meshes = [argument.partition("=")[2] for argument in argv if argument.startswith("mesh=")]
    rest = [argument for argument in argv if not argument.startswith("mesh=")]
    if len(meshes) < 2:
        raise ConfigError("parity compares meshes; give two or more, as in: parallax parity mesh=1x1x1 mesh=2x2x2")
    if not any(argument.startswith("steps=") for argument in rest):
        rest.append(f"steps={DEFAULT_STEPS}")
    rest = untraced(rest)
    configs = [load([*rest, f"mesh={mesh}"]) for mesh in meshes]
    if len({config.mesh_shape for config in configs}) < len(configs):
        raise ConfigError(f"parity: {' and '.join(meshes)} are not all different; give each mesh once")
    sizes = {resolve_global_size(config) for config in configs}
    if len(sizes) > 1:
        raise ConfigError(
            f"parity: the meshes would train on global batches of {', '.join(map(str, sorted(sizes)))} samples; "
            "set batch.global_size, so that they see the same"
        )
    runs = [run_ranks(config.mesh_shape, [*rest, f"mesh={mesh}"]) for mesh, config in zip(meshes, configs, strict=True)]
    text, worst = compare(meshes, runs)
    bound = BOUNDS[configs[0].dtype]
    print(text)
    agree = worst <= bound
    verdict = "the same model" if agree else "NOT the same model"
    print(f"{verdict}: largest relative difference {worst:.2e}, bound {bound:.0e} for {configs[0].dtype}")
    return 0 if agree else 1


def untraced(arguments: Sequence[str]) -> list[str]:
    """Without the trace that a file may ask for: these few steps draw nothing, and may end before its step."""
    traced = any(argument.startswith("trace=") for argument in arguments)
    return [*arguments] if traced else [*arguments, "trace=none"]


def resolve_global_size(config: Config) -> int:
    from parallax.config import resolve_batch

    return resolve_batch(config).global_size


def run_ranks(shape: MeshShape, arguments: Sequence[str], module: str = "parallax.parity") -> list[Row]:
    """Train on one mesh in processes of its own; the rows that the module's `write_rows` left."""
    return [Row(**row) for row in ask_ranks(shape, arguments, module)]


def ask_ranks(shape: MeshShape, arguments: Sequence[str], module: str) -> Any:
    """What the ranks of one mesh, each `python -m MODULE RESULT ARGUMENTS`, left as JSON; their log goes to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        command = [sys.executable]
        if shape.size > 1:
            command += ["-m", "torch.distributed.run", "--nproc_per_node", str(shape.size)]
            command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        command += ["-m", module, str(result), *arguments]
        # One thread a rank, alone too: more would sum in another order for no reason of the mesh.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        print(f"running mesh {shape.describe()}", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=environment)
        if done.returncode:
            raise ConfigError(f"the run on mesh {shape} failed (exit code {done.returncode}); its error is above")
        return json.loads(result.read_text())


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; infinite where either is not finite or only one is zero."""
    if value == reference:
        return 0.0
    difference = abs(value - reference) / abs(reference) if reference else float("inf")
    return difference if difference == difference else float("inf")


def compare(meshes: Sequence[str], runs: Sequence[Sequence[Row]]) -> tuple[str, float]:
    """The table, and the largest relative difference between the first mesh and any other."""
    width = max(len(mesh) for mesh in meshes)
    lines = [f"step  {'mesh':<{width}}  {'loss':>20}  {'rel. diff':>9}  {'grad norm':>20}  {'rel. diff':>9}"]
    worst = 0.0
    for rows in itertools.zip_longest(*runs):
        first = rows[0]
        for mesh, row in zip(meshes, rows, strict=True):
            if row is None or first is None:
                lines.append(f"a run ended early: mesh {mesh}")
                worst = float("inf")
                continue
            start = f"{row.step:>4}  {mesh:<{width}}  "
            loss, norm = relative(row.loss, first.loss), relative(row.grad_norm, first.grad_norm)
            worst = max(worst, loss, norm)
            shown = ("", "") if row is first else (f"{loss:.1e}", f"{norm:.1e}")
            lines.append(start + f"{row.loss:>20.15g}  {shown[0]:>9}  {row.grad_norm:>20.15g}  {shown[1]:>9}")
    return "\n".join(lines), worst


def train_rows(config: Config) -> list[Row]:
    """Train config.steps steps as the recipe does, on the mesh of this process group. Writes nothing."""
    from parallax.assemble import assemble
    from parallax.batches import token_batches
    from parallax.corpus import corpus_for
    from parallax.mesh import init_mesh
    from parallax.resume import Checkpoints
    from parallax.step import train_step

    mesh = init_mesh(config.mesh, device_type=config.device)
    corpus = corpus_for(config)
    run, state = assemble(config, mesh)
    Checkpoints(run, Path(config.output)).begin(state)
    batches = token_batches(corpus.train, seed=config.seed, **run.share)
    results = [train_step(run, state, batch) for batch in itertools.islice(batches, config.steps)]
    return [Row(result.step, result.loss, result.grad_norm) for result in results]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Rank 0's answer to `run_ranks`."""
    if os.environ.get("RANK", "0") == "0":
        path.write_text(json.dumps([{"step": r.step, "loss": r.loss, "grad_norm": r.grad_norm} for r in rows]))


def _worker() -> None:
    """One rank of a run: `python -m parallax.parity RESULT key=value ...`."""
    write_rows(train_rows(load(sys.argv[2:])), Path(sys.argv[1]))


if __name__ == "__main__":
    from parallax.launch import entrypoint

    entrypoint(_worker)
