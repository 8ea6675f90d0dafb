"""How near to what this machine can do: T* / T for each mesh of training.py.

    python benchmarks/limit.py [mesh=1x1x1,1x1x2,2x2x2] [rounds=5]

T* is the sum of what nobody can avoid here: the products of the busiest rank, those of linear layers and those of
attention each at the best rate that this machine's fastest library reaches at these very shapes with all cores busy
(ranks beyond the cores share them), the optimizer's bytes at the rate of memory, and the sums of tensor parallelism at
the rate of a socket over loopback; other messages count as hidden by computing. What is left is elementwise work, the
softmax of attention, autograd, Python, and waiting.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import Team, compare, machine
from training import GLOBAL_BATCH, MESHES, MICROBATCH, SHAPE, keys_of

SECONDS = 0.5


def best_rate(once: Callable[[], object], amount: float) -> float:
    """Units a second at the best of many short turns: other work on the machine is not the machine's limit."""
    best, end = math.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - begun)
    return amount / best


def product_rate(shapes: list[tuple[int, int, int]]) -> float:
    """FLOPs a second of [m, k] x [k, n] and of the two products of its backward, weighed as they occur."""
    from parallax.tensor.products import linear, product

    triples = [(torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)) for m, k, n in shapes]

    def once() -> None:
        for x, w, dy in triples:
            linear(x, w, None), product(dy, w), product(dy.t(), x)

    return best_rate(once, sum(6.0 * m * k * n for m, k, n in shapes))


def attention_rate(heads: int) -> float:
    """FLOPs a second of the batched products of one block of queries: scores, values, and the four of the backward."""
    n, length, width = 64, SHAPE["length"], SHAPE["hidden"] // SHAPE["heads"]
    q, k, p = torch.randn(heads, n, width), torch.randn(heads, length, width), torch.randn(heads, n, length)

    def once() -> None:
        for _ in range(2):
            torch.bmm(q, k.transpose(1, 2)), torch.bmm(p, k), torch.bmm(p.transpose(1, 2), q)

    return best_rate(once, 12.0 * heads * n * length * width)


def memory_rate() -> float:
    """Bytes a second, read and written, of an update of one vector by another."""
    a, b = torch.randn(1 << 24), torch.randn(1 << 24)
    return best_rate(lambda: a.add_(b), 3.0 * 4 * a.numel())


def socket_rate() -> float:
    """Bytes a second through one TCP connection over loopback."""
    server = socket.create_server(("127.0.0.1", 0))
    size, times = 1 << 22, 64
    data = bytes(size)

    def send() -> None:
        with socket.create_connection(server.getsockname()) as out:
            for _ in range(times):
                out.sendall(data)

    thread = threading.Thread(target=send)
    begun = time.perf_counter()
    thread.start()
    taken, buffer = 0, bytearray(size)
    connection, _ = server.accept()
    while count := connection.recv_into(buffer):
        taken += count
    thread.join()
    return taken / (time.perf_counter() - begun)


def _measure(what: str, argument: Any, queue: Any) -> None:
    torch.set_num_threads(1)
    rates = {"product": product_rate, "attention": attention_rate, "memory": lambda _: memory_rate()}
    queue.put(rates[what](argument))


def together(what: str, processes: int, argument: Any = None) -> float:
    """The sum of the rates of some processes at once."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = [context.Process(target=_measure, args=(what, argument, queue)) for _ in range(processes)]
    for process in started:
        process.start()
    rates = [queue.get() for _ in started]
    for process in started:
        process.join()
    return sum(rates)


def shapes_of(tensor: int) -> list[tuple[int, int, int]]:
    """[m, k] x [k, n] of one layer on one rank; the head is much like them."""
    m, d = MICROBATCH * SHAPE["length"], SHAPE["hidden"]
    return [(m, d, 3 * d // tensor), (m, d // tensor, d), (m, d, 4 * d // tensor), (m, 4 * d // tensor, d)]


def limit_of(mesh: str, bandwidth: float, wire: float) -> dict[str, float]:
    """Seconds by cause."""
    from parallax.assemble import assemble  # noqa: F401 - the same imports as a run
    from parallax.config_io import load
    from parallax.stage_plan import plan_stages

    data, tensor, pipeline = map(int, mesh.split("x"))
    ranks, cores = data * tensor * pipeline, os.cpu_count() or 1
    plan = plan_stages(load(keys_of(mesh, False, [])))
    tokens = GLOBAL_BATCH * SHAPE["length"]
    busy = min(ranks, cores)
    # Of one core, with as many at work.
    rates = [
        together("product", busy, shapes_of(tensor)) / busy,
        together("attention", busy, SHAPE["heads"] // tensor) / busy,
    ]
    attended = 2.0 * SHAPE["hidden"] * SHAPE["length"]  # FLOPs of a layer's scores and values, the causal half
    of_rank = [[0.0, 0.0] for _ in range(pipeline)]
    for stage, (first, last) in enumerate(plan.spans):
        mine = of_rank[plan.schedule.stage_to_rank[stage]]
        attention = attended * sum(unit.name.startswith("layers.") for unit in plan.units[first:last])
        mine[0] += (
            3 * (sum(unit.flops for unit in plan.units[first:last]) - attention) * tokens / data / tensor / rates[0]
        )
        mine[1] += 3 * attention * tokens / data / tensor / rates[1]
    all_cores = [sum(part) * data * tensor / cores for part in zip(*of_rank, strict=True)]
    linear, attention = max([*of_rank, all_cores], key=sum)
    # AdamW reads gradient, parameter and two moments and writes three of them.
    optimizer = max(1, ranks / cores) * 7 * 4 * plan.num_parameters / tensor / pipeline / bandwidth
    # Two sums a layer forward, two backward, of a microbatch's activations; a ring sends 2 (t-1)/t of them and takes as
    # much: all ranks' bytes go through the cores that compute.
    activations = 4 * MICROBATCH * SHAPE["length"] * SHAPE["hidden"]
    sums = 4 * SHAPE["layers"] * GLOBAL_BATCH / MICROBATCH * activations
    sent = sums * 2 * (tensor - 1)
    return {"linear": linear, "attention": attention, "optimizer": optimizer, "sums": sent / wire / min(cores, ranks)}


def main() -> None:
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    rounds = int(options.get("rounds", "5"))
    cores = os.cpu_count() or 1
    bandwidth, wire = together("memory", cores), socket_rate()
    print(f"{machine()}\n{bandwidth / 1e9:.1f} GB/s of memory, {wire / 1e9:.1f} GB/s over loopback\n")
    print("| mesh | T ms | T* ms | T*/T | linear | attention | optimizer | sums | the rest |\n|" + "---|" * 9)
    for mesh in options.get("mesh", ",".join(MESHES)).split(","):
        parts = limit_of(mesh, bandwidth, wire)
        size = math.prod(map(int, mesh.split("x")))
        team = Team("parallax", size, ["parallax", mesh, "false"], Path(__file__).resolve().parent / "training.py")
        (row,) = compare([team], rounds)
        team.end()
        took, least = statistics.median(row.wall), sum(parts.values())
        shown = " | ".join(f"{1000 * seconds:.0f}" for seconds in (*parts.values(), took - least))
        print(f"| {mesh} | {1000 * took:.0f} | {1000 * least:.0f} | {least / took:.2f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
