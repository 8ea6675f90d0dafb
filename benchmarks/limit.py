"""How near to what this machine can do: T* / T for each mesh of training.py.

    python benchmarks/limit.py [mesh=1x1x1,1x1x2,2x2x2] [rounds=5] [+pipeline.schedule=zb-h2]

T* is what nobody can avoid here: the products of a step and nothing else, those of linear layers and those of attention
(the causal half), at the shapes of the mesh and by the faster library for each, done by as many processes as there are
cores, or ranks, which share them; then the optimizer's bytes at the rate of memory, and the sums of tensor parallelism
at the rate of a socket over loopback; other messages count as hidden by computing. Products and training take turns, so
that both meet the same machine; T* / T is the median of the pairs. What is left is named: waiting is the cores' time
that no rank computed in; the rest is elementwise work, the softmax of attention, autograd and Python.
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
from harness import Row, Team, asked, compare, count, listed, machine, serve
from harness import mesh as mesh_of
from training import GLOBAL_BATCH, MESHES, MICROBATCH, SHAPE, keys_of

HERE = Path(__file__).resolve().parent
SECONDS = 0.5
BLOCKS = (64, 128)
"""Queries that attention takes at once, whichever is faster: what lies in their future is left out."""
KEEPS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1099511627776"}
"""The products shall not pay for memory that glibc gives back and asks for again."""


def linear_products(shape: tuple[int, int, int]) -> Callable[[], object]:
    """[m, k] x [k, n] and the two products of its backward."""
    from parallax.tensor.products import linear, product

    m, k, n = shape
    x, w, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
    return lambda: (linear(x, w, None), product(dy, w), product(dy.t(), x))


def attention_products(heads: int) -> Callable[[], object]:
    """The batched products of one sample: scores and values, and the four of the backward, block by block."""
    return max((_attention_products(heads, block) for block in BLOCKS), key=lambda once: rate(once, 1.0))


def _attention_products(heads: int, block: int) -> Callable[[], object]:
    from parallax.tensor.products import by_faster_library

    length, width = SHAPE["length"], SHAPE["hidden"] // SHAPE["heads"]
    q, k, p = torch.randn(heads, block, width), torch.randn(heads, length, width), torch.randn(heads, block, length)
    # On average a block meets half of its own keys and all before it.
    spans = [(start + block // 2) for start in range(0, length, block)]
    blocks = [(k[:, :span], p[:, :, :span].contiguous()) for span in spans]

    def once() -> None:
        with by_faster_library(q):
            for keys, probabilities in blocks:
                for _ in range(2):
                    torch.bmm(q, keys.transpose(1, 2))
                    torch.bmm(probabilities, keys)
                    torch.bmm(probabilities.transpose(1, 2), q)

    return once


def products_of(mesh: str, extra: list[str], process: int, processes: int) -> Callable[[], object]:
    """One process's share of the products of a step: ranks process, process + processes, ..., after each other."""
    from parallax.config_io import load
    from parallax.stage_plan import plan_stages

    data, tensor, pipeline = map(int, mesh.split("x"))
    plan = plan_stages(load(keys_of(mesh, False, extra)))
    tokens, d, cut = MICROBATCH * SHAPE["length"], SHAPE["hidden"], SHAPE["heads"] // tensor
    shapes = [(d, 3 * d // tensor), (d // tensor, d), (d, 4 * d // tensor), (4 * d // tensor, d)]
    layer = [linear_products((tokens, *shape)) for shape in shapes] + MICROBATCH * [attention_products(cut)]
    head = [linear_products((tokens, d, SHAPE["vocab"] // tensor))]
    todo: list[Callable[[], object]] = []
    for rank in range(process, data * tensor * pipeline, processes):
        place = rank // (data * tensor)  # the pipeline is outermost
        for stage, (first, last) in enumerate(plan.spans):
            if plan.schedule.stage_to_rank[stage] != place:
                continue
            for unit in plan.units[first:last]:
                todo += layer if unit.name.startswith("layers.") else head if unit.name == "head" else []
    times = GLOBAL_BATCH // data // MICROBATCH
    return lambda: [once() for _ in range(times) for once in todo]


def rate(once: Callable[[], object], amount: float) -> float:
    """Units a second at the best of many short turns: other work on the machine is not the machine's limit."""
    best, end = math.inf, time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        once()
        best = min(best, time.perf_counter() - begun)
    return amount / best


def _memory_rate(queue: Any) -> None:
    torch.set_num_threads(1)
    a, b = torch.randn(1 << 24), torch.randn(1 << 24)
    queue.put(rate(lambda: a.add_(b), 3.0 * 4 * a.numel()))


def memory_rate(processes: int) -> float:
    """Bytes a second, read and written, of an update of one vector by another, all processes at once."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    started = [context.Process(target=_memory_rate, args=(queue,)) for _ in range(processes)]
    for process in started:
        process.start()
    rates = [queue.get() for _ in started]
    for process in started:
        process.join()
    return sum(rates)


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


def bytes_of(mesh: str, bandwidth: float, wire: float) -> dict[str, float]:
    """Seconds of the optimizer and of the sums over tensor."""
    from parallax.config_io import load
    from parallax.stage_plan import plan_stages

    data, tensor, pipeline = map(int, mesh.split("x"))
    ranks, cores = data * tensor * pipeline, os.cpu_count() or 1
    num_parameters = plan_stages(load(keys_of(mesh, False, []))).num_parameters
    # AdamW reads gradient, parameter and two moments and writes three of them.
    optimizer = max(1, ranks / cores) * 7 * 4 * num_parameters / tensor / pipeline / bandwidth
    # Two sums a layer forward, two backward, of a microbatch's activations; a ring sends 2 (t-1)/t of them and takes as
    # much: all ranks' bytes go through the cores that compute.
    activations = 4 * MICROBATCH * SHAPE["length"] * SHAPE["hidden"]
    sums = 4 * SHAPE["layers"] * GLOBAL_BATCH / MICROBATCH * activations
    return {"optimizer": optimizer, "sums": sums * 2 * (tensor - 1) / wire / min(cores, ranks)}


def measured(mesh: str, rounds: int, extra: list[str]) -> tuple[Row, Row]:
    """A step of training, and its products alone, in turns."""
    size = math.prod(map(int, mesh.split("x")))
    processes = min(size, os.cpu_count() or 1)
    training = Team("training", size, ["parallax", mesh, "false", *extra], HERE / "training.py")
    os.environ.update(KEEPS_MEMORY)
    alone = Team("products", processes, [mesh, str(processes), *extra], HERE / "limit.py")
    for name in KEEPS_MEMORY:
        del os.environ[name]
    try:
        step, products = compare([training, alone], rounds)
    finally:
        training.end()
        alone.end()
    if problem := step.error or products.error:
        raise SystemExit(f"{mesh}: {problem}")
    return step, products


def main() -> None:
    known = {"mesh": (",".join(MESHES), listed(mesh_of)), "rounds": ("5", count)}
    wish = asked(known, sys.argv[1:], plus=True)
    rounds, extra = wish.rounds, wish.extra
    cores = os.cpu_count() or 1
    bandwidth, wire = memory_rate(cores), socket_rate()
    print(f"{machine()}\n{bandwidth / 1e9:.1f} GB/s of memory, {wire / 1e9:.1f} GB/s over loopback\n")
    print("| mesh | T ms | T* ms | T*/T | products | optimizer | sums | waiting | the rest |\n|" + "---|" * 9)
    for mesh in wish.mesh:
        step, products = measured(mesh, rounds, extra)
        more = bytes_of(mesh, bandwidth, wire)
        ranks = math.prod(map(int, mesh.split("x")))
        waiting = statistics.median(
            max(0.0, wall - cpu / min(ranks, cores)) for wall, cpu in zip(step.wall, step.cpu, strict=True)
        )
        least = [each + sum(more.values()) for each in products.wall]
        near = statistics.median(a / b for a, b in zip(least, step.wall, strict=True))
        took, star = statistics.median(step.wall), statistics.median(least)
        parts = [statistics.median(products.wall), *more.values(), waiting, took - star - waiting]
        shown = " | ".join(f"{1000 * seconds:.0f}" for seconds in parts)
        print(f"| {mesh} | {1000 * took:.0f} | {1000 * star:.0f} | {near:.2f} | {shown} |", flush=True)


def rank_main(arguments: list[str]) -> None:
    mesh, processes, *extra = arguments
    torch.set_num_threads(1)

    def build() -> Callable[[int], float]:
        once = products_of(mesh, extra, int(os.environ["RANK"]), int(processes))
        return lambda _: (once(), 0.0)[1]

    serve(build)


if __name__ == "__main__":
    rank_main(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
