"""Building a model takes no more memory than the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from parallax import assemble, memory
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from tests.cases import make_config, start

CODE = """
import torch
torch.set_num_threads(1)
from parallax.memory import peak_memory_bytes
from tests.cases import start
from parallax.memory_report import held_bytes
BIG = {{"dtype": "{dtype}", "model.hidden": 1024, "model.ffn": 4096, "model.heads": 8, "model.layers": 5}}
start("1x1x1", **{{"model.layers": 1}})  # what libraries take at their first use
before = peak_memory_bytes(torch.device("cpu"))
run, state = start("1x1x1", **BIG)
peak = peak_memory_bytes(torch.device("cpu")) - before
print(peak, sum(held_bytes(run, state).values()))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_construction_is_what_is_kept(dtype: str):
    """Parameters, gradients, masters and moments of 84 M parameters, and a tile of random numbers."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(dtype=dtype)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, kept = map(int, done.stdout.split())
    assert kept > 1e9 and 0.9 * kept < peak <= 1.1 * kept, f"{peak / 1e6:.0f} MB for {kept / 1e6:.0f} MB"


def test_more_memory_than_there_is_is_foretold(monkeypatch: pytest.MonkeyPatch):
    run = start("1x1x1")[0]
    need = run.plan.memory[0].total
    monkeypatch.setattr(assemble, "memory_bytes", lambda device: need)
    assert "WARNING" not in run.describe()
    monkeypatch.setattr(assemble, "memory_bytes", lambda device: need - 1)
    assert f"WARNING: {memory.format_bytes(need)} are predicted for the ranks of a machine, and there" in run.describe()


def test_what_a_machine_has_is_bounded_by_its_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    unlimited, limit = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    unlimited.write_text("max\n")
    limit.write_text("12345678\n")
    has = memory.memory_bytes(torch.device("cpu"))
    assert has > 100_000_000
    for paths, wanted in (((unlimited,), None), ((unlimited, limit), 12345678), ((tmp_path / "none",), None)):
        monkeypatch.setattr(memory, "CGROUPS", paths)
        found = memory.memory_bytes(torch.device("cpu"))
        assert found == wanted if wanted else found >= has


def test_a_model_that_a_pipeline_could_not_cut_is_refused():
    """On one rank too, where nobody asks for what it has not."""

    class Mine(nn.Module):
        def __init__(self, config: object, mesh: object, units: object, **options: object) -> None:
            super().__init__()

    with pytest.raises(ConfigError, match="Mine has no dtype and no boundary_shape: the next stage must know"):
        assemble.assemble(make_config("1x1x1"), init_mesh("1x1x1", device_type="cpu"), Mine)
