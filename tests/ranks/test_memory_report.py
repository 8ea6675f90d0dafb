"""What a run takes is what was predicted, part by part; activations excepted, which only a GPU's allocator can tell."""

from __future__ import annotations

import re
from typing import Any

import pytest

from parallax.memory_report import describe_memory, held_bytes
from tests.cases import GPT2, LLAMA, TIED, advance, start

WIDE = {"dtype": "float32", "model.hidden": 192, "model.ffn": 384, "model.layers": 3, "data.bucket_bytes": 400000}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "lion": {"optimizer.name": "lion"},
    "narrow": {"optimizer.state_dtype": "bfloat16", "dtype": "bfloat16"},
    "offload": {"optimizer.offload": "true", "device": "cpu"},
}


def parts(mesh: str, changes: dict[str, Any]) -> tuple[dict[str, float], dict[str, float], str]:
    run, state = start(mesh, **WIDE | changes)
    advance(run, state, 1)
    wished = [run.plan.memory[stage] for stage in run.stages]
    names = ("parameters", "gradients", "optimizer")
    return (
        {name: sum(getattr(memory, name) for memory in wished) for name in names},
        {**held_bytes(run, state)},
        describe_memory(run, state),
    )


def parts_each(mesh: str, options: list[dict[str, Any]]) -> list[Any]:
    return [parts(mesh, changes) for changes in options]


@pytest.mark.parametrize("mesh", ["1x1x1", "2x1x2", "2x2x1"])
def test_each_part_is_as_predicted(ranks, mesh: str):
    options = [GPT2 | optimizer | {"data.zero": 0} for optimizer in OPTIMIZERS.values()]
    options += [GPT2 | {"data.zero": 0, "data.compression": "onebit"}]
    if mesh != "1x1x1":
        options += [LLAMA | {"model.kv_heads": 24, "data.zero": z, "batch.num_microbatches": 1} for z in (1, 2, 3)]
        options += [LLAMA | OPTIMIZERS["narrow"] | {"model.kv_heads": 24, "data.zero": 2}]
    size = 1 if mesh == "1x1x1" else 4
    lines = set()
    for every in ranks(size, parts_each, mesh, options):
        for (wished, held, line), changes in zip(every, options, strict=True):
            lines.add(line)
            assert re.match(r"memory of rank \d, measured \(predicted\): parameters [\d.]+ [KM]B \(", line)
            for name, bytes_held in held.items():
                # Gradients: at level 2 and 3 some of a bucket under way is there too. Else padding and rounding alone.
                if name == "gradients" and changes["data.zero"] >= 2:
                    continue
                assert bytes_held == pytest.approx(wished[name], rel=0.04), (name, changes)
    assert len(lines) == len(options), "every rank says the same"


def test_a_tied_head_has_a_gradient_of_its_own(ranks):
    """Which the prediction leaves out: it counts a tied weight once."""
    wished, held, _ = ranks(1, parts, "1x1x1", GPT2 | TIED)[0]
    assert held["gradients"] > wished["gradients"] and held["parameters"] == pytest.approx(
        wished["parameters"], rel=0.04
    )
