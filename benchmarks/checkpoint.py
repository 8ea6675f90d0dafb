"""Saving and loading beside torch.distributed.checkpoint and beside a plain safetensors file a rank, of the same bytes.

    torchrun --nproc_per_node 8 benchmarks/checkpoint.py [millions=500] [rounds=5] [cache=cold|warm] [directory=DIR]

Every rank holds an equal share of the rows of 24 float32 matrices. The three take turns; medians of paired ratios. A
save of ours or of DCP ends when its files are synced to disk, plain safetensors does not sync. Before each load the
files leave the page cache, as on a machine that starts anew; with cache=warm they were read once after that. What was
loaded is compared with what was saved.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import asked, count, one_of, positive, text
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, Shard

from parallax import checkpoint
from parallax.checkpoint import BackgroundSave, Entry, Staging
from parallax.comm import barrier, gather_json
from parallax.mesh import Mesh, init_mesh

MATRICES, WIDTH = 24, 2048


class Exchange:
    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.rank, self.size = mesh, mesh.rank, mesh.shape.size

    def gather_json(self, value: Any) -> list[Any]:
        return gather_json(value, self.mesh.world, self.mesh.device)


def timed(mesh: Mesh, action: Callable[[], object]) -> float:
    """Seconds until the slowest rank is done."""
    barrier(mesh.world, mesh.device)
    begun = time.perf_counter()
    action()
    barrier(mesh.world, mesh.device)
    return time.perf_counter() - begun


def forget(mesh: Mesh, folder: Path) -> None:
    """Make the next read of all files come from the disk."""
    barrier(mesh.world, mesh.device)
    if mesh.rank == 0:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shares(mesh: Mesh, millions: float) -> tuple[dict[str, torch.Tensor], int]:
    """This rank's rows of each matrix, and how many rows the whole one has."""
    rows = int(millions * 1e6 / MATRICES / WIDTH) // mesh.shape.size
    generator = torch.Generator().manual_seed(mesh.rank)
    values = {f"w{i}": torch.randn(rows, WIDTH, generator=generator) for i in range(MATRICES)}
    return values, rows * mesh.shape.size


def ours(mesh: Mesh, values: dict[str, torch.Tensor], rows: int) -> list[Entry]:
    each = rows // mesh.shape.size
    box = ((mesh.rank * each, (mesh.rank + 1) * each), (0, WIDTH))
    return [Entry(name, (rows, WIDTH), box, tensor, (mesh.rank,)) for name, tensor in values.items()]


def theirs(mesh: Mesh, values: dict[str, torch.Tensor]) -> dict[str, DTensor]:
    grid = dist.device_mesh.init_device_mesh("cpu", (mesh.shape.size,))
    return {name: DTensor.from_local(tensor, grid, [Shard(0)], run_check=False) for name, tensor in values.items()}


def rounds_of(mesh: Mesh, folder: Path, millions: float, rounds: int, warm: bool) -> dict[str, list[float]]:
    values, rows = shares(mesh, millions)
    blank = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    exchange, grid, blank_grid = Exchange(mesh), theirs(mesh, values), theirs(mesh, blank)
    plain = folder / f"plain-{mesh.rank}.safetensors"
    times: dict[str, list[float]] = {}

    def note(name: str, action: Callable[..., object], *args: Any, **options: Any) -> None:
        loads = name.startswith("load")
        if loads:
            forget(mesh, folder)
            if warm:
                action(*args, **options)
            for tensor in blank.values():
                tensor.zero_()
        times.setdefault(name, []).append(timed(mesh, lambda: action(*args, **options)))
        assert not loads or all(blank[key].equal(values[key]) for key in values), name

    def load_plain() -> None:
        for name, tensor in load_file(plain).items():
            blank[name].copy_(tensor)

    def beside(number: int) -> None:
        what = ours(mesh, values, rows)
        under_way.append(BackgroundSave(folder / "beside", number, what, {}, exchange, staging=staging))

    def clear() -> None:
        barrier(mesh.world, mesh.device)
        if mesh.rank == 0:
            for old in folder.iterdir():
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        barrier(mesh.world, mesh.device)

    under_way: list[BackgroundSave] = []
    staging: Staging = {}
    for number in range(rounds + 1):
        path = folder / f"parallax/step-{number:08d}"
        turns = [
            (("parallax", checkpoint.save, path.parent, number, ours(mesh, values, rows), {}, exchange), {}),
            (("DCP", dcp.save, grid), {"checkpoint_id": folder / "dcp"}),
            (("plain", save_file, values, plain), {}),
        ]
        back = [
            (("parallax", checkpoint.load, path, ours(mesh, blank, rows), exchange), {}),
            (("DCP", dcp.load, blank_grid), {"checkpoint_id": folder / "dcp"}),
            (("plain", load_plain), {}),
        ]
        for verb, all_three in (("save", turns), ("load", back)):
            for at in range(3):  # another one begins each round
                (name, action, *args), options = all_three[(at + number) % 3]
                note(f"{verb} {name}", action, *args, **options)
        clear()
        note("stall", beside, number)
        save = under_way.pop()
        save.thread.join()
        assert save.error is None, save.error
        clear()
    return {name: found[1:] for name, found in times.items()}


def main() -> None:
    wish = asked(
        {
            "millions": ("500", positive),
            "rounds": ("5", count),
            "cache": ("cold", one_of("cold", "warm")),
            "directory": ("/tmp", text),
        },
        sys.argv[1:],
    )
    millions, rounds = wish.millions, wish.rounds
    torch.set_num_threads(1)
    mesh = init_mesh(f"{int(os.environ.get('WORLD_SIZE', '1'))}x1x1", device_type="cpu")
    folder = Path(wish.directory) / "parallax-benchmark-checkpoint"
    if mesh.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    barrier(mesh.world, mesh.device)
    times = rounds_of(mesh, folder, millions, rounds, warm=wish.cache == "warm")
    if mesh.rank == 0:
        shutil.rmtree(folder)
        report(times, millions, mesh.shape.size)


def report(times: dict[str, list[float]], millions: float, ranks: int) -> None:
    size = millions * 4e6
    print(f"torch {torch.__version__}, {ranks} ranks, {millions:g} M float32 = {size / 1e9:.1f} GB")
    print(f"{'':14} {'median':>8} {'GB/s':>6}  parallax takes (median of pairs)")
    for name, found in times.items():
        verb = "save" if name == "stall" else name.split()[0]
        pairs = [mine / other for mine, other in zip(times[f"{verb} parallax"], found, strict=True)]
        shown = f"{statistics.median(pairs):.2f} of its time" if "parallax" not in name else ""
        if name == "stall":
            shown = f"{1 / statistics.median(pairs):.2f} of a save that is waited for"
        median = statistics.median(found)
        print(f"{name:14} {median:6.2f} s {size / 1e9 / median:6.2f}  {shown}")


if __name__ == "__main__":
    main()
