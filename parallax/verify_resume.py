"""Is a resumed run the run that was interrupted? Trains with a restart in the middle, and without, and compares all."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from parallax.checkpoint_command import run_checkpoint
from parallax.config import Config
from parallax.config_io import load
from parallax.errors import ConfigError
from parallax.parity import BOUNDS, Row, relative, run_ranks, untraced, write_rows

__all__ = ["run_verify_resume"]

DEFAULT_STEPS = 3


def run_verify_resume(argv: Sequence[str]) -> int:
    """`[mesh=A] [mesh=B] [steps=N] [key=value ...]`: 0 where the restart shows nowhere, else 1.

    On mesh A every loss and norm after the restart and every tensor of the last checkpoint must be equal bit for bit; a
    restart on mesh B must agree to rounding. Raises ConfigError before anything is started.
    """
    from parallax import checkpoint  # which brings torch

    meshes = [argument.partition("=")[2] for argument in argv if argument.startswith("mesh=")] or ["1x1x1"]
    steps = [argument.partition("=")[2] for argument in argv if argument.startswith("steps=")] or [str(DEFAULT_STEPS)]
    rest = [argument for argument in argv if not argument.startswith(("mesh=", "steps="))]
    if len(meshes) > 2 or len(steps) > 1 or not steps[0].isdecimal() or int(steps[0]) < 1:
        raise ConfigError("verify-resume takes steps=N of at least 1, and one or two meshes: mesh=2x1x1 mesh=1x2x2")
    taken = [a for a in rest if a.startswith(("output=", "resume=", "checkpoint."))]
    if taken:
        raise ConfigError(f"verify-resume makes its own checkpoints in a place of its own; leave {taken[0]} out")
    num = int(steps[0])
    rest = untraced([*rest, f"steps={2 * num}"])
    configs = [load([*rest, f"mesh={mesh}"]) for mesh in meshes]
    with tempfile.TemporaryDirectory() as folder:
        saved = f"{folder}/first/checkpoints/step-{num:08d}"

        def run(index: int, name: str, count: int, *more: str) -> list[Row]:
            arguments = [
                str(count),
                *rest,
                f"mesh={meshes[index]}",
                f"output={folder}/{name}",
                *more,
                "checkpoint.directory=none",
            ]
            return run_ranks(configs[index].mesh_shape, arguments, "parallax.verify_resume")

        straight = run(0, "straight", 2 * num)
        first = run(0, "first", num)
        second = run(0, "second", num, f"resume={saved}")
        ends = [checkpoint.latest(Path(folder) / name / "checkpoints") for name in ("straight", "second")]
        same = report(straight, [*first, *second], num, 0.0, meshes[0])
        print(f"the last checkpoints of both, mesh {meshes[0]}:")
        same = run_checkpoint(["diff", *map(str, ends)]) == 0 and same
        if len(meshes) == 2:
            other = run(1, "other", num, f"resume={saved}")
            same = report(straight, [*first, *other], num, BOUNDS[configs[0].dtype], meshes[1]) and same
    print("the restart shows nowhere" if same else "the restart SHOWS")
    return 0 if same else 1


def report(straight: Sequence[Row], resumed: Sequence[Row], num: int, bound: float, mesh: str) -> bool:
    """Print the steps after the restart beside those of the run without; whether they agree."""
    worst = 0.0
    print(f"restarted on mesh {mesh} after step {num}")
    for one, other in itertools.zip_longest(straight, resumed):
        if one is None or other is None:
            return False
        loss, norm = relative(other.loss, one.loss), relative(other.grad_norm, one.grad_norm)
        worst = max(worst, loss, norm)
        print(f"step {one.step:>4}  loss {one.loss:.15g} ({loss:.1e})  grad norm {one.grad_norm:.15g} ({norm:.1e})")
    print(f"largest relative difference {worst:.1e}, bound {bound:.0e}" if bound else f"difference {worst:g}, bound 0")
    return worst <= bound


def train(config: Config, num: int) -> list[Row]:
    """Resume as the configuration says, train `num` steps, save. On the mesh of this process group."""
    from parallax.assemble import assemble
    from parallax.batches import token_batches
    from parallax.corpus import corpus_for
    from parallax.mesh import init_mesh
    from parallax.resume import Checkpoints
    from parallax.step import train_step

    mesh = init_mesh(config.mesh, device_type=config.device)
    corpus = corpus_for(config)
    run, state = assemble(config, mesh)
    checkpoints = Checkpoints(run, Path(config.output))
    checkpoints.resume(state)
    batches = token_batches(corpus.train, seed=config.seed, start_step=state.batches, **run.share)
    results = [train_step(run, state, batch) for batch in itertools.islice(batches, num)]
    checkpoints.save(state)
    return [Row(result.step, result.loss, result.grad_norm) for result in results]


def _worker() -> None:
    """One rank of a run: `python -m parallax.verify_resume RESULT NUM key=value ...`."""
    write_rows(train(load(sys.argv[3:]), int(sys.argv[2])), Path(sys.argv[1]))


if __name__ == "__main__":
    from parallax.launch import entrypoint

    entrypoint(_worker)
