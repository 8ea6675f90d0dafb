"""The path of a GPU on a CPU: a device that is CUDA's to torch and computes with the CPU's kernels (tests/simulated).

What it shows: nothing meets a tensor of the other side, the numbers are the CPU's, on every mesh, the host waits once a
step, and how many kernels there are. What only a GPU shows is in test_cuda.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cases import GPT2, LLAMA, QWEN3, SEQUENCE_PARALLEL, TIED, VARIANTS, train, worst
from tests.gpu.test_cuda import ROOT, SMALL, parity_rows
from tests.simulated.device import build, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def command(tmp_path_factory) -> list[str]:
    """Begins a process with the device."""
    library = tmp_path_factory.mktemp("simulated") / "device.so"
    build(library)
    return [sys.executable, "-m", "tests.simulated.run", str(library)]


@pytest.fixture(scope="session")
def simulated(command):
    """simulated(name, *arguments): what the job of that name in tests/simulated/jobs.py returns."""

    def call(name: str, *arguments: Any) -> Any:
        line = [*command, "call", f"tests.simulated.jobs:{name}", json.dumps(arguments)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return call


def test_the_device_tells_what_a_gpu_would_do(simulated):
    found = simulated("hazards")
    assert "same device" in found["mixed"]
    assert found["before"] and found["after"], "a copy to pinned memory is there when somebody has waited for it"
    assert (found["quiet"], found["waits"]) == (0, 3)
    assert (found["bytes"], found["freed"]) == (4000, 0)


CASES: dict[str, dict[str, Any]] = {
    **{name: VARIANTS[name] for name in ("gpt2-tied", "gpt2-dropout", "llama", "qwen3-tied-sp")},
    "recompute": LLAMA | {"recompute": "full"},
    "recompute the core": GPT2 | {"recompute": "selective", "model.dropout": 0.1},
    "offloaded activations": LLAMA | QWEN3 | {"offload_activations": "true"},
    "offloaded optimizer": GPT2 | {"optimizer.offload": "true"},
    "muon": LLAMA | TIED | {"optimizer.name": "muon"},
    "replicas": GPT2 | {"check_replicas_every": 1},
    "compression": LLAMA | {"data.compression": "powersgd"},
}


def test_it_trains_as_the_cpu_does_and_the_host_waits_once_a_step(simulated):
    """Float64, three steps."""
    for (name, changes), found in zip(CASES.items(), simulated("train_several", list(CASES.values())), strict=True):
        assert worst(found["rows"], train("1x1x1", changes, 3)[:3]) <= 1e-12, name
        assert found["waits"] == [1, 1, 1], name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8"])
def test_narrow_dtypes_train_too(simulated, dtype: str):
    """Their roundings are the device's own; the loss is that of float64 to a percent."""
    sizes = {"model.hidden": 64, "model.heads": 4, "model.kv_heads": None, "model.ffn": 128, "optimizer.lr": 1e-3}
    changes = [GPT2 | sizes | {"dtype": dtype}, sizes | {"dtype": dtype}]
    for change, found in zip(changes, simulated("train_several", changes), strict=True):
        exact = train("1x1x1", change | {"dtype": "float64"}, 3)[:3]
        for (loss, _), (right, _) in zip(found["rows"], exact, strict=True):
            assert loss == pytest.approx(right, rel=0.01)
        assert found["waits"] == [1, 1, 1]


def test_moments_in_bfloat16_are_rounded_as_on_the_cpu_in_few_kernels(simulated):
    changes = GPT2 | {"dtype": "float32", "optimizer.state_dtype": "bfloat16"}
    assert simulated("same_moments", changes) > 0.99
    few, many = simulated("train_several", [changes | {"model.layers": n} for n in (2, 4)])
    assert sum(many["kernels"].values()) - sum(few["kernels"].values()) < 300, "not some for each parameter"


def test_batches_and_validation_keep_nobody_waiting(simulated):
    assert simulated("read_batches") == 0
    assert simulated("evaluate", GPT2, 3) == 3, "the loss of each batch is read"


def test_a_save_in_the_background_has_its_copies_before_the_training_goes_on(simulated):
    assert simulated("copies_are_there")


def test_kernels_of_a_layer(simulated):
    """Of one layer and microbatch, forward and backward, in bfloat16: no kernel of torch's is written out."""
    sizes = {"dtype": "bfloat16", "model.hidden": 64, "model.heads": 4, "model.ffn": 256, "batch.num_microbatches": 1}
    for changes, most in ((GPT2, 53), (LLAMA | {"model.kv_heads": None}, 53)):
        few, many = simulated("train_several", [changes | sizes | {"model.layers": n} for n in (2, 4)])
        one = {name: (count - few["kernels"].get(name, 0)) / 2 for name, count in many["kernels"].items()}
        assert one["aten::_scaled_dot_product_flash_attention_for_cpu"] == 1
        assert one["aten::mm"] + one.get("aten::addmm", 0) == 12
        assert one.get("aten::linalg_vector_norm", 0) == 0, "norms of gradients are few kernels, not one each"
        assert sum(one.values()) <= most, one


def test_the_loss_is_not_cut_as_for_a_cache(simulated):
    """A hundred kernels for 20 million logits; in chunks for a CPU's cache it would be hundreds."""
    found = simulated("loss_kernels", 1000, 20_000)
    assert found["fused"] and found["kernels"] < 100


MESHES = [
    ("2x2x2", [*SEQUENCE_PARALLEL.items()]),
    ("2x1x2", [("data.zero", 2), ("pipeline.schedule", "zb-h2")]),
    ("2x1x1", [("data.zero", 3)]),
    ("1x1x2", [("pipeline.schedule", "zb-v")]),
]


@pytest.fixture(scope="session")
def alone(command, tmp_path_factory) -> list[dict[str, float]]:
    return parity_rows(
        "1x1x1", 1, tmp_path_factory.mktemp("alone"), [*SMALL, "dtype=float64", "steps=3"], [*command, "script"]
    )


@pytest.mark.parametrize(("mesh", "options"), MESHES, ids=[mesh for mesh, _ in MESHES])
def test_any_mesh_trains_as_one_rank(command, alone, tmp_path: Path, mesh: str, options: list[tuple[str, Any]]):
    """Over gloo with NCCL's manners: tensors of the device alone, messages in the order of posting."""
    given = [*SMALL, "dtype=float64", "steps=3", *(f"{key}={value}" for key, value in options)]
    several = parity_rows(mesh, math.prod(map(int, mesh.split("x"))), tmp_path, given, [*command, "script"])
    for row, other in zip(several, alone, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-10)


def test_the_recipe_saves_beside_the_training_and_goes_on(command, tmp_path: Path):
    """From what was saved in the background, out of pinned memory, a run goes on to the same digits."""
    options = [*SMALL, "log_every=1", "checkpoint.every=2", "checkpoint.background=true", "validation.every=4"]

    def run(output: str, *more: str) -> list[dict[str, Any]]:
        line = [*command, "script", str(ROOT / "recipes/gpt.py"), *options, f"output={tmp_path / output}", *more]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(text) for text in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]

    whole = run("whole", "steps=4")
    rest = run("rest", "steps=4", f"resume={tmp_path / 'whole/checkpoints/step-00000002'}")
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[2:]]
    assert rest[-1]["val_loss"] == whole[-1]["val_loss"] and whole[-1]["mfu"] > 0
