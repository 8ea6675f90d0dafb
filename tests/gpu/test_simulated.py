"""The path of a GPU on a CPU: a device that is CUDA's to torch and computes with the CPU's kernels (tests/simulated).

What it shows: nothing meets a tensor of the other side, the numbers are the CPU's, on every mesh, the host waits once a
step, and how many kernels there are. What only a GPU shows is in test_cuda.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallax.models import costs
from parallax.tensor import loss
from tests.cases import GPT2, LLAMA, QWEN3, SEQUENCE_PARALLEL, TIED, VARIANTS, fit_kv_heads, train, worst
from tests.gpu.test_cuda import ROOT, SMALL, free_port
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
        return on_ranks(command, 1, name, *arguments)[0]

    return call


def on_ranks(command: list[str], size: int, name: str, *arguments: Any) -> list[Any]:
    """What the job returns on each of so many ranks."""
    line = [*command, "call", f"tests.simulated.jobs:{name}", json.dumps(arguments)]
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    processes = [
        subprocess.Popen(
            line,
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(error for _, error in said)[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_the_device_tells_what_a_gpu_would_do(simulated):
    found = simulated("hazards")
    assert "same device" in found["mixed"]
    assert found["before"] and found["after"], "a copy to pinned memory is there when somebody has waited for it"
    assert (found["quiet"], found["waits"]) == (0, 4)
    assert (found["bytes"], found["freed"]) == (4000, 0)


CASES: dict[str, dict[str, Any]] = {
    **{name: VARIANTS[name] for name in ("gpt2-tied", "gpt2-dropout", "llama", "qwen3-tied-sp")},
    "recompute": LLAMA | {"recompute": "full"},
    "recompute the core": GPT2 | {"recompute": "selective", "model.dropout": 0.1},
    "offloaded activations": LLAMA | QWEN3 | {"offload_activations": "true"},
    "offloaded optimizer": GPT2 | {"optimizer.offload": "true"},
    "muon": LLAMA | TIED | {"optimizer.name": "muon"},
}
WAITS = {"offloaded optimizer": 3}  # for the gradients of two segments too, which the host updates by


def test_it_trains_as_the_cpu_does_and_the_host_waits_once_a_step(simulated):
    """Float64, three steps."""
    for (name, changes), found in zip(CASES.items(), simulated("train_several", list(CASES.values())), strict=True):
        assert worst(found["rows"], train("1x1x1", changes, 3)[:3]) <= 1e-12, name
        assert found["waits"] == [WAITS.get(name, 1)] * 3, name


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.005), ("float16", 0.002), ("float8", 0.02)])
def test_narrow_dtypes_train_too(simulated, dtype: str, bound: float):
    """Their roundings are the device's own: the first gradients are float64's to a bound, and the loss falls as far."""
    sizes = {"model.hidden": 64, "model.heads": 4, "model.kv_heads": None, "model.ffn": 128, "optimizer.lr": 0.003}
    changes = [GPT2 | sizes | {"dtype": dtype}, sizes | {"dtype": dtype}]
    for change, found in zip(changes, simulated("train_several", changes, 12, "1x1x1", True), strict=True):
        exact = simulated("train", change | {"dtype": "float64"}, 12, "1x1x1", True)
        (first, norm), (right, right_norm) = found["rows"][0], exact["rows"][0]
        assert first == pytest.approx(right, rel=1e-3) and norm == pytest.approx(right_norm, rel=bound)
        fallen, wanted = first - found["rows"][-1][0], right - exact["rows"][-1][0]
        assert wanted > 0.5 and fallen == pytest.approx(wanted, rel=0.03)
        assert found["waits"] == [1] * 12


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
    tokens, vocab, width = 1000, 20_000, 8
    found = simulated("loss_kernels", tokens, vocab)
    assert found["fused"] and found["kernels"] < 100
    weight = 4 * vocab * width
    assert found["peak"] < 1.05 * (tokens * vocab * (2 + 4) + 4 * loss.WIDENED) + 2 * weight, (
        "as the plan has it, and what is widened"
    )


def test_the_next_logits_are_made_when_the_last_are_gone(simulated):
    """Of 1.5 times the logits that a GPU has at once, no more are there than of these."""
    vocab = 20_000
    found = simulated("loss_kernels", 3 * costs.LOGITS_ON_A_GPU // vocab // 2, vocab)
    assert found["peak"] < 1.05 * (costs.LOGITS_ON_A_GPU * (2 + 4) + 4 * loss.WIDENED) + 8 * vocab * 8


MESHES: list[tuple[str, dict[str, Any]]] = [
    ("2x2x2", LLAMA | SEQUENCE_PARALLEL | {"batch.num_microbatches": 4}),
    ("2x1x2", GPT2 | TIED | {"data.zero": 2, "pipeline.schedule": "zb-h2", "batch.num_microbatches": 4}),
    ("2x1x1", LLAMA | {"data.zero": 3, "check_replicas_every": 3}),
    ("2x1x1", GPT2 | {"data.compression": "powersgd", "check_replicas_every": 3}),
    ("1x1x2", LLAMA | {"pipeline.schedule": "zb-v", "batch.num_microbatches": 4}),
]


@pytest.mark.parametrize(("mesh", "changes"), MESHES)
def test_any_mesh_trains_as_on_the_cpu(command, ranks, mesh: str, changes: dict[str, Any]):
    """Over gloo with NCCL's manners: tensors of the device alone, messages in the order of posting."""
    size = math.prod(map(int, mesh.split("x")))
    every = on_ranks(command, size, "train", fit_kv_heads(changes, int(mesh[2])), 3, mesh)
    on_cpu = ranks(size, train, mesh, fit_kv_heads(changes, int(mesh[2])), 3)
    for found, wanted in zip(every, on_cpu, strict=True):
        assert worst(found["rows"], wanted[:3]) <= 1e-10
        assert found["waits"][:2] == [1, 1], "the third compares copies too"


def run_recipe(command: list[str], *options: str) -> str:
    line = [*command, "script", str(ROOT / "recipes/gpt.py"), "device=cuda", *options]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_memory_of_the_recipe_is_what_was_planned(command, tmp_path: Path):
    """Without the probabilities of attention that a CPU keeps, with those of the loss: measured by the allocator."""
    options = ["steps=1", "checkpoint.every=0", "validation.every=0", f"output={tmp_path / 'out'}"]
    said = run_recipe(command, *options, "dtype=bfloat16")
    found = re.search(r"what is temporary ([\d.]+) MB \(([\d.]+) MB\)", said)
    assert found is not None, said
    measured, planned = map(float, found.groups())
    assert planned > 30 and measured == pytest.approx(planned, rel=0.1)


def test_the_recipe_saves_beside_the_training_and_goes_on(command, tmp_path: Path):
    """From what was saved in the background, out of pinned memory, a run goes on to the same digits."""
    options = [*SMALL[1:], "log_every=1", "checkpoint.every=2", "checkpoint.background=true", "validation.every=4"]

    def run(output: str, *more: str) -> list[dict[str, Any]]:
        run_recipe(command, *options, f"output={tmp_path / output}", *more)
        return [json.loads(text) for text in (tmp_path / output / "metrics.jsonl").read_text().splitlines()]

    whole = run("whole", "steps=4")
    rest = run("rest", "steps=4", f"resume={tmp_path / 'whole/checkpoints/step-00000002'}")
    assert [row["loss"] for row in rest] == [row["loss"] for row in whole[2:]]
    assert rest[-1]["val_loss"] == whole[-1]["val_loss"] and whole[-1]["mfu"] > 0
