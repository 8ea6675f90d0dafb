"""The checkpoint in tests/data, as it was made: python -m tests.data_checkpoint (once a version of the manifest)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from parallax.checkpoint.manifest import VERSION
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, start
from tests.ranks.workers import run_ranks

DATA = Path(__file__).parent / "data"
CASE: dict[str, Any] = (
    LLAMA
    | TIED
    | {
        "model.layers": 1,
        "model.hidden": 8,
        "model.heads": 4,
        "model.kv_heads": 2,
        "model.ffn": 12,
        "model.vocab": 31,
        "optimizer.lr": 0.001,
    }
)
MESH, STEPS = "2x2x1", 2


def train(output: str) -> None:
    run, state = start(MESH, **CASE | {"data.zero": 2})
    advance(run, state, STEPS)
    Checkpoints(run, Path(output)).save(state)


def go_on(path: str) -> list[Any]:
    run, state = start("1x1x1", **CASE | {"resume": path})
    Checkpoints(run, Path("unused")).resume(state)
    return advance(run, state, 2)


if __name__ == "__main__":
    target = DATA / f"checkpoint-version-{VERSION}"
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(4, train, folder)
        shutil.copytree(Path(folder) / f"checkpoints/step-{STEPS:08d}", target)
    rows = run_ranks(1, go_on, str(target))[0]
    (DATA / f"checkpoint-version-{VERSION}.json").write_text(json.dumps(rows) + "\n")
