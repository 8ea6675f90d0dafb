"""Do schedules take as long as they are drawn? The real executor over real messages, with stages that sleep.

    torchrun --nproc_per_node 8 benchmarks/schedules.py [unit_ms=20] [rounds=3] [per_rank=2] [only=zb-v,zb-h2]

Sleeping ranks need no core, so the makespan shows as on a machine with a core (or a GPU) for each. The law is the
simulated makespan of the same table at the same times; every schedule runs with 2, 4 and 8 ranks and per_rank as many
microbatches, and the best of the rounds counts. Bubble: idle share of the makespan; inside: of a rank's own span, the
worst rank.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from harness import asked, count, listed, one_of, positive
from torch import Tensor, nn

from parallax.comm import barrier, gather_json
from parallax.gradients import GradSink
from parallax.launch import entrypoint
from parallax.mesh import Mesh, init_mesh
from parallax.pipeline.executor import Executor
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Schedule
from parallax.pipeline.schedules import SCHEDULES
from parallax.pipeline.simulate import Cost, simulate
from parallax.pipeline.transport import P2P
from parallax.pipeline.validate import Wire, validate

ELEMENTS = 4096


class _Sleep(torch.autograd.Function):
    """Forward, input gradient and weight gradient that take a while and compute nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        time.sleep(stage.seconds)
        return torch.zeros((), dtype=torch.float64) if stage.last else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        stage = ctx.stage
        time.sleep(stage.seconds)
        stage.sink.add(stage.weight, lambda out: time.sleep(stage.seconds))
        return torch.zeros(ELEMENTS), None


class SleepingStage:
    dtype = torch.float32

    def __init__(self, seconds: float, *, last: bool) -> None:
        self.seconds, self.last = seconds, last
        self.sink = GradSink()
        self.weight = nn.Parameter(torch.zeros(1))
        self.sink.buffer_of = lambda weight: weight

    def __call__(self, x: Tensor | None, microbatch: Any, scale: float) -> Tensor:
        x = torch.zeros(ELEMENTS, requires_grad=True) if x is None else x
        return _Sleep.apply(x, self)

    def boundary_shape(self, num_samples: int, sequence_length: int) -> tuple[int, ...]:
        return (ELEMENTS,)


class _NoSync:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def play(mesh: Mesh, schedule: Schedule, seconds: float) -> tuple[float, float]:
    """Run one step. Returns this rank's end, and its span: from the start of its first pass to the end of its last."""
    rank, last = mesh.pipeline.rank, schedule.num_stages - 1
    stages = {s: SleepingStage(seconds, last=s == last) for s in schedule.stages_of(rank)}
    sinks = {s: stage.sink for s, stage in stages.items()}
    executor = Executor(stages, sinks, schedule, rank, P2P(mesh, schedule.num_stages), _NoSync())
    times: list[float] = []
    executor.recorder = lambda action, start, end: times.extend((start, end))
    microbatch = SimpleNamespace(tokens_BT=torch.zeros(1, 1))
    barrier(mesh.world, mesh.device)
    begun = time.perf_counter()
    executor.run([microbatch] * schedule.num_microbatches, scale=1.0)
    return time.perf_counter() - begun, times[-1] - times[0]


def measure(mesh: Mesh, table: Schedule, unit_s: float, rounds: int) -> dict[str, float]:
    schedule = lower(table)
    validate(schedule, wire=Wire.ORDERED)
    seconds = unit_s * table.num_ranks / table.num_stages
    law = simulate(table, Cost(seconds, seconds, seconds))
    busy = 3 * table.num_microbatches * unit_s
    best: dict[str, float] = {}
    for _ in range(rounds):
        end, own = play(mesh, schedule, seconds)
        every = gather_json([end, 1 - busy / own], mesh.world, mesh.device)
        makespan = max(row[0] for row in every)
        if not best or makespan < best["makespan"]:
            best = {"makespan": makespan, "inside": max(row[1] for row in every)}
    best |= {"law": law.makespan, "bubble": 1 - busy / best["makespan"]}
    return best | {"drawn": law.bubble, "drawn_inside": law.inner_bubble}


KEYS = {
    "unit_ms": ("20", positive),
    "rounds": ("3", count),
    "per_rank": ("2", count),
    "only": (",".join(SCHEDULES), listed(one_of(*SCHEDULES))),
}


def main(wish: SimpleNamespace) -> None:
    unit_s, rounds, per_rank = wish.unit_ms / 1e3, wish.rounds, wish.per_rank
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    say = int(os.environ.get("RANK", "0")) == 0
    if say:
        print(f"F = I = W = {unit_s * 1e3:g} ms a rank, best of {rounds}, load {os.getloadavg()[0]:.1f}")
        print("schedule     ranks microbatches  law ms  measured ms  ratio  bubble (drawn)  inside (drawn)")
    for num_ranks in (2, 4, 8):
        if world % num_ranks:
            continue
        mesh = init_mesh(f"{world // num_ranks}x1x{num_ranks}", device_type="cpu")
        measure(mesh, SCHEDULES["gpipe"](num_ranks, num_ranks), 1e-3, 1)  # connections are made on first use
        for name in wish.only:
            table = SCHEDULES[name](num_ranks, per_rank * num_ranks)
            row = measure(mesh, table, unit_s, rounds)
            law, took = row["law"], row["makespan"]
            line = f"{name:<12} {num_ranks:>5} {table.num_microbatches:>12} {law * 1e3:>7.0f} {took * 1e3:>12.0f}"
            line += f" {took / law:>6.3f} {row['bubble']:>7.1%} {row['drawn']:>7.1%} {row['inside']:>7.1%}"
            if say:
                print(line + f" {row['drawn_inside']:>7.1%}", flush=True)


if __name__ == "__main__":
    wish = asked(KEYS, sys.argv[1:])
    entrypoint(lambda: main(wish))
