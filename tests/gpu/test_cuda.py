"""What only a GPU can show. Skipped without CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import VARIANTS, advance, start, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "device=cuda",
    "model.layers=4",
    "model.hidden=64",
    "model.heads=4",
    "corpus.sequence_length=64",
    "batch.global_size=8",
    "batch.num_microbatches=4",
]


def train_on(device: str, changes: dict[str, Any]) -> list[tuple[float, float]]:
    return advance(*start("1x1x1", on=device, **changes), 4)


@pytest.mark.parametrize("variant", ["gpt2-tied", "llama", "gpt2-dropout"])
def test_cuda_trains_as_the_cpu_does(variant: str):
    """Float64: the same initial weights, dropout masks and losses on either device."""
    assert worst(train_on("cuda", VARIANTS[variant]), train_on("cpu", VARIANTS[variant])) <= 1e-9


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("variant", ["llama", "gpt2-dropout"])
def test_compiled_it_trains_the_same(variant: str):
    """Norms, activations, positions, and dropout's mask to the last bit."""
    compiled = train_on("cuda", VARIANTS[variant] | {"compile": "true"})
    assert worst(compiled, train_on("cpu", VARIANTS[variant])) <= 1e-9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_loss_and_its_gradient_are_torch_s(dtype: str):
    """Of logits that are not held, in several chunks, with ignored targets."""
    from parallax.mesh import Axis
    from parallax.tensor.fused_loss import linear_cross_entropy
    from parallax.tensor.layers import ColumnParallelLinear

    torch.manual_seed(0)
    kind = getattr(torch, dtype)
    layer = ColumnParallelLinear(64, 30_000, Axis("tensor"), bias=False, device="cuda", dtype=kind)
    x = torch.randn(3000, 64, device="cuda", dtype=kind, requires_grad=True)
    targets = torch.randint(0, 30_000, (3000,), device="cuda")
    targets[::7] = -100
    linear_cross_entropy(x, layer, targets, vocab_range=(0, 30_000), scale=1024 / 2571).backward()
    exact = x.detach().double().requires_grad_()
    weight = layer.weight.detach().double().requires_grad_()
    (1024 * torch.nn.functional.cross_entropy(exact @ weight.T, targets)).backward()  # float16 needs a loss scale
    for found, wanted in ((x.grad, exact.grad), (layer.weight.grad, weight.grad)):
        assert (found.double() - wanted).norm() <= (1e-2 if kind != torch.float32 else 1e-4) * wanted.norm()


def test_the_recipe_trains_in_bfloat16(tmp_path: Path):
    line = [sys.executable, str(ROOT / "recipes/gpt.py"), "device=cuda", "dtype=bfloat16", "steps=120", "output=out"]
    done = subprocess.run(
        line, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(text) for text in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] > 5 and rows[-1]["loss"] < 2.8
    name = torch.cuda.get_device_name()
    if re.search("H100|H200|A100", name):
        assert 0 < rows[-1]["mfu"] < 1, "the peak of this device is known"


def test_attention_takes_a_fused_kernel():
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        train_on("cuda", VARIANTS["llama"] | {"dtype": "bfloat16", "model.heads": 3, "model.kv_heads": 3})
    kernels = " ".join(event.key for event in profiled.key_averages()).lower()
    assert "flash" in kernels or "fmha" in kernels or "cudnn" in kernels, kernels[:2000]
    assert "adam" in kernels, "one fused optimizer kernel"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parity_rows(mesh: str, size: int, folder: Path, options: list[str]) -> list[dict[str, float]]:
    """Ranks that share one GPU: NCCL takes them when each believes to be on a host of its own."""
    port, result = free_port(), folder / f"{mesh}.json"
    processes = []
    for rank in range(size):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "RANK": str(rank),
            "LOCAL_RANK": "0" if torch.cuda.device_count() < size else str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NCCL_HOSTID": str(rank),
            "NCCL_SOCKET_IFNAME": "lo",
        }
        line = [sys.executable, "-m", "parallax.parity", str(result), *options, f"mesh={mesh}"]
        processes.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(errors)[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("mesh", ["2x1x1", "1x2x1", "1x1x2", "2x2x2"])
@pytest.mark.parametrize("parallel", ["false", "true"])
def test_any_mesh_over_nccl_trains_as_one_rank(tmp_path: Path, mesh: str, parallel: str):
    options = [*SMALL, "dtype=float64", "steps=3", f"tensor.sequence_parallel={parallel}"]
    size = 8 if mesh == "2x2x2" else 2
    alone = parity_rows("1x1x1", 1, tmp_path, options)
    several = parity_rows(mesh, size, tmp_path, options)
    for row, other in zip(several, alone, strict=True):
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-10)
