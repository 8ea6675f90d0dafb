"""From torchrun to the first step, beside a bare script that imports torch and makes the same groups.

    python benchmarks/startup.py [mesh=2x2x2] [rounds=5]

The seconds are those of the slowest rank, counted from the start of torchrun; the two take turns.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import asked, count, machine
from harness import mesh as mesh_of

MARK = "milestone "


def tell(marks: dict[str, float]) -> None:
    print(MARK + json.dumps(marks), flush=True)


def bare(mesh: str) -> None:
    """What any script must do."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    marks = {"import": time.time()}
    dist.init_process_group("gloo")
    marks["rendezvous"] = time.time()
    data, tensor, pipeline = map(int, mesh.split("x"))
    grid = torch.arange(data * tensor * pipeline).view(pipeline, data, tensor)
    for axis in range(3):
        if grid.shape[axis] > 1:
            for ranks in grid.movedim(axis, -1).reshape(-1, grid.shape[axis]).tolist():
                dist.new_group(ranks)
    marks["groups"] = time.time()
    tell(marks)


def whole(mesh_text: str) -> None:
    """What the recipe does until its first step is done."""
    import torch

    from parallax.assemble import assemble
    from parallax.batches import token_batches
    from parallax.config_io import load
    from parallax.corpus import corpus_for
    from parallax.mesh import init_mesh
    from parallax.metrics import Metrics  # noqa: F401 - part of what the recipe imports
    from parallax.resume import Checkpoints  # noqa: F401
    from parallax.step import train_step

    torch.set_num_threads(1)
    marks = {"import": time.time()}
    config = load([f"mesh={mesh_text}"])
    mesh = init_mesh(config.mesh, device_type="cpu")
    marks["groups"] = time.time()
    corpus = corpus_for(config)
    marks["corpus"] = time.time()
    run, state = assemble(config, mesh)
    marks["model"] = time.time()
    batches = token_batches(corpus.train, seed=config.seed, start_step=0, **run.share)
    train_step(run, state, next(iter(batches)))
    marks["first step"] = time.time()
    tell(marks)


def launch(which: str, mesh: str) -> dict[str, float]:
    """Seconds from the start of torchrun to each milestone, of the slowest rank."""
    size = math.prod(map(int, mesh.split("x")))
    command = ["torchrun", "--nproc_per_node", str(size), __file__, "--rank", which, mesh]
    begun = time.time()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # torch's byte code was written when it was installed
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    # Lines of several ranks may come to lie on one.
    marks = [json.JSONDecoder().raw_decode(text)[0] for text in done.stdout.split(MARK)[1:]]
    if len(marks) != size:
        raise SystemExit(done.stderr[-2000:])
    return {name: max(one[name] for one in marks) - begun for name in marks[0]}


def main() -> None:
    said = asked({"mesh": ("2x2x2", mesh_of), "rounds": ("5", count)}, sys.argv[1:])
    mesh, rounds = said.mesh, said.rounds
    found: dict[str, list[dict[str, float]]] = {"bare": [], "whole": []}
    for number in range(rounds):
        for which in ("bare", "whole") if number % 2 else ("whole", "bare"):
            found[which].append(launch(which, mesh))
    print(f"mesh {mesh}: {machine()}")
    for which, every in found.items():
        medians = {name: statistics.median(one[name] for one in every) for name in every[0]}
        print(f"{which:<6}", ", ".join(f"{name} {seconds:.2f} s" for name, seconds in medians.items()))
    ends = {which: [max(one.values()) for one in every] for which, every in found.items()}
    ratio = statistics.median(a / b for a, b in zip(ends["whole"], ends["bare"], strict=True))
    print(f"the first step is done {ratio:.2f} times as late as the bare script")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        {"bare": bare, "whole": whole}[sys.argv[2]](sys.argv[3])
    else:
        main()
