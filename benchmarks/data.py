"""The data axis beside torch's own: data_parallel against DDP, zero=2 and 3 against FSDP2, on one plain module.

    torchrun --nproc_per_node 2 benchmarks/data.py time           step times, alternating, median of paired ratios
    python benchmarks/data.py memory [RANKS]                      peak memory with 105 M parameters, beside the formula:
                                                                  the table, as glibc is and told to hold nothing
    torchrun --nproc_per_node 4 benchmarks/data.py memory zero=3  one row of it
    torchrun --nproc_per_node 2 benchmarks/data.py overlap        how much of the reduction the backward hides

One thread a rank. A row whose losses do not agree to 1e-5 is void.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from harness import count, one_of, refuse
from plain_gpt import PlainGPT
from torch import Tensor, nn

import parallax
from parallax.comm import barrier
from parallax.launch import entrypoint
from parallax.mesh import Mesh

SMALL = {"layers": 8, "hidden": 256, "heads": 8, "vocab": 512, "length": 256}
LARGE = {"layers": 8, "hidden": 1024, "heads": 8, "vocab": 2048, "length": 64}
GLOBAL_BATCH, ROUNDS, WARM_UP = 16, 15, 3
ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
Step = Callable[[Tensor, Tensor], float]


def batch(mesh: Mesh, size: int, shape: dict[str, int], step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step * 1000 + mesh.rank)
    tokens = torch.randint(0, shape["vocab"], (size, shape["length"] + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def plain(shape: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    return PlainGPT(**shape)


def ours(mesh: Mesh, shape: dict[str, int], **options: Any) -> Step:
    model = parallax.data_parallel(plain(shape), mesh, **options)
    optimizer = parallax.optimizer(model, torch.optim.AdamW, **ADAMW)

    def step(tokens: Tensor, targets: Tensor) -> float:
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def ddp(mesh: Mesh, shape: dict[str, int]) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(plain(shape), gradient_as_bucket_view=True)
    return torch_step(model)


def fsdp(mesh: Mesh, shape: dict[str, int], *, reshard: bool) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = plain(shape)
    devices = init_device_mesh("cpu", (mesh.data.size,))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=devices, reshard_after_forward=reshard)
    fully_shard(model, mesh=devices, reshard_after_forward=reshard)
    return torch_step(model)


def torch_step(model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)  # type: ignore[arg-type]

    def step(tokens: Tensor, targets: Tensor) -> float:
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


PAIRS: dict[str, tuple[Callable[..., Step], Callable[..., Step]]] = {
    "zero=0 : DDP": (ours, ddp),
    "zero=1 : DDP": (lambda m, s: ours(m, s, zero=1), ddp),
    "zero=2 : FSDP2, no reshard": (lambda m, s: ours(m, s, zero=2), lambda m, s: fsdp(m, s, reshard=False)),
    "zero=3 : FSDP2, reshard": (lambda m, s: ours(m, s, zero=3), lambda m, s: fsdp(m, s, reshard=True)),
}


def measure_time(mesh: Mesh) -> None:
    size = GLOBAL_BATCH // mesh.data.size
    say(mesh, f"{'pair':<28} {'parallax':>9} {'torch':>9} {'ratio':>6}   quartiles")
    for name, makers in PAIRS.items():
        steps = [make(mesh, SMALL) for make in makers]
        times: list[list[float]] = [[], []]
        losses: list[list[float]] = [[], []]
        for number in range(WARM_UP + ROUNDS):
            tokens, targets = batch(mesh, size, SMALL, number)
            for which in (0, 1) if number % 2 else (1, 0):
                barrier(mesh.data, mesh.device)
                begun = time.perf_counter()
                losses[which].append(steps[which](tokens, targets))
                barrier(mesh.data, mesh.device)
                times[which].append(time.perf_counter() - begun)
        void = max(abs(a / b - 1) for a, b in zip(*losses, strict=True)) > 1e-5
        kept = [each[WARM_UP:] for each in times]
        ratios = sorted(a / b for a, b in zip(*kept, strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        a, b = (1000 * statistics.median(each) for each in kept)
        verdict = "  VOID: the losses differ" if void else ""
        ratio = statistics.median(ratios)
        say(mesh, f"{name:<28} {a:>6.0f} ms {b:>6.0f} ms {ratio:>6.3f}   {low:.3f} .. {high:.3f}{verdict}")
        del steps
        gc.collect()


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_over_baseline(make: Callable[[], Step], data: tuple[Tensor, Tensor]) -> float:
    """Peak resident memory of building and of two steps, over what the process held before."""
    import resource

    gc.collect()
    before = resident_bytes()
    step = make()
    for _ in range(2):
        step(*data)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def measure_memory(mesh: Mesh, which: str) -> None:
    """One candidate a start, since a peak never falls."""
    data = batch(mesh, 1, LARGE, 0)
    shape = LARGE
    with torch.device("meta"):
        whole = PlainGPT(**shape)
    num = sum(p.numel() for p in whole.parameters())
    block = sum(p.numel() for p in whole.blocks[0].parameters())
    n = mesh.data.size
    # float32 parameters, gradients and two moments; then what is on its way: a bucket that is sent and its parts that
    # arrive, from level 2 on one more that fills, at level 3 three blocks: one done, one that computes, the next. What
    # belongs to no block (late) is not cut while a step runs.
    bucket = 4 * block
    late = 4 * (num - len(whole.blocks) * block) * (1 - 1 / n)
    formulas = {
        "zero=0": 16 * num + (2 * bucket if n > 2 else 0),
        "zero=1": 8 * num + 8 * num / n + 2 * bucket,
        "zero=2": 4 * num + 12 * num / n + 3 * bucket + late,
        "zero=3": 16 * num / n + 6 * bucket + 2 * late,
    }
    makers: dict[str, Callable[[], Step]] = {
        "ddp": lambda: ddp(mesh, shape),
        "fsdp no reshard": lambda: fsdp(mesh, shape, reshard=False),
        "fsdp reshard": lambda: fsdp(mesh, shape, reshard=True),
    }
    for level in range(4):
        makers[f"zero={level}"] = lambda level=level: ours(mesh, shape, zero=level)
    # What libraries and connections take at their first use is no matter of the model's size.
    shape = LARGE | {"hidden": 64, "vocab": 64}
    makers[which]()(*(t % 64 for t in data))
    shape = LARGE
    peak = peak_over_baseline(makers[which], data)
    peak = max(parallax.allgather(torch.tensor([peak]), mesh).tolist())
    expected = formulas.get(which)
    beside = f"formula {expected / 1e6:,.0f} MB, ratio {peak / expected:.3f}" if expected else ""
    say(mesh, f"{which:<16} {num / 1e6:.0f} M parameters, {n} ranks: peak {peak / 1e6:,.0f} MB   {beside}")


ROWS = ("zero=0", "zero=1", "zero=2", "zero=3", "ddp", "fsdp no reshard", "fsdp reshard")
HOLDS_NOTHING = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


def memory_table(ranks: int) -> None:
    """Every row in a start of its own, twice: a peak never falls."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), __file__, "memory"]
    print(f"torch {torch.__version__}, {ranks} ranks, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}\n")
    print("| | peak MB | formula MB | ratio | peak MB, glibc holds nothing | ratio |\n|" + "---|" * 6, flush=True)
    for row in ROWS:
        cells: list[str] = []
        for setting in ({}, HOLDS_NOTHING):
            environment = os.environ | {"OMP_NUM_THREADS": "1"} | setting
            done = subprocess.run([*command, row], env=environment, capture_output=True, text=True)
            found = re.search(r"peak ([\d,]+) MB(?:   formula ([\d,]+) MB, ratio ([\d.]+))?", done.stdout)
            if found is None:
                raise SystemExit(done.stderr[-2000:])
            peak, formula, ratio = (text or "" for text in found.groups())
            cells += [peak, ratio] if setting else [peak, formula, ratio]
        print(f"| {row} | {' | '.join(cells)} |", flush=True)


def measure_overlap(mesh: Mesh) -> None:
    """A step with and without its reduction: what the backward does not hide."""
    from parallax.data.replicate import Replicate

    size = GLOBAL_BATCH // mesh.data.size
    honest = Replicate.launch
    step = ours(mesh, SMALL)
    times: dict[str, list[float]] = {"reduced": [], "alone": []}
    for number in range(2 * (WARM_UP + ROUNDS)):
        name = "reduced" if number % 2 else "alone"
        Replicate.launch = honest if name == "reduced" else lambda self, flat, bucket: None  # type: ignore[method-assign]
        barrier(mesh.data, mesh.device)
        begun = time.perf_counter()
        step(*batch(mesh, size, SMALL, number))
        times[name].append(time.perf_counter() - begun)
    reduced, alone = (statistics.median(values[WARM_UP:]) for values in times.values())
    flat = torch.zeros(sum(p.numel() for p in PlainGPT(**SMALL).parameters()))
    lone = []
    for _ in range(ROUNDS):
        barrier(mesh.data, mesh.device)
        begun = time.perf_counter()
        dist.all_reduce(flat)
        lone.append(time.perf_counter() - begun)
    whole = statistics.median(lone)
    exposed = reduced - alone
    say(
        mesh, f"step {1000 * reduced:.0f} ms, without reduction {1000 * alone:.0f} ms, all-reduce {1000 * whole:.0f} ms"
    )
    say(mesh, f"exposed: {100 * exposed / whole:.0f}% of the all-reduce, {100 * exposed / reduced:.1f}% of the step")


def say(mesh: Mesh, text: str) -> None:
    if mesh.rank == 0:
        print(text, flush=True)


def wish_of(words: list[str], launched: bool) -> tuple[str, str]:
    """What to measure, and of memory how many ranks, or, under torchrun, which row."""
    what, *more = words or ["time"]
    takes = {"time": [], "overlap": [], "memory": [one_of(*ROWS) if launched else count]}
    if what not in takes:
        refuse(f"{what} is none of {', '.join(takes)}")
    if what == "memory" and not launched:
        more = more or ["4"]
    if len(more) != len(takes[what]):
        row = f"the row, one of {', '.join(ROWS)}" if launched else "at most RANKS"
        refuse(f"{' '.join(words)}: {what} takes {row if takes[what] else 'nothing more'}")
    try:
        return what, "".join(str(read(word)) for read, word in zip(takes[what], more, strict=True))
    except ValueError as error:
        refuse(f"{' '.join(words)}: {error}")


def main(what: str, which: str) -> None:
    torch.set_num_threads(1)
    if what == "memory" and "WORLD_SIZE" not in os.environ:
        return memory_table(int(which))
    mesh = parallax.init_mesh(f"{os.environ.get('WORLD_SIZE', '1')}x1x1", device_type="cpu")
    say(mesh, f"torch {torch.__version__}, {mesh.data.size} ranks, load {os.getloadavg()[0]:.1f}")
    if what == "memory":
        measure_memory(mesh, which)
    else:
        {"time": measure_time, "overlap": measure_overlap}[what](mesh)


if __name__ == "__main__":
    wish = wish_of(sys.argv[1:], "WORLD_SIZE" in os.environ)
    entrypoint(lambda: main(*wish))
