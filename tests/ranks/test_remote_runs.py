"""A run whose checkpoints lie in a store that knows neither rename nor fsync, seen by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parallax import checkpoint
from parallax.errors import ParallaxError
from parallax.resume import Checkpoints, prepare_output
from tests.cases import LLAMA, TIED, advance, assemble_whole, gather_parameters, start
from tests.ranks.test_resume import KINDS

CASE = LLAMA | TIED | {"model.layers": 2, "checkpoint.keep": 2}


def go(mesh: str, output: str, url: str, until: int, background: bool = False, wish: str = "auto") -> dict[str, Any]:
    options = {"output": output, "checkpoint.directory": url, "resume": wish}
    run, state = start(mesh, **CASE | options | {"checkpoint.background": str(background).lower()})
    checkpoints = Checkpoints(run, prepare_output(run.config, run.mesh))
    checkpoints.take_lock()
    said = [checkpoints.resume(state)]
    while state.step < until:
        advance(run, state, 1)
        said.append(checkpoints.save_or_warn(state, last=state.step == until))
    found = {kind: gather_parameters(run, state, kind) for kind in KINDS}
    return {"said": said, "rows": advance(run, state, 1), "found": found, "on": checkpoints.how_to_go_on()}


@pytest.mark.parametrize("background", [False, True])
def test_a_run_goes_on_from_a_store(ranks, tmp_path: Path, background: bool):
    url = f"file://{tmp_path}/bucket/run"
    first = ranks(2, go, "2x1x1", str(tmp_path / "a"), url, 3, background)
    assert not first[0]["said"][0] and not (tmp_path / "a/checkpoints").exists()
    assert url in first[0]["on"]
    assert [path.name[-1] for path in checkpoint.find(checkpoint.place(url))] == ["2", "3"]
    second = ranks(4, go, "1x2x2", str(tmp_path / "b"), url, 3)
    assert f"resumed from {url}/step-00000003" in second[0]["said"][0]
    for kind in KINDS:
        left, right = (assemble_whole([part["found"][kind] for part in parts]) for parts in (first, second))
        assert all(values.equal(right[name]) for name, values in left.items())
    assert second[0]["rows"][0] == pytest.approx(first[0]["rows"][0], rel=1e-10)


def refused(output: str, url: str) -> str:
    try:
        go("2x1x1", output, url, 1, wish="none")
    except ParallaxError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_new_run_does_not_write_among_the_checkpoints_of_another(ranks, tmp_path: Path):
    url = f"file://{tmp_path}/bucket/run"
    ranks(2, go, "2x1x1", str(tmp_path / "a"), url, 1)
    for answer in ranks(2, refused, str(tmp_path / "b"), url):
        assert answer.startswith("ConfigError: checkpoint.directory=") and "resume=auto" in answer
    for answer in ranks(2, refused, str(tmp_path / "c"), "nosuch://bucket/run"):
        assert answer.startswith("ConfigError") and "no store of nosuch://" in answer, answer
