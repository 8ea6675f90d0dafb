"""The collectives of parallax.comm, and messages between pipeline ranks, beside torch.distributed's own.

    python benchmarks/communication.py [ranks=2,4,8] [sizes=4K,64K,1M,16M,64M] [rounds=15] [only=all_reduce,send]
                                       [way=memory,sockets] [device=cpu|cuda] [append=FILE]

Both run in the same ranks on the same group, in turns; a time is that of the slowest rank, a ratio the median of the
pairs. A size is that of the whole: what all_gather returns, what reduce_scatter takes. way=memory is what parallax
does on one machine's CPUs, way=sockets is PARALLAX_SHARED_MEMORY=0; torch's is the same in both. `send` is a message
to the next pipeline rank and one back, through P2P and by isend and irecv; it has one way, listed with sockets. With
device=cuda it is NCCL, as many ranks as there are GPUs. A row whose results differ by more than rounding is void.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from harness import Team, asked, count, listed, machine, one_of, text

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "send")
UNITS = {"K": 1 << 10, "M": 1 << 20}
CALLS = {4 << 10: 20, 64 << 10: 20, 1 << 20: 5}
"""How many in a row are timed as one, up to a size; one beyond."""
WARM_UP = 2
Call = Callable[[Any], Any]


def bytes_of(text: str) -> int:
    return int(text[:-1]) * UNITS[text[-1]]


def collectives(kind: str, axis: Any) -> tuple[Call, Call]:
    """parallax's and torch's: of a tensor, returning a tensor."""
    import torch.distributed as dist

    from parallax import comm

    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    group, size = axis.group, axis.size

    def all_reduce(tensor: Any) -> Any:
        dist.all_reduce(tensor, group=group)
        return tensor

    def all_gather(tensor: Any) -> Any:
        out = tensor.new_empty(size * tensor.shape[0])
        gather(out, tensor, group=group)
        return out

    def reduce_scatter(tensor: Any) -> Any:
        out = tensor.new_empty(tensor.shape[0] // size)
        scatter(out, tensor, group=group)
        return out

    def broadcast(tensor: Any) -> Any:
        dist.broadcast(tensor, axis.ranks[0], group=group)
        return tensor

    raw = {"all_reduce": all_reduce, "all_gather": all_gather}
    raw |= {"reduce_scatter": reduce_scatter, "broadcast": broadcast}
    return lambda tensor: getattr(comm, kind)(tensor, axis), raw[kind]


def messages(mesh: Any) -> tuple[Call, Call]:
    """There and back between ranks 0 and 1, 2 and 3, ...: parallax's and torch's."""
    import torch
    import torch.distributed as dist

    from parallax.pipeline.transport import P2P, Message

    axis = mesh.pipeline
    first = axis.rank % 2 == 0
    peer = axis.rank + 1 if first else axis.rank - 1
    transport = P2P(mesh, axis.size)
    there, back = Message("F", max(axis.rank, peer), 0), Message("B", min(axis.rank, peer), 0)

    def ours(tensor: Any) -> Any:
        receipt = transport.receive(lambda: torch.empty_like(tensor), back if first else there, peer)
        if first:
            transport.send(tensor, there, peer)
            got = receipt.wait()
        else:
            got = receipt.wait()
            transport.send(tensor, back, peer)
        transport.flush()
        return got

    def raw(tensor: Any) -> Any:
        leaving: Any
        got, other = torch.empty_like(tensor), axis.ranks[peer]
        to, fro = (mesh.pipeline, mesh.pipeline_up) if first else (mesh.pipeline_up, mesh.pipeline)
        arriving: Any = dist.irecv(got, other, group=fro.group)
        if first:
            leaving = dist.isend(tensor, other, group=to.group)
            arriving.wait()
        else:
            arriving.wait()  # once only: gloo would wait for another message
            leaving = dist.isend(tensor, other, group=to.group)
        leaving.wait()
        return got

    return ours, raw


def compare_calls(calls: tuple[Call, Call], mesh: Any, elements: int, rounds: int) -> dict[str, Any]:
    """The times of the slowest rank in seconds a call, on every rank; apart: the largest difference of the results."""
    import torch

    from parallax.comm import all_reduce, barrier

    begin = torch.arange(elements, device=mesh.device).remainder_(97).float().add_(mesh.rank)
    a, b = (call(begin.clone()) for call in calls)
    apart = all_reduce((a - b).abs().max().double().reshape(1), mesh.world, "max")
    del a, b
    zeros = torch.zeros_like(begin)  # a sum of sums would overflow
    repeats = next((count for size, count in CALLS.items() if 4 * elements <= size), 1)
    times = torch.zeros(2, rounds, dtype=torch.float64, device=mesh.device)
    for number in range(WARM_UP + rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            barrier(mesh.world, mesh.device)
            begun = time.perf_counter()
            for _ in range(repeats):
                calls[which](zeros)
            if mesh.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                times[which, number - WARM_UP] = (time.perf_counter() - begun) / repeats
    return {"times": all_reduce(times, mesh.world, "max").tolist(), "apart": float(apart)}


def measure(ranks: int, kinds: list[str], sizes: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """All rows of this number of ranks, on every rank."""
    import torch

    from parallax.mesh import init_mesh

    torch.set_num_threads(1)
    across, along = init_mesh(f"1x{ranks}x1", device_type=device), init_mesh(f"1x1x{ranks}", device_type=device)
    rows = []
    for kind in kinds:
        for size in sizes:
            elements = bytes_of(size) // 4
            mesh = along if kind == "send" else across
            calls = messages(mesh) if kind == "send" else collectives(kind, mesh.tensor)
            found = compare_calls(calls, mesh, elements // ranks if kind == "all_gather" else elements, rounds)
            shared = kind != "send" and mesh.tensor.board is not None
            rows.append({"kind": kind, "size": size, "shared": shared} | found)
    return rows


def rank_main(arguments: list[str]) -> None:
    """Measure, and tell on standard output."""
    ranks, kinds, sizes, rounds, device = arguments
    try:
        answer: dict[str, Any] = {"rows": measure(int(ranks), kinds.split(","), sizes.split(","), int(rounds), device)}
    except Exception as error:  # noqa: BLE001 - whoever reads the table shall know why there is no row
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
    sys.stdin.read()
    os._exit(0)


def line(ranks: int, way: str, row: dict[str, Any]) -> str:
    ours, raw = row["times"]
    ratios = sorted(a / b for a, b in zip(ours, raw, strict=True))
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    a, b = (1000 * statistics.median(each) for each in (ours, raw))
    ratio = statistics.median(ratios)
    verdict = " VOID: results differ |" if row["apart"] > 1e-3 else ""
    text = f"| {ranks} | {way} | {row['kind']} | {row['size']}B | {a:.3f} | {b:.3f} | {ratio:.3f} |"
    return f"{text} {low:.3f} .. {high:.3f} |{verdict}"


def even(word: str) -> int:
    if count(word) % 2:
        raise ValueError(f"{word} ranks do not go in pairs; choose even numbers")
    return count(word)


def size_of(word: str) -> str:
    if not re.fullmatch("[1-9][0-9]*[KM]", word):
        raise ValueError("expected sizes as in 64K,1M")
    return word


KEYS = {
    "ranks": ("2,4,8", listed(even)),
    "sizes": ("4K,64K,1M,16M,64M", listed(size_of)),
    "rounds": ("15", count),
    "only": (",".join(KINDS), listed(one_of(*KINDS))),
    "way": ("memory,sockets", listed(one_of("memory", "sockets"))),
    "device": ("cpu", one_of("cpu", "cuda")),
    "append": (None, text),
}


def run_ranks(ranks: int, way: str, wish: SimpleNamespace) -> list[str]:
    kinds = [kind for kind in wish.only if kind != "send" or way != "memory"]
    if not kinds:
        return []
    os.environ["PARALLAX_SHARED_MEMORY"] = str(int(way == "memory"))
    arguments = [str(ranks), ",".join(kinds), ",".join(wish.sizes), str(wish.rounds), wish.device]
    team = Team(f"{ranks} ranks", ranks, arguments, Path(__file__).resolve())
    try:
        if team.error:
            return [f"| {ranks} | {way} | {team.error} |"]
        rows = team.ready[0]["rows"]
        if way == "memory" and not all(row["shared"] for row in rows):
            return [f"| {ranks} | {way} | these ranks share no memory |"]
        return [line(ranks, way, row) for row in rows]
    finally:
        team.end()


def main() -> None:
    wish = asked(KEYS, sys.argv[1:])
    cuda = wish.device == "cuda"
    ways = ["nccl"] if cuda else wish.way
    said = [f"`python {' '.join(sys.argv)}`: {machine()}", ""]
    torchs = "NCCL" if cuda else "gloo"
    said += [f"| ranks | way | what | size | parallax ms | {torchs} ms | ratio | quartiles |", "|" + "---|" * 8]
    print("\n".join(said), flush=True)
    for ranks in wish.ranks:
        for way in ways:
            lines = run_ranks(ranks, way, wish)
            print("\n".join(lines), flush=True)
            said += lines
    if wish.append:
        with open(wish.append, "a") as file:
            print("\n" + "\n".join(said), file=file)


if __name__ == "__main__":
    rank_main(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
