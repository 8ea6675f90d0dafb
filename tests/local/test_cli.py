"""The parallax command: what needs no ranks."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import parallax
from parallax import bench_command, cli
from parallax import parity as parity_file
from parallax import verify_resume as verify_file
from parallax.assemble import DTYPES
from parallax.errors import ConfigError
from parallax.parity import Row, compare, run_parity


def test_usage_lists_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in cli.COMMANDS)
    assert cli.main(["parity", "--help"]) == 0
    assert "model.layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["party"], "there is no command party; did you mean parity?"),
        (["--verison"], "there is no command --verison; did you mean --version?"),
        (["xyz"], "there is no command xyz; there are check, checkpoint, parity, bench, verify-resume, schedule"),
        (["parity", "mesh=1x1x1"], "give two or more"),
        (["parity", "mesh=1x1x1", "mesh=1x1x1"], "not all different"),
        (["parity", "mesh=1x1x1", "mesh=1x2"], "mesh=1x2 has 2 sizes"),
        (["parity", "mesh=1x1x1", "mesh=2x1x1", "model.layer=2"], "did you mean model.layers"),
        (
            ["parity", "mesh=1x1x1", "mesh=2x1x1", "batch.microbatch_size=2", "batch.num_microbatches=2"],
            "global batches of 4, 8 samples; set batch.global_size",
        ),
        (["check", "mesh=2x3x1"], "model.heads=8 does not divide by tensor=3"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments: list[str], message: str):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "steps", "more"),
    [
        ("parity", parity_file.DEFAULT_STEPS, "default none: give two or more"),
        ("bench", bench_command.DEFAULT_STEPS, f"{bench_command.WARM_UP} steps to warm up"),
        ("verify-resume", verify_file.DEFAULT_STEPS, "no output=, resume= or checkpoint.*"),
        ("check", 200, "default 1x1x1"),
    ],
)
def test_help_has_the_command_s_own_defaults(capsys, name: str, steps: int, more: str):
    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.partition("optimizer steps\n")[2].splitlines())
    assert line.split() == ["integer,", "default", str(steps)] and more in text


def test_bench_s_help_explains_every_column(capsys):
    assert cli.main(["bench", "--help"]) == 0
    text = capsys.readouterr().out
    for column in ("step", "tokens/s", "GFLOP/s", "of products", "peak of a rank"):
        assert f"\n  {column:<14}  " in text


def test_the_version_is_that_of_pyproject(capsys):
    wanted = tomllib.loads((Path(cli.__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert parallax.__version__ == wanted
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"parallax {wanted}\n"
    program = "import sys, parallax; sys.exit('importlib.metadata' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", program], cwd=Path(cli.__file__).parents[1])
    assert done.returncode == 0, "read when it is asked for"


def test_check_shows_what_would_run_on_ranks_that_are_not_there(capsys):
    assert cli.main(["check", "mesh=8x4x3", "batch.global_size=48"]) == 0
    text = capsys.readouterr().out
    assert "data=8 tensor=4 pipeline=3 (96 ranks)" in text
    assert "global_size 48 = data 8 x microbatch_size 1 x num_microbatches 6" in text and "1f1b" in text
    assert "embedding" in text and ".. head" in text


def test_compare_finds_the_largest_difference():
    first = [Row(1, 2.0, 1.0), Row(2, 1.0, 1.0)]
    text, worst = compare(["1x1x1", "2x1x1"], [first, [Row(1, 2.0, 1.0), Row(2, 1.0, 1.25)]])
    assert worst == 0.25 and "2.5e-01" in text
    assert compare(["a", "b"], [first, first])[1] == 0.0
    assert compare(["a", "b"], [first, first[:1]])[1] == float("inf")
    assert compare(["a", "b"], [first, [Row(1, float("nan"), 1.0), first[1]]])[1] == float("inf")


def test_every_dtype_has_a_bound():
    assert set(parity_file.BOUNDS) == set(DTYPES)


@pytest.mark.parametrize(("difference", "code"), [(1e-12, 0), (1e-8, 1)])
def test_the_exit_code_follows_the_bound_of_the_dtype(monkeypatch, capsys, difference: float, code: int):
    def fake(shape, arguments):
        assert "steps=4" in arguments
        return [Row(1, 2.0, 1.0 + difference * (shape.size > 1))]

    monkeypatch.setattr(parity_file, "run_ranks", fake)
    assert run_parity(["mesh=1x1x1", "mesh=2x1x1", "dtype=float64"]) == code
    assert ("NOT" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    "command", [["parity", "mesh=1x1x1", "mesh=2x1x1"], ["bench", "mesh=1x1x1"], ["verify-resume", "mesh=1x1x1"]]
)
def test_a_file_may_ask_for_a_trace_later_than_a_few_steps(monkeypatch, tmp_path, capsys, command: list[str]):
    """Nothing of these commands is drawn, so the file of a long run is not refused for their few steps."""

    def started(shape, arguments, module):
        raise ConfigError(f"started {arguments}")

    monkeypatch.setattr(parity_file, "ask_ranks", started)
    monkeypatch.setattr(bench_command, "ask_ranks", started)
    (tmp_path / "long.yaml").write_text("steps: 1000\ntrace: 900\n")
    assert cli.main([*command, f"config={tmp_path}/long.yaml"]) == 2
    assert "error: started" in capsys.readouterr().err
    assert cli.main([*command, "trace=900"]) == 2
    assert "trace=900 is after the last step" in capsys.readouterr().err


def test_a_restart_that_shows_is_reported(capsys):
    from parallax.parity import Row
    from parallax.verify_resume import report

    rows = [Row(step, 1.0 / step, 2.0) for step in (1, 2, 3, 4)]
    assert report(rows, rows, 2, 0.0, "1x1x1")
    other = [*rows[:3], Row(4, rows[3].loss * (1 + 1e-12), 2.0)]
    assert not report(rows, other, 2, 0.0, "1x1x1") and report(rows, other, 2, 1e-10, "1x1x1")
    assert not report(rows, rows[:3], 2, 1.0, "1x1x1"), "a step is missing"
    assert "largest relative difference" in capsys.readouterr().out
