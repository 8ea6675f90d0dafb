"""`parallax bench` as a user calls it."""

from __future__ import annotations

import re

import pytest

from parallax.bench_command import default_meshes
from parallax.cli import main

SMALL = ["model.layers=2", "model.hidden=64", "model.heads=4", "corpus.sequence_length=32", "steps=3", "device=cpu"]


def test_a_row_a_mesh(capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ".")
    assert main(["bench", "mesh=1x1x1", "mesh=1x2x1", *SMALL, "batch.global_size=4"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["mesh", "step", "tokens/s"]
    for mesh, line in zip(("1x1x1", "1x2x1"), lines[1:], strict=True):
        found = re.match(rf"{mesh} +(\d+) ms +([\d,]+) +([\d.]+) +(\d+)% +[\d.]+ MB", line)
        assert found, line
        milliseconds, tokens = int(found[1]), int(found[2].replace(",", ""))
        assert tokens == pytest.approx(4 * 32 / milliseconds * 1000, rel=0.2) or milliseconds < 5


def test_mistakes_are_told_before_anything_starts(capsys):
    assert main(["bench", "mesh=1x3x1", *SMALL]) == 2
    assert "model.heads=4 does not divide by tensor=3" in capsys.readouterr().err
    assert main(["bench", "model.layer=2"]) == 2
    assert "did you mean model.layers" in capsys.readouterr().err
    assert default_meshes()[0] == "1x1x1"
