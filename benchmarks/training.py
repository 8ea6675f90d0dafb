"""The same model, weights and data trained by parallax and by its peers, on each mesh, in turns.

    python benchmarks/training.py [mesh=2x2x2,1x1x2] [rounds=7] [peers=native,fsdp] [sp=false|true|both] [append=FILE]

peers: of torch alone native (DDP, DTensor, 1F1B), fsdp, replicate; megatron and megatron-sdpa (megatron_peer.py);
deepspeed0 to deepspeed3, by the stage of ZeRO (deepspeed_peer.py), beside which +data.zero=1 belongs to parallax. Who
is not installed has a row that says so; who cannot run a mesh has none. compiled and bfloat16 are parallax itself with
compile=true and with dtype=bfloat16 (whose losses may differ).

GPT-2 shaped, 8 layers of 256, 8 heads, 256 tokens, 512 words, 6.65 M parameters; global batch 16 in microbatches of 2,
float32, AdamW, no clipping. One thread a rank. A row whose losses differ by more than 1e-5 is void.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import Row, Team, asked, compare, count, listed, machine, one_of, serve, text
from harness import mesh as mesh_of

SHAPE = {"layers": 8, "hidden": 256, "heads": 8, "vocab": 512, "length": 256}
GLOBAL_BATCH, MICROBATCH = 16, 2
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MESHES = ("1x1x1", "2x1x1", "4x1x1", "1x2x1", "1x4x1", "1x1x2", "1x1x4", "2x1x2", "2x2x1", "2x2x2")
NATIVE = {"native": "ddp", "fsdp": "fsdp", "replicate": "replicate"}
MEGATRON = ("megatron", "megatron-sdpa")
DEEPSPEED = {f"deepspeed{level}": level for level in range(4)}
ITSELF = {"parallax": [], "compiled": ["compile=true"], "bfloat16": ["dtype=bfloat16"]}
PEERS = (*NATIVE, *MEGATRON, *DEEPSPEED, *list(ITSELF)[1:])
USUAL = ("native", "replicate", "fsdp", "megatron", "deepspeed0")
KEYS = {
    "mesh": (",".join(MESHES), listed(mesh_of)),
    "peers": (",".join(USUAL), listed(one_of(*PEERS))),
    "sp": ("both", one_of("false", "true", "both")),
    "append": (None, text),
}


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


def assembled(mesh_text: str, sequence_parallel: bool, extra: list[str]) -> tuple[Any, Any]:
    """The run and the state of parallax on this rank."""
    import torch

    from parallax.assemble import assemble
    from parallax.config_io import load
    from parallax.mesh import init_mesh

    torch.set_num_threads(1)
    config = load(keys_of(mesh_text, sequence_parallel, extra))
    return assemble(config, init_mesh(config.mesh, device_type="cpu"))


def step_of(run: Any, state: Any) -> Callable[[int], float | None]:
    import torch

    from parallax.batches import Batch
    from parallax.step import train_step

    data = run.mesh.data
    each = GLOBAL_BATCH // data.size
    samples = torch.arange(data.rank * each, (data.rank + 1) * each)

    def step(number: int) -> float:
        return train_step(run, state, Batch(*data_of(number, data.rank, data.size), samples, number)).loss

    return step


def first_weights() -> dict[str, Any]:
    """What parallax begins with, by canonical names; without a process group."""
    from parallax.assemble import assemble
    from parallax.config_io import load
    from parallax.mesh import init_mesh

    run, _ = assemble(load(keys_of("1x1x1", False, [])), init_mesh("1x1x1", device_type="cpu", rank=0, world_size=1))
    named = dict(run.stages[0].named_parameters())
    return {spec.name: spec.view(named[spec.parameter].detach()).clone() for spec in run.specs[0]}


def build_peer(name: str, mesh_text: str, sequence_parallel: bool) -> Callable[[int], float | None]:
    import torch

    torch.set_num_threads(1)
    data, tensor, pipeline = map(int, mesh_text.split("x"))
    given: dict[str, Any] = {"shape": SHAPE, "weights": first_weights(), "adamw": ADAMW}
    given |= {"global_batch": GLOBAL_BATCH, "microbatch": MICROBATCH}
    if name in DEEPSPEED:
        file, given["level"] = "deepspeed_peer", DEEPSPEED[name]
    else:
        given["sequence_parallel"] = sequence_parallel
        if name in NATIVE:
            file, given["how"] = "torch_native", NATIVE[name]
        else:
            file, given["torch_attention"] = "megatron_peer", name == "megatron-sdpa"
    act = importlib.import_module(file).build(data, tensor, pipeline, **given)
    rank = int(os.environ["RANK"]) // tensor % data

    return lambda number: act(*data_of(number, rank, data))


def candidates(mesh: str, peers: list[str]) -> list[str]:
    """The peers that can run a mesh. DDP with DTensor and a pipeline is broken in torch: `replicate` stands for it."""
    data, tensor, pipeline = map(int, mesh.split("x"))
    found = []
    for peer in peers:
        if peer not in PEERS:
            raise SystemExit(f"peers={peer} is none of {', '.join(PEERS)}")
        if peer == "fsdp" and data == 1 or peer == "replicate" and data == 1:
            continue
        if peer == "native" and data > 1 and tensor > 1:
            continue
        if peer in DEEPSPEED and (tensor > 1 or pipeline > 1 and DEEPSPEED[peer] > 1):
            continue
        found.append(peer)
    return found


def missing(peer: str) -> bool:
    """True where what a peer needs is not installed."""
    import deepspeed_peer
    import megatron_peer

    return peer in MEGATRON and megatron_peer.missing() or peer in DEEPSPEED and deepspeed_peer.missing()


def measure(mesh: str, sequence_parallel: bool, peers: list[str], rounds: int, extra: list[str]) -> list[Row]:
    size = math.prod(map(int, mesh.split("x")))
    teams = []
    names = candidates(mesh, peers)
    absent = [Row(name, error="not installed") for name in names if missing(name)]
    for name in ("parallax", *(name for name in names if not missing(name))):
        arguments = [name, mesh, str(sequence_parallel).lower(), *(extra if name in ITSELF else [])]
        teams.append(Team(name, size, arguments, Path(__file__).resolve()))
    try:
        return compare(teams, rounds) + absent
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
        void = apart > 1e-5 and row.name != "bfloat16"
        verdict = f" VOID: losses differ by {apart:.1e} |" if void else ""
        lines.append(label + figures + (beside if row is not ours else " | | | |") + verdict)
    return lines


def main() -> None:
    asked_for = asked(KEYS | {"rounds": ("7", count)}, sys.argv[1:], plus=True)
    rounds, peers, wish, extra = asked_for.rounds, asked_for.peers, asked_for.sp, asked_for.extra
    said = [f"`python {' '.join(sys.argv)}`: {machine()}", ""]
    said += ["| mesh | who | ms | CPU ms | peak MB | sent MB | time | CPU | memory | bytes |", "|" + "---|" * 10]
    print("\n".join(said), flush=True)
    for mesh in asked_for.mesh:
        cut = int(mesh.split("x")[1]) > 1
        for sequence_parallel in (False, True) if cut and wish == "both" else (cut and wish == "true",):
            lines = table(mesh, sequence_parallel, measure(mesh, sequence_parallel, peers, rounds, extra))
            print("\n".join(lines), flush=True)
            said += lines
    if asked_for.append:
        with open(asked_for.append, "a") as file:
            print("\n" + "\n".join(said), file=file)


def rank_main(arguments: list[str]) -> None:
    name, mesh, sequence_parallel, *extra = arguments
    if name in ITSELF:
        serve(lambda: step_of(*assembled(mesh, sequence_parallel == "true", extra + ITSELF[name])))
    else:
        serve(lambda: build_peer(name, mesh, sequence_parallel == "true"))


if __name__ == "__main__":
    rank_main(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
