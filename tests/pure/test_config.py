"""The configuration: reading and printing. See also test_config_rules.py and test_config_names.py."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.config import (
    BatchConfig,
    Config,
    keys,
    schedule_names,
    sections,
    value_fits,
)
from parallax.config_io import help_text, load, parse_command_line, to_dict, to_yaml, with_overrides
from parallax.errors import ConfigError


def yaml_file(folder: Path, text: str | bytes, name: str = "c.yaml") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return f"config={path}"


def failure(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return str(caught.value)


# Defaults and precedence


def test_defaults_are_runnable_on_the_meshes_of_the_suite():
    assert load([]) == Config()
    for mesh in ("1x1x1", "2x2x2", "3x2x1", "1x2x4", "2x1x3", "data2xtensor4"):
        assert load([f"mesh={mesh}"]).mesh == mesh


def test_precedence_is_defaults_then_file_then_command_line_in_any_order(tmp_path):
    file = yaml_file(tmp_path, "model: {layers: 4, hidden: 64}\nsteps: 7\n")
    for argv in ([file, "model.layers=2"], ["model.layers=2", file]):
        config = load(argv)
        assert (config.model.layers, config.model.hidden, config.steps, config.seed) == (2, 64, 7, 1234)


def test_none_on_the_command_line_unsets_what_the_file_gave(tmp_path):
    file = yaml_file(tmp_path, "batch: {global_size: 8, microbatch_size: 2}")
    assert load([file, "batch.global_size=none"]).batch == BatchConfig(microbatch_size=2)


def test_configs_are_frozen_slotted_and_keyword_only():
    for cls in (Config, *(type(getattr(Config(), name)) for name in sections())):
        params = cls.__dataclass_params__  # type: ignore[attr-defined]
        assert params.frozen and hasattr(cls, "__slots__")
        assert all(f.kw_only for f in dataclasses.fields(cls))


def test_every_key_has_help_and_a_default_of_its_type():
    assert len(keys()) > 40
    for name, known in keys().items():
        assert known.help and value_fits(known.default, known.kind), name


# Values are read by the declared type


@pytest.mark.parametrize(
    "text, name, expected",
    [
        ("optimizer.lr: 1e-4", "optimizer.lr", 1e-4),
        ("optimizer: {lr: 3}", "optimizer.lr", 3.0),
        ("mesh: 2x2x2", "mesh", "2x2x2"),
        ("output: no", "output", "no"),
        ("output: 010", "output", "010"),
        ("output: 1:30", "output", "1:30"),
        ("output: 2024-01-01", "output", "2024-01-01"),
        ("resume: none\noutput: x", "resume", "none"),
        ("model.bias: off", "model.bias", False),
        ("model.bias: 'Yes'", "model.bias", True),
        ("model.bias: 1", "model.bias", True),
        ("seed: 010", "seed", 10),
        ("seed: 1_000", "seed", 1000),
        ("model.ffn: null", "model.ffn", None),
        ("model.ffn: none", "model.ffn", None),
        ("model.ffn:", "model.ffn", None),
        ("optimizer.betas: [0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("optimizer.betas: 0.8,9e-1", "optimizer.betas", (0.8, 0.9)),
        ("mesh: 1x1x2\npipeline.split: [3,\n  3]", "pipeline.split", (3, 3)),
        ("mesh: 1x1x2\npipeline:\n  split:\n  - 2\n  - 4", "pipeline.split", (2, 4)),
        ("model:\nsteps: 3", "steps", 3),
        ("# nothing but comments", "steps", 200),
        ("\ufeffsteps: 5", "steps", 5),
    ],
)
def test_yaml_values(tmp_path, text, name, expected):
    value: Any = load([yaml_file(tmp_path, text)])
    for part in name.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("model.ffn=NONE", None),
        ("model.bias=TRUE", True),
        ("model.bias=0", False),
        ("pipeline.split=[6]", (6,)),
        ("pipeline.split=6", (6,)),
        ("pipeline.split=(6,)", (6,)),
        ("optimizer.betas=0.5,0", (0.5, 0.0)),
        ("output=a=b", "a=b"),
        ("steps= 12 ", 12),
    ],
)
def test_command_line_values(argument, expected):
    value: Any = load([argument])
    for part in argument.partition("=")[0].split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "argument",
    "steps=1.5 steps=1e3 steps=true steps=none steps= steps=0x10 steps=١٢ model.bias=2 model.bias=none "
    "optimizer.lr=nan optimizer.lr=inf optimizer.lr=-inf optimizer.lr=1e999 optimizer.lr=true optimizer.lr=null "
    "model.ffn=big optimizer.betas=0.9 optimizer.betas=0.9,0.9,0.9 optimizer.betas=none optimizer.betas=0.9,nan "
    "pipeline.split=[3,x] pipeline.split=[3,5 pipeline.split= pipeline.split=3,,5 pipeline.split=1.5 device=gpu "
    f"dtype=fp32 mesh= output= seed={'9' * 5000}".split(),
)
def test_values_of_the_wrong_type_are_refused_by_name(argument):
    message = failure(argument)
    assert argument.partition("=")[0] in message and "problems" not in message


@pytest.mark.parametrize("text", ["output: null", "resume: ~", "steps: [1]", "steps: {a: 1}", "model.bias: [true]"])
def test_yaml_values_of_the_wrong_shape_are_refused_with_file_and_line(tmp_path, text):
    assert "c.yaml, line 2: " in failure(yaml_file(tmp_path, f"\n{text}"))


# Files that cannot be read


@pytest.mark.parametrize(
    "content, fragment",
    [
        ("- 1\n- 2", "is not a mapping"),
        ("just text", "is not a mapping"),
        ("steps: [", "is not valid YAML"),
        ("steps: 1\n---\nsteps: 2", "is not valid YAML"),
        ("steps: *nowhere", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        ("? [a, b]\n: 1", "line 1: a key is not plain text"),
        ("model: 4", "line 1: model is a section; set its keys, such as model.layers"),
        ("model: &m {model: *m}", "unknown key model.model"),
    ],
)
def test_bad_files_are_named(tmp_path, content, fragment):
    message = failure(yaml_file(tmp_path, content))
    assert fragment in message and "c.yaml" in message


def test_missing_file_and_directory_and_two_files_are_refused(tmp_path):
    assert "absent.yaml cannot be read: No such file" in failure(f"config={tmp_path}/absent.yaml")
    assert f"config={tmp_path} cannot be read: Is a directory" in failure(f"config={tmp_path}")
    file = yaml_file(tmp_path, "steps: 2")
    assert "config is given 2 times" in failure(file, file)


def test_yaml_tags_run_nothing(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ConfigError):
        load([yaml_file(tmp_path, f"steps: !!python/object/apply:os.mkdir [{target}]")])
    assert not target.exists()


@pytest.mark.parametrize(
    "text, name, lines",
    [
        ("steps: 1\nseed: 2\nsteps: 3", "steps", ("line 1", "line 3")),
        ("model:\n  layers: 4\n  layers: 4", "model.layers", ("line 2", "line 3")),
        ("model: {layers: 4}\nmodel.layers: 4", "model.layers", ("line 1", "line 2")),
        ("model: {layers: 4}\nmodel: {hidden: 64}", "model", ("line 1", "line 2")),
        ("{steps: 1, steps: 2}", "steps", ("line 1", "line 1")),
        ("nonsense: 1\nnonsense: 2", "nonsense", ("line 1", "line 2")),
    ],
)
def test_duplicate_keys_name_key_file_and_both_lines(tmp_path, text, name, lines):
    message = failure(yaml_file(tmp_path, text))
    assert f"{name} is given twice in {tmp_path}/c.yaml: {lines[0]} and {lines[1]}" in message


def test_a_key_twice_on_the_command_line_is_refused():
    assert "steps is given twice in the command line: steps=1 and steps=2" in failure("steps=1", "steps=2")


# Printing, and reading back


def values_of(name: str) -> st.SearchStrategy[Any]:
    """Any value that a key allows on its own."""
    known = keys()[name]
    kind = next((arg for arg in get_args(known.kind) if type(None) in get_args(known.kind)), known.kind)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(int(known.least or 0), int(known.below or 2**31) - 1)
    if kind is float:
        low = known.least if known.least is not None else known.above
        return st.floats(
            low, known.below, allow_nan=False, allow_infinity=False, exclude_min=known.least is None,
            exclude_max=known.below is not None,
        )  # fmt: skip
    if kind is str:
        return st.text(min_size=1) | st.sampled_from(
            ["null", "~", "no", "1e5", "a: b", "#x", "none ", "'q'", "0x1", "- a"]
        )
    return st.sampled_from(get_args(kind))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Runnable configs: every key free, but for those that a rule ties to others."""
    tied = {
        "mesh",
        "pipeline.schedule",
        "pipeline.stages_per_rank",
        "pipeline.memory_cap",
        "pipeline.split",
        "data.zero",
        "data.gather",
        "data.reduce",
        "data.compression",
        "data.compression_rank",
        "data.compression_ratio",
        "data.reduction",
        "recompute",
        "init_from",
        "resume",
        "on_nan",
        "dtype",
        "model.hidden",
        "model.heads",
        "optimizer.betas",
    }
    values = {name: draw(values_of(name)) for name in keys() if name not in tied and keys()[name].default is not None}
    tensor, stages = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = tensor * draw(st.integers(1, 4))
    values |= {
        "mesh": f"{draw(st.integers(1, 3))}x{tensor}x{stages}",
        "model.layers": draw(st.integers(stages, 9)),
        "model.heads": heads,
        "model.hidden": heads * 2 * draw(st.integers(1, 40)),
        "model.kv_heads": draw(st.sampled_from([None, 1, heads])),
        "model.head_dim": draw(st.sampled_from([None, 2, 10])),
        "model.ffn": tensor * draw(st.integers(1, 999)),
        "corpus.sequence_length": tensor * draw(st.integers(1, 999)),
        "batch.microbatch_size": draw(st.integers(1, 9)),
        "batch.num_microbatches": draw(st.integers(1, 9)),
        "pipeline.schedule": draw(st.sampled_from(["gpipe", "1f1b", "zb-h1", "zb-h2"])),
        "dtype": draw(st.sampled_from(["float32", "float64", "bfloat16", "float16"])),
        "recompute": draw(st.sampled_from(["none", "selective", "full", "every-1", "every-12"])),
        "data.zero": 3,
        "data.gather": draw(st.sampled_from(["block", "step"])),
        "data.reduce": draw(st.sampled_from(["step", "microbatch"])),
        "resume": draw(st.text(min_size=1).filter(lambda text: text != "auto")),
        "optimizer.betas": (draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))),
        "optimizer.no_decay": draw(st.sampled_from([None, ("*embedding*",), ("head.*", "layers.0.*")])),
        "optimizer.min_lr": draw(st.none() | st.just(0.0) | st.just(values["optimizer.lr"])),
        "optimizer.decay_steps": draw(st.none() | st.just(max(1, values["optimizer.warmup_steps"]))),
    }
    if draw(st.booleans()):
        values["pipeline.split"] = (*[1] * (stages - 1), values["model.layers"] - stages + 1)
    return with_overrides(Config(), values)


@given(configs())
@settings(max_examples=100, deadline=None)
def test_yaml_reads_back_equal(tmp_path_factory, config):
    file = yaml_file(tmp_path_factory.getbasetemp(), to_yaml(config), "round_trip.yaml")
    assert load([file]) == config


@given(configs())
@settings(max_examples=100, deadline=None)
def test_arguments_read_back_equal(config):
    argv = []
    for name in keys():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        argv.append(f"{name}=[{', '.join(map(str, value))}]" if isinstance(value, tuple) else f"{name}={value}")
    assert load(argv) == config


@given(configs())
@settings(max_examples=50, deadline=None)
def test_json_keeps_every_key(config):
    nested = json.loads(json.dumps(to_dict(config)))
    flat = {
        f"{outer}.{inner}": value
        for outer in sections()
        for inner, value in nested[outer].items()
    } | {name: value for name, value in nested.items() if name not in sections()}  # fmt: skip
    assert set(flat) == set(keys()) and with_overrides(Config(), flat) == config


def test_yaml_shows_the_resolved_batch_and_mesh():
    text = to_yaml(Config(mesh="2x2x2"))
    assert "# batch global_size 24 = data 2 x microbatch_size 3 x num_microbatches 4\n" in text
    assert "# mesh data=2 tensor=2 pipeline=2 (8 ranks)\n" in text


def test_overrides_take_values_and_text_and_refuse_the_rest():
    config = with_overrides(Config(), {"model.layers": 4, "optimizer.lr": "1e-4", "pipeline.split": [1, 3], "steps": 9})
    assert (config.model.layers, config.optimizer.lr, config.pipeline.split, config.steps) == (4, 1e-4, (1, 3), 9)
    assert Config().model.layers == 6
    for overrides in ({"model.layers": 4.0}, {"model.layers": True}, {"layers": 4}, {"model": {}}, {"mesh": None}):
        with pytest.raises(ConfigError, match=next(iter(overrides))):
            with_overrides(Config(), overrides)


# The command line as a program sees it


def test_help_lists_every_key_with_type_default_and_meaning():
    text = help_text()
    for name, known in keys().items():
        assert re.search(rf"^  {re.escape(name)} +{re.escape(known.help)}$", text, re.MULTILINE), name
    assert "float32|float64|bfloat16|float16|float8, default float32" in text
    assert "integer|none, default none" in text and "number,number, default 0.9,0.95" in text
    assert "|".join(schedule_names()) in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("argv", [["--help"], ["-h", "steps=x"]])
def test_help_prints_and_exits_with_zero(argv, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        parse_command_line(argv)
    assert caught.value.code == 0 and capsys.readouterr().out == help_text()


def test_print_config_prints_what_load_reads_and_exits_with_zero(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as caught:
        parse_command_line(["--print-config", "model.layers=3", "optimizer.lr=1e-4"])
    assert caught.value.code == 0
    assert load([yaml_file(tmp_path, capsys.readouterr().out)]) == load(["model.layers=3", "optimizer.lr=1e-4"])


@pytest.mark.parametrize("rank, speaks", [(None, "error: "), ("0", "error: "), ("1", "[rank 1 of 1] error: ")])
def test_errors_come_from_one_rank_and_every_rank_exits_with_two(rank, speaks, capsys, monkeypatch):
    """Another speaks where rank 0 has not ended it in time: then the error is its own."""
    waited = []
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append((seconds, capsys.readouterr().err)))
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    for argv in (["steps=0"], ["--print-config", "steps=0"]):
        with pytest.raises(SystemExit) as caught:
            parse_command_line(argv)
        streams = capsys.readouterr()
        assert caught.value.code == 2 and streams.out == ""
        assert streams.err.startswith(f"{speaks}steps=0 is too small")
    assert waited == ([(15.0, "")] * 2 if rank == "1" else [])


def test_a_good_command_line_is_the_config(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpt.py", "steps=3"])
    assert parse_command_line() == load(["steps=3"]) == parse_command_line(["steps=3"])
    assert capsys.readouterr() == ("", "")


def test_reading_a_config_imports_no_torch():
    code = "import sys; from parallax.config_io import load; load(['mesh=2x2x2']); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_precision_is_short_for_dtype():
    assert load(["precision=bfloat16", "precision.loss_scale=8"]).dtype == "bfloat16"
    with pytest.raises(ConfigError, match="expected one of float32, float64, bfloat16, float16, float8"):
        load(["precision=fp8"])
    with pytest.raises(ConfigError, match="given twice"):
        load(["precision=bfloat16", "dtype=float32"])
