"""Every schedule on real processes, with everything else that a run may have; and under random delays."""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Any

import pytest

from parallax.pipeline.schedules import SCHEDULES, make_schedule
from parallax.pipeline.table import to_text
from parallax.resume import Checkpoints
from tests.cases import (
    GPT2,
    LLAMA,
    SEQUENCE_PARALLEL,
    TIED,
    advance,
    assemble_whole,
    gather_parameters,
    start,
    train,
    worst,
)

COMPOSED = {
    "gpt2": GPT2 | TIED | SEQUENCE_PARALLEL | {"model.layers": 5, "model.dropout": 0.1, "batch.num_microbatches": 6},
    "llama": LLAMA | {"batch.num_microbatches": 4},
}


def train_each(mesh: str, names: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: train(mesh, changes | {"pipeline.schedule": name}, 2) for name in names}


@pytest.mark.parametrize(("variant", "names"), [("gpt2", list(SCHEDULES)), ("llama", ["interleaved", "zb-v"])])
def test_every_schedule_composes_with_every_axis(ranks, variant: str, names: list[str]):
    """Float64, two steps and a validation, on data x tensor x pipeline ranks: loss and norm of one rank."""
    alone = train("1x1x1", COMPOSED[variant], 2)
    for rows in ranks(8, train_each, "2x2x2", names, COMPOSED[variant]):
        differences = {name: worst(rows[name], alone) for name in names}
        assert max(differences.values()) <= 1e-10, differences


def final(mesh: str, changes: dict[str, Any]) -> Any:
    run, state = start(mesh, **changes)
    advance(run, state, 3)
    return gather_parameters(run, state)


BITS = {
    "gpt2": GPT2 | TIED | {"dtype": "float32", "batch.num_microbatches": 6, "model.dropout": 0.1},
    "llama": LLAMA | {"dtype": "float32", "batch.num_microbatches": 4},
}


def final_each(mesh: str, names: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: final(mesh, changes | {"pipeline.schedule": name}) for name in names}


@pytest.mark.parametrize(("variant", "mesh"), [("gpt2", "1x1x3"), ("llama", "1x1x2")])
def test_every_schedule_is_no_pipeline_bit_for_bit(ranks, tmp_path: Path, variant: str, mesh: str):
    """Float32, three steps; and tables from files, all of whose backwards are split."""
    alone = assemble_whole([final("1x1x1", BITS[variant])])
    files = [tmp_path / f"{name}.csv" for name in ("zb-h2", "zb-v")]
    for path in files:
        path.write_text(to_text(make_schedule(path.stem, int(mesh[-1]), BITS[variant]["batch.num_microbatches"])))
    names = [*SCHEDULES, *map(str, files)]
    parts = ranks(int(mesh[-1]), final_each, mesh, names, BITS[variant])
    for name in names:
        whole = assemble_whole([part[name] for part in parts])
        assert whole.keys() == alone.keys()
        for key, values in alone.items():
            assert values.equal(whole[key]), (name, key)


def go(mesh: str, changes: dict[str, Any], output: str, wish: str) -> Any:
    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    rows = advance(run, state, 2)
    checkpoints.save(state)
    return rows


def test_a_run_goes_on_under_another_schedule(ranks, tmp_path: Path):
    """Stages lie elsewhere, names do not: tied weights twice on one rank included."""
    changes = GPT2 | TIED | {"batch.num_microbatches": 4, "model.layers": 5}
    rows: list[Any] = []
    plan = [("1x1x2", "zb-v"), ("1x1x3", "interleaved"), ("1x2x2", "dualpipe-v"), ("1x1x1", "1f1b")]
    for number, (mesh, schedule) in enumerate(plan):
        size = math.prod(map(int, mesh.split("x")))
        wish = "auto" if number else "none"
        found = ranks(size, go, mesh, changes | {"pipeline.schedule": schedule}, str(tmp_path), wish)
        assert all(other == found[0] for other in found)
        rows += found[0]
    run, state = start("1x1x1", **changes)
    assert worst(rows, advance(run, state, 8)) <= 1e-10


def jittered(schedule: str, seed: int, changes: dict[str, Any]) -> Any:
    """Random pauses before every action: of compute, and of messages."""
    run, state = start("2x1x4", **changes | {"pipeline.schedule": schedule})
    dice = random.Random(seed * 1000 + run.mesh.rank)
    for op, honest in run.pipeline._do.items():

        def late(action: Any, honest: Any = honest) -> None:
            if dice.random() < 0.4:
                time.sleep(dice.random() * 0.004)
            honest(action)

        run.pipeline._do[op] = late
    return advance(run, state, 2)


JITTERED = LLAMA | {"dtype": "float32", "batch.num_microbatches": 6, "model.layers": 6}


@pytest.mark.parametrize("schedule", ["zb-v"])
def test_random_delays_change_nothing_and_hang_nobody(ranks, schedule: str):
    every = ranks(8, jittered, schedule, 0, JITTERED, timeout_s=60)
    assert all(rows == every[0] for rows in every)
    assert every[0] == ranks(8, jittered, schedule, 1, JITTERED, timeout_s=60)[0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_runs_under_random_delays(ranks):
    names = list(SCHEDULES)
    first: dict[str, Any] = {}
    for seed in range(50):
        name = names[seed % len(names)]
        every = ranks(8, jittered, name, seed, JITTERED, timeout_s=60)
        assert all(rows == first.setdefault(name, every[0]) for rows in every), (name, seed)
