"""One step of a real run, recorded on every rank and drawn above what the same table was predicted to take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parallax.assemble import Run
from parallax.comm import barrier, gather_json
from parallax.mesh import Mesh
from parallax.pipeline.draw import to_svg, to_trace
from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.simulate import Cost, Span, Timeline, played, simulate

__all__ = ["compare", "traced"]

CLOCK_ROUNDS = 9


@contextmanager
def traced(run: Run, output: Path, *, step: int) -> Iterator[list[str]]:
    """Record the pipeline of a train_step inside, if `step` is config.trace; else nothing, at no cost.

    Yields a list that holds afterwards what there is to say. Writes OUTPUT/trace/step-N.svg, the measured step above
    the predicted one on one time scale, and step-N.json, the measured one for Perfetto: of the pipeline whose data and
    tensor coordinates are 0. On CUDA every action is waited for, so a traced step is slower. Collectives: small
    exchanges around the step.
    """
    told: list[str] = []
    if step != run.config.trace:
        yield told
        return
    offset = clock_offset(run.mesh)
    rows: list[tuple[str, float, float]] = []
    run.pipeline.recorder = lambda action, start, end: rows.append((str(action), start - offset, end - offset))
    try:
        yield told
    finally:
        run.pipeline.recorder = None
    every = gather_json(rows, run.mesh.world, run.mesh.device)
    if run.mesh.rank == 0:
        column = run.mesh.shape.peers(0, "pipeline")
        told += _write(run.schedule, [every[rank] for rank in column], output / "trace", step)


def clock_offset(mesh: Mesh) -> float:
    """This rank's perf_counter minus rank 0's: the median over barriers that all ranks leave together."""
    seen = []
    for _ in range(CLOCK_ROUNDS):
        barrier(mesh.world, mesh.device)
        seen.append(time.perf_counter())
    every = gather_json(seen, mesh.world, mesh.device)
    return statistics.median(mine - first for mine, first in zip(seen, every[0], strict=True))


def _write(schedule: Schedule, rows: Sequence[Any], folder: Path, step: int) -> list[str]:
    measured, predicted = compare(schedule, rows)
    titles = [f"{schedule.name}, step {step}, {what}" for what in ("measured", "predicted")]
    picture, events = folder / f"step-{step}.svg", folder / f"step-{step}.json"
    folder.mkdir(parents=True, exist_ok=True)
    picture.write_text(to_svg(schedule, dict(zip(titles, (measured, predicted), strict=True)), unit="ms"), "utf-8")
    events.write_text(to_trace(schedule, measured, title=titles[0], unit_s=1e-3), "utf-8")
    drawn = f"step {step}, measured above predicted, is drawn in {picture}; {events} is the measured one for Perfetto"
    return [sentence(schedule, measured, predicted), drawn]


def compare(schedule: Schedule, rows: Sequence[Sequence[tuple[str, float, float]]]) -> tuple[Timeline, Timeline]:
    """What was measured, and what the table takes with each stage's median times and free messages; both in ms.

    rows: by pipeline rank, (action, start, end) in seconds on one clock.
    """
    begin = min(start for row in rows for _, start, _ in row)
    spans = [
        Span(rank, Action.parse(text), (start - begin) * 1e3, (end - begin) * 1e3)
        for rank, row in enumerate(rows)
        for text, start, end in row
    ]
    return played(schedule, spans), simulate(schedule, _cost(schedule, spans))


def _cost(schedule: Schedule, spans: Sequence[Span]) -> Cost:
    def median(op: Op, stage: int) -> float:
        times = [s.end - s.start for s in spans if s.action.op == op and s.action.stage == stage]
        return statistics.median(times) if times else 0.0

    stages = range(schedule.num_stages)  # which may have whole backwards, split ones, or both
    forward, input_grad, weight_grad, whole = (
        [median(op, stage) for stage in stages] for op in (Op.F, Op.I, Op.W, Op.B)
    )
    return Cost(forward, input_grad, weight_grad, whole=whole)


def sentence(schedule: Schedule, measured: Timeline, predicted: Timeline) -> str:
    """Bubble, what communication and stalls add, and the stage that holds up the others."""
    busy = {
        stage: sum(s.end - s.start for s in measured.spans if s.action.stage == stage)
        for stage in range(schedule.num_stages)
    }
    slowest = max(busy, key=busy.__getitem__)
    mean = sum(busy.values()) / len(busy)
    exposed = max(0.0, measured.makespan - predicted.makespan)
    return (
        f"pipeline of {schedule.name}: {measured.makespan:.1f} ms, bubble {measured.bubble:.1%} (predicted "
        f"{predicted.makespan:.1f} ms, {predicted.bubble:.1%}); messages and stalls that compute does not hide: "
        f"{exposed:.1f} ms ({exposed / measured.makespan:.1%}); slowest is stage {slowest} on pipeline rank "
        f"{schedule.stage_to_rank[slowest]}, {busy[slowest] / mean - 1:.0%} above the mean"
    )
