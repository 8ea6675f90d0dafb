"""What a checkpoint says of the run is checked before any tensor of the run changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax import checkpoint
from parallax.checkpoint.manifest import seal, unseal
from parallax.errors import DamagedCheckpoint, NewerCheckpoint
from parallax.resume import Checkpoints
from tests.cases import LLAMA, TIED, advance, start
from tests.local.test_checkpoint_damage import edit

CASE = LLAMA | TIED | {"dtype": "float32", "model.layers": 2, "checkpoint.keep": 0}

EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no tokens": (lambda s: s.pop("tokens"), "tokens is None"),
    "a step that is a text": (lambda s: s.update(step="x"), "step is 'x'"),
    "a step that is a bool": (lambda s: s.update(step=True), "step is True"),
    "another step": (lambda s: s.update(step=999), "step is 999, the manifest's is 2"),
    "a step below 0": (lambda s: s.update(step=-5), "step is -5"),
    "batches in a list": (lambda s: s.update(batches=[]), r"batches is \[\]"),
    "fewer batches than steps": (lambda s: s.update(batches=1), "batches is 1"),
    "more skipped than done": (lambda s: s.update(skipped_steps=7), "skipped_steps is 7"),
    "no loss scale": (lambda s: s.update(loss_scale=0), "loss_scale is 0"),
    "a configuration that is a text": (lambda s: s.update(config="x"), "config is no object"),
    "a section that is a list": (lambda s: s["config"].update(batch=[]), "batch is no object"),
    "no section for compression": (lambda s: s["config"].update(data=None), "data is no object"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    run, state = start("1x1x1", **CASE)
    checkpoints = Checkpoints(run, output)
    for _ in range(2):
        advance(run, state, 1)
        checkpoints.save(state)
    return output


@pytest.mark.parametrize("kind", EDITS)
def test_a_state_that_no_run_saves_is_damage_and_changes_nothing(saved: Path, kind: str):
    change, message = EDITS[kind]
    newest = checkpoint.find(saved / "checkpoints")[-1]
    whole = (newest / "manifest.json").read_bytes()
    edit(newest, lambda manifest: change(manifest["state"]))
    try:
        run, state = start("1x1x1", **CASE | {"resume": str(newest)})
        (flat,) = run.flats.values()
        before = flat.values.clone()
        with pytest.raises(DamagedCheckpoint, match=message):
            Checkpoints(run, saved).resume(state)
        assert torch.equal(flat.values, before) and state.step == 0
        run, state = start("1x1x1", **CASE | {"resume": "auto", "output": str(saved)})
        said = Checkpoints(run, saved).resume(state)
        assert state.step == 1 and said.startswith("WARNING: passed over: ")
    finally:
        (newest / "manifest.json").write_bytes(whole)


def test_auto_does_not_go_back_past_a_newer_parallax(saved: Path):
    """Older checkpoints are there, and going on from one would lose work that is not damaged."""
    newest = checkpoint.find(saved / "checkpoints")[-1]
    whole = (newest / "manifest.json").read_bytes()
    manifest = json.loads(unseal(whole)) | {"version": 2}
    (newest / "manifest.json").write_bytes(seal(json.dumps(manifest).encode()))
    run, state = start("1x1x1", **CASE | {"resume": "auto", "output": str(saved)})
    try:
        with pytest.raises(NewerCheckpoint, match="install the parallax that wrote it"):
            Checkpoints(run, saved).resume(state)
    finally:
        (newest / "manifest.json").write_bytes(whole)
