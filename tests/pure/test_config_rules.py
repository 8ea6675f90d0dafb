"""The rules between keys, and the sizes derived from them."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.config import (
    BatchConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    check,
    resolve_batch,
)
from parallax.config_io import load
from parallax.errors import ConfigError


def failure(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return str(caught.value)


@pytest.mark.parametrize(
    "argv, fragments",
    [
        ("mesh=1x3x1 model.ffn=384", ["model.heads=8", "tensor=3", "1, 2, 4, 8"]),
        ("model.hidden=100", ["model.hidden=100", "model.heads=8", "1, 2, 4, 5, 10, 20"]),
        ("model.hidden=24", ["head size", "= 3 is odd", "positions=learned"]),
        (
            "model.positions=learned model.max_positions=64",
            ["64 learned positions, corpus.sequence_length is 128", "at most 64"],
        ),
        ("model.max_positions=256", ["model.max_positions=256 is for model.positions=learned, not rotary"]),
        ("model.kv_heads=3", ["model.heads=8", "model.kv_heads=3", "1, 2, 4, 8"]),
        ("mesh=1x4x1 model.heads=12 model.hidden=96 model.kv_heads=6", ["model.kv_heads=6", "tensor=4", "multiple"]),
        ("mesh=1x8x1 model.ffn=100", ["model.ffn=100", "tensor=8", "1, 2, 4, 5, 10, 20"]),
        ("mesh=5x1x1", ["batch.global_size=24 (the default)", "data=5", "5, 10 or 15"]),
        (
            "batch.microbatch_size=5",
            ["data 1 x batch.microbatch_size 5 = 5", "multiple of 5", "1, 2, 3, 4, 6, 8, 12, 24"],
        ),
        ("mesh=2x1x1 batch.num_microbatches=24", ["batch.num_microbatches 24 = 48", "1, 2, 3, 4, 6, 12"]),
        (
            "mesh=2x1x1 batch.global_size=24 batch.microbatch_size=2 batch.num_microbatches=2",
            ["batch.global_size=24", "= 8", "set batch.global_size=8"],
        ),
        (
            "mesh=1x4x1 tensor.sequence_parallel=on batch.microbatch_size=1 corpus.sequence_length=6",
            ["microbatch of 1", "6 tokens", "tensor=4", "multiple of 4"],
        ),
        ("mesh=1x1x4 model.layers=1", ["model.layers=1", "3 units", "at least 2", "at most 3"]),
        ("mesh=1x1x2 pipeline.split=6", ["pipeline.split=6 has 1 entries", "2 stages"]),
        ("mesh=1x1x2 pipeline.split=3,5", ["sums to 8", "model.layers=6"]),
        ("mesh=1x1x3 pipeline.split=3,0,3", ["leaves stage 1 empty"]),
        ("pipeline.split=-6", ["pipeline.split=(-6,) is too small"]),
        ("pipeline.schedule=1F1", ["1F1 is unknown", "did you mean 1f1b?", "gpipe", "auto, or a table's FILE.csv"]),
        ("pipeline.schedule=AUTO", ["AUTO is unknown", "did you mean auto?"]),
        ("pipeline.memory_cap=2", ["pipeline.memory_cap is for pipeline.schedule=auto, not 1f1b"]),
        ("pipeline.schedule=auto pipeline.split=6", ["auto takes no pipeline.split"]),
        ("pipeline.schedule=auto pipeline.max_memory_bytes=9", ["auto takes no pipeline.max_memory_bytes"]),
        ("pipeline.split=6 pipeline.max_memory_bytes=9", ["has nothing to choose"]),
        ("data.zero=4", ["data.zero=4 is too large; choose less than 4"]),
        ("data.shard_size=2", ["data.zero is 0; set it to 1, 2 or 3"]),
        ("mesh=6x1x1 data.zero=1 data.shard_size=4", ["does not divide the 6 data ranks", "choose one of 1, 2, 3, 6"]),
        ("data.zero=2 data.gather=step", ["data.gather=step is for data.zero=3"]),
        ("data.zero=1 data.reduce=microbatch", ["data.reduce=microbatch is for data.zero=2 and 3"]),
        (
            "data.zero=1 data.compression=topk",
            ["data.zero=1 cuts them", "set data.zero=0, or data.compression=bfloat16"],
        ),
        ("data.compression=onebit precision.reduce_dtype=bfloat16", ["both say how gradients travel"]),
        ("data.compression=float16 precision.reduce_dtype=bfloat16", ["both say how gradients travel"]),
        ("data.compression_rank=8", ["data.compression_rank=8 is for data.compression=powersgd, not none"]),
        ("data.compression=onebit data.compression_ratio=0.1", ["is for data.compression=topk, not onebit"]),
        ("data.compression=topk data.compression_ratio=1.5", ["more than all elements; choose at most 1"]),
        ("data.compression=gzip", ["expected one of none, float16, bfloat16, powersgd, onebit, topk"]),
        ("data.zero=2 data.reduction=adasum", ["needs whole gradients", "set data.zero=0"]),
        ("mesh=6x1x1 data.reduction=adasum", ["6 data ranks; choose a power of two, such as 4"]),
        ("data.reduction=adasum data.compression=bfloat16", ["leave out data.compression"]),
        ("recompute=every-0", ["recompute=every-0 is unknown", "as in every-2"]),
        ("recompute=all", ["selective (the core of attention)"]),
        ("pipeline.schedule=missing.csv", ["pipeline.schedule=missing.csv cannot be read: No such file or directory"]),
        ("trace=7 steps=3", ["trace=7 is after the last step, steps=3", "at most 3", "at least 7"]),
        ("mesh=1x1x2 pipeline.stages_per_rank=2", ["1f1b has 1 stages a rank", "pipeline.schedule=interleaved"]),
        (
            "mesh=1x1x3 pipeline.schedule=interleaved pipeline.stages_per_rank=4",
            ["model.layers=6 is too few for the 12 stages", "at least 10", "at most 2"],
        ),
        ("mesh=1x1x2 pipeline.schedule=zb-v pipeline.split=3,3", ["has 2 entries for 4 stages"]),
        ("resume=auto", ["resume=auto", "set output=DIRECTORY"]),
        ("optimizer.min_lr=1", ["optimizer.min_lr=1.0", "optimizer.lr=0.001", "at most 0.001"]),
        ("optimizer.decay_steps=5", ["decay_steps=5", "warmup_steps=20", "at least 20"]),
        ("mesh=2x2", ["mesh=2x2 has 2 sizes"]),
        ("mesh=0x1x1", ["mesh=0x1x1", "size 0"]),
        ("mesh=cp2", ["context=2 is not supported yet", "leave context at 1"]),
        ("mesh=dp2xep2", ["expert=2 is not supported yet"]),
        ("model.dropout=1", ["model.dropout=1.0 is too large", "less than 1"]),
        ("model.dropout=-0.1", ["too small", "at least 0"]),
        ("optimizer.betas=0.9,1", ["optimizer.betas=(0.9, 1.0)", "less than 1"]),
        ("corpus.validation_fraction=0", ["more than 0"]),
        ("corpus.validation_fraction=1", ["less than 1"]),
        ("model.vocab=1", ["model.vocab=1", "at least 2"]),
        ("steps=0", ["steps=0", "at least 1"]),
        ("seed=-1", ["seed=-1", "at least 0"]),
        (f"model.layers={2**40}", ["too large", str(2**31)]),
        ("optimizer.lr=0", ["more than 0"]),
        ("output=", ["output is empty", "auto"]),
    ],
)
def test_rules_give_the_numbers_and_the_fix(argv, fragments):
    message = failure(*argv.split())
    assert "problems in the configuration" not in message, "one cause, one problem"
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    "argv",
    [
        "mesh=1x8x1 model.kv_heads=2",
        "mesh=1x2x1 model.kv_heads=4",
        "model.hidden=24 model.positions=learned",
        "mesh=1x1x8",
        "mesh=1x1x4 pipeline.split=0,3,3,0",
        "resume=auto output=here",
        "steps=3",
        "optimizer.min_lr=1e-3",
        "optimizer.decay_steps=20",
        "model.dropout=0.5 optimizer.betas=0,0 optimizer.max_grad_norm=0",
        "checkpoint.every=0 checkpoint.keep=0 validation.every=0",
        "batch.global_size=48 batch.microbatch_size=4 batch.num_microbatches=12",
        f"seed={2**62} data.bucket_bytes={2**33}",
    ],
)
def test_what_the_rules_allow(argv):
    load(argv.split())


def test_every_problem_is_reported_at_once_and_numbered(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("modle.layers: 1\nsteps: x\n")
    message = failure(f"config={file}", "mesh=1x3x1", "model.hidden=100", "foo", "pipeline.schedule=no")
    numbers = [int(number) for number in re.findall(r"^  (\d+)\. ", message, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert message.startswith(f"{len(numbers)} problems in the configuration:\n")
    for fragment in ("modle.layers", "steps=x", "foo", "tensor=3", "model.hidden=100", "schedule=no"):
        assert fragment in message


def test_an_unread_value_does_not_trigger_rules_on_its_stand_in():
    # heads keeps its default 8 as a stand-in, which 3 does not divide; only the cause may be reported.
    message = failure("mesh=1x3x1", "model.heads=many")
    assert message == "model.heads=many: expected an integer"


def test_check_reports_wrong_types_of_configs_built_in_python():
    wrong: Any = {"layers": "4", "bias": 1, "dropout": math.nan, "norm": "batch", "heads": True, "init_std": True}
    problems = check(Config(model=ModelConfig(**wrong), pipeline=PipelineConfig(split=[6])))  # type: ignore[arg-type]
    assert len(problems) == 7 and all("wrong type; expected" in problem for problem in problems)


# Derived values


def test_model_sizes_follow_from_the_activation_and_the_heads():
    model = ModelConfig()
    assert (model.num_kv_heads, model.ffn_size, model.head_size) == (8, 384, 16)
    assert ModelConfig(activation="gelu").ffn_size == 512
    assert ModelConfig(hidden=4096).ffn_size == 10944 and ModelConfig(hidden=192).ffn_size == 512
    assert ModelConfig(ffn=100, kv_heads=2).ffn_size == 100 and ModelConfig(kv_heads=2).num_kv_heads == 2


@pytest.mark.parametrize(
    "mesh, batch, expected",
    [
        ("1x1x1", {}, (24, 12, 2)),
        ("2x2x2", {}, (24, 3, 4)),
        ("3x2x1", {}, (24, 4, 2)),
        ("1x1x8", {}, (24, 1, 24)),
        ("1x1x2", {"global_size": 6}, (6, 1, 6)),
        ("1x1x4", {"global_size": 6}, (6, 1, 6)),
        ("2x1x1", {"microbatch_size": 3}, (24, 3, 4)),
        ("2x1x1", {"num_microbatches": 3}, (24, 4, 3)),
        ("2x1x1", {"microbatch_size": 5, "num_microbatches": 3}, (30, 5, 3)),
        ("2x1x1", {"global_size": 40, "num_microbatches": 5}, (40, 4, 5)),
        ("2x1x1", {"global_size": 40, "microbatch_size": 5}, (40, 5, 4)),
    ],
)
def test_the_batch_is_derived(mesh, batch, expected):
    found = resolve_batch(Config(mesh=mesh, batch=BatchConfig(**batch)))
    assert (found.global_size, found.microbatch_size, found.num_microbatches) == expected


def test_the_equation_is_printed_with_its_numbers():
    found = resolve_batch(Config(mesh="2x2x2"))
    assert found.equation == "global_size 24 = data 2 x microbatch_size 3 x num_microbatches 4"


sizes = st.none() | st.integers(0, 40)


@given(st.integers(1, 6), st.integers(1, 4), sizes, sizes, sizes)
@settings(max_examples=300, deadline=None)
def test_a_resolved_batch_satisfies_the_equation_and_what_was_given(data, pipeline, size, micro, num):
    batch = BatchConfig(global_size=size, microbatch_size=micro, num_microbatches=num)
    try:
        found = resolve_batch(Config(mesh=f"{data}x2x{pipeline}", batch=batch))
    except ConfigError:
        options = [24 if size is None and None in (micro, num) else size, micro, num]
        solutions = [
            (m, n)
            for m in range(1, 41)
            for n in range(1, 41)
            if options[0] in (None, data * m * n) and micro in (None, m) and num in (None, n)
        ]
        assert not solutions or 0 in (size, micro, num)
        return
    assert found.global_size == data * found.microbatch_size * found.num_microbatches
    assert size in (None, found.global_size)
    assert micro in (None, found.microbatch_size) and num in (None, found.num_microbatches)


def test_learning_rate_warms_up_and_decays():
    cosine = OptimizerConfig(lr=1.0, warmup_steps=4)
    assert [cosine.lr_at(step, 12) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert cosine.lr_at(8, 12) == pytest.approx(0.55)
    assert cosine.lr_at(12, 12) == cosine.lr_at(99, 12) == 0.1
    linear = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="linear", min_lr=0.0, decay_steps=10)
    assert [linear.lr_at(step, 999) for step in (0, 5, 10, 20)] == [1.0, 0.5, 0.0, 0.0]
    constant = OptimizerConfig(lr=1.0, warmup_steps=2, schedule="constant")
    assert [constant.lr_at(step, 3) for step in (0, 1, 2, 50)] == [0.5, 1.0, 1.0, 1.0]
    assert OptimizerConfig(lr=1.0, warmup_steps=20).lr_at(19, 5) == 1.0
    assert OptimizerConfig(lr=1.0, warmup_steps=20).lr_at(20, 5) == 0.1
    assert OptimizerConfig(lr=1.0, warmup_steps=5).lr_at(5, 5) == 0.1


def test_the_last_step_can_be_traced_and_a_resumed_run_may_ask_for_any():
    assert load(["trace=3", "steps=3"]).trace == 3
    assert load(["trace=1", "steps=3", "output=x", "resume=auto"]).trace == 1, "the run may begin anew"


def test_float8_wants_sixteens():
    load(["dtype=float8", "batch.microbatch_size=1"])
    with pytest.raises(ConfigError, match="model.hidden = 120 and the width of the heads of a rank = 120 not"):
        load(["dtype=float8", "model.hidden=120", "model.ffn=256"])
    with pytest.raises(ConfigError, match="model.ffn / tensor = 8 not"):
        load(["dtype=float8", "model.ffn=16", "mesh=1x2x1"])


def test_on_nan_rollback_needs_checkpoints():
    with pytest.raises(ConfigError, match="checkpoint.every=0 makes none"):
        load(["on_nan=rollback", "checkpoint.every=0"])
    with pytest.raises(ConfigError, match="not for dtype=float16"):
        load(["on_nan=rollback", "dtype=float16"])


def test_the_decay_of_wsd_has_a_start():
    config = load(["optimizer.schedule=wsd", "optimizer.warmup_steps=10", "steps=100", "optimizer.decay_start=60"])
    rates = [config.optimizer.lr_at(step, 100) for step in (9, 10, 60, 80, 100)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3 * 0.55, 1e-4])
    assert load(["optimizer.schedule=wsd"]).optimizer.lr_at(160, 200) == 1e-3
    with pytest.raises(ConfigError, match="is for optimizer.schedule=wsd, not cosine"):
        load(["optimizer.decay_start=60"])
    with pytest.raises(ConfigError, match="after the decay's end at step 100"):
        load(["optimizer.schedule=wsd", "optimizer.decay_start=160", "steps=100"])


def test_a_head_may_be_of_any_even_size():
    assert load(["model.hidden=50", "model.heads=4", "model.head_dim=16"]).model.head_size == 16
    with pytest.raises(ConfigError, match="model.head_dim=15 is odd; set it to 16, or model.positions=learned"):
        load(["model.head_dim=15"])
    with pytest.raises(ConfigError, match="model.heads to one of 1, 2, 5, 10, 25, 50, or model.head_dim"):
        load(["model.hidden=50"])
