"""The same model, weights and data trained by parallax and by its peers, on each mesh, in turns.

    python benchmarks/training.py [mesh=2x2x2,1x1x2] [rounds=7] [peers=native,fsdp] [sp=false|true|both] [append=FILE]

GPT-2 shaped, 8 layers of 256, 8 heads, 256 tokens, 512 words, 6.65 M parameters; global batch 16 in microbatches of 2,
float32, AdamW, no clipping. One thread a rank. A row whose losses differ by more than 1e-5 is void.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Row, Team, compare, machine, serve

SHAPE = {"layers": 8, "hidden": 256, "heads": 8, "vocab": 512, "length": 256}
GLOBAL_BATCH, MICROBATCH = 16, 2
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MESHES = ("1x1x1", "2x1x1", "4x1x1", "1x2x1", "1x4x1", "1x1x2", "1x1x4", "2x1x2", "2x2x1", "2x2x2")
NATIVE = {"native": "ddp", "fsdp": "fsdp", "replicate": "replicate"}


def keys_of(mesh: str, sequence_parallel: bool, extra: list[str]) -> list[str]:
    """The configuration of parallax."""
    shape = [f"model.{key}={SHAPE[key]}" for key in ("layers", "hidden", "heads", "vocab")]
    gpt2 = ["model.positions=learned", "model.norm=layernorm", "model.activation=gelu", "model.bias=true"]
    batch = [f"batch.global_size={GLOBAL_BATCH}", f"batch.microbatch_size={MICROBATCH}"]
    adamw = [f"optimizer.{key}={ADAMW[key]}" for key in ("lr", "eps", "weight_decay")]
    adamw += ["optimizer.betas=[0.9,0.95]", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
    more = [f"mesh={mesh}", f"corpus.sequence_length={SHAPE['length']}", "optimizer.max_grad_norm=0"]
    more.append(f"tensor.sequence_parallel={str(sequence_parallel).lower()}")
    return shape + gpt2 + batch + adamw + more + extra


def data_of(step: int, rank: int, size: int) -> Any:
    """(tokens, targets) of a data rank: the same samples for everybody, whatever the mesh."""
    import torch

    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, SHAPE["vocab"], (GLOBAL_BATCH, SHAPE["length"] + 1), generator=generator)
    each = GLOBAL_BATCH // size
    mine = tokens[rank * each : (rank + 1) * each]
    return mine[:, :-1].contiguous(), mine[:, 1:].contiguous()


def build_parallax(mesh_text: str, sequence_parallel: bool, extra: list[str]) -> Callable[[int], float | None]:
    import torch

    from parallax.assemble import assemble
    from parallax.batches import Batch
    from parallax.config_io import load
    from parallax.mesh import init_mesh
    from parallax.step import train_step

    torch.set_num_threads(1)
    config = load(keys_of(mesh_text, sequence_parallel, extra))
    mesh = init_mesh(config.mesh, device_type="cpu")
    run, state = assemble(config, mesh)
    each = GLOBAL_BATCH // mesh.data.size
    samples = torch.arange(mesh.data.rank * each, (mesh.data.rank + 1) * each)

    def step(number: int) -> float:
        return train_step(run, state, Batch(*data_of(number, mesh.data.rank, mesh.data.size), samples, number)).loss

    return step


def first_weights() -> dict[str, Any]:
    """What parallax begins with, by canonical names; without a process group."""
    from parallax.assemble import assemble
    from parallax.config_io import load
    from parallax.mesh import init_mesh

    run, _ = assemble(load(keys_of("1x1x1", False, [])), init_mesh("1x1x1", device_type="cpu", rank=0, world_size=1))
    named = dict(run.stages[0].named_parameters())
    return {spec.name: spec.view(named[spec.parameter].detach()).clone() for spec in run.specs[0]}


def build_native(mesh_text: str, sequence_parallel: bool, how: str) -> Callable[[int], float | None]:
    import os

    import torch
    import torch_native

    torch.set_num_threads(1)
    data, tensor, pipeline = map(int, mesh_text.split("x"))
    options = {"global_batch": GLOBAL_BATCH, "microbatch": MICROBATCH, "sequence_parallel": sequence_parallel}
    act = torch_native.build(
        data, tensor, pipeline, shape=SHAPE, weights=first_weights(), adamw=ADAMW, how=how, **options
    )
    rank = int(os.environ["RANK"]) // tensor % data

    return lambda number: act(*data_of(number, rank, data))


def candidates(mesh: str, peers: list[str]) -> list[str]:
    """The peers that can run a mesh. DDP with DTensor and a pipeline is broken in torch: `replicate` stands for it."""
    data, tensor, pipeline = map(int, mesh.split("x"))
    found = []
    for peer in peers:
        if peer == "fsdp" and data == 1 or peer == "replicate" and data == 1:
            continue
        if peer == "native" and data > 1 and tensor > 1:
            continue
        found.append(peer)
    return found


def measure(mesh: str, sequence_parallel: bool, peers: list[str], rounds: int, extra: list[str]) -> list[Row]:
    size = math.prod(map(int, mesh.split("x")))
    teams = []
    for name in ("parallax", *candidates(mesh, peers)):
        arguments = [name, mesh, str(sequence_parallel).lower(), *(extra if name == "parallax" else [])]
        teams.append(Team(name, size, arguments, Path(__file__).resolve()))
    try:
        return compare(teams, rounds)
    finally:
        for team in teams:
            team.end()


def table(mesh: str, sequence_parallel: bool, rows: list[Row]) -> list[str]:
    import statistics

    ours, lines = rows[0], []
    if ours.error:
        return [f"| {mesh} | parallax: {ours.error} |"]
    for row in rows:
        label = f"| {mesh}{' sp' if sequence_parallel else ''} | {row.name} |"
        if row.error:
            lines.append(f"{label} {row.error} |")
            continue
        apart = max(abs(a / b - 1) for a, b in zip(ours.losses, row.losses, strict=True))
        wall, cpu, sent = (statistics.median(each) for each in (row.wall, row.cpu, row.sent))
        ratios = [ours.over(row, what) for what in ("wall", "cpu")]
        sent_ratio = statistics.median(ours.sent) / sent if sent else float("nan")
        figures = f" {1000 * wall:.0f} | {1000 * cpu:.0f} | {row.rss / 1e6:.0f} | {sent / 1e6:.1f} |"
        beside = f" {ratios[0]:.3f} | {ratios[1]:.3f} | {ours.rss / row.rss:.2f} | {sent_ratio:.2f} |"
        verdict = f" VOID: losses differ by {apart:.1e} |" if apart > 1e-5 else ""
        lines.append(label + figures + (beside if row is not ours else " | | | |") + verdict)
    return lines


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if not argument.startswith("+"))
    extra = [argument[1:] for argument in sys.argv[1:] if argument.startswith("+")]
    rounds, peers = int(options.get("rounds", "7")), options.get("peers", "native,replicate,fsdp").split(",")
    wish = options.get("sp", "both")
    said = [f"`python {' '.join(sys.argv)}`: {machine()}", ""]
    said += ["| mesh | who | ms | CPU ms | peak MB | sent MB | time | CPU | memory | bytes |", "|" + "---|" * 10]
    print("\n".join(said), flush=True)
    for mesh in options.get("mesh", ",".join(MESHES)).split(","):
        cut = int(mesh.split("x")[1]) > 1
        for sequence_parallel in (False, True) if cut and wish == "both" else (cut and wish == "true",):
            lines = table(mesh, sequence_parallel, measure(mesh, sequence_parallel, peers, rounds, extra))
            print("\n".join(lines), flush=True)
            said += lines
    if "append" in options:
        with open(options["append"], "a") as file:
            print("\n" + "\n".join(said), file=file)


def rank_main(arguments: list[str]) -> None:
    name, mesh, sequence_parallel, *extra = arguments
    if name == "parallax":
        serve(lambda: build_parallax(mesh, sequence_parallel == "true", extra))
    else:
        serve(lambda: build_native(mesh, sequence_parallel == "true", NATIVE[name]))


if __name__ == "__main__":
    rank_main(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
