"""What an unknown key was meant to be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parallax.config import (
    keys,
)
from parallax.config_io import load
from parallax.config_names import NAMES_ELSEWHERE
from parallax.errors import ConfigError


def yaml_file(folder: Path, text: str | bytes, name: str = "c.yaml") -> str:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return f"config={path}"


def failure(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return str(caught.value)


@pytest.mark.parametrize(
    "argument, suggestion",
    [
        ("--num-layers=4", "model.layers=4"),
        ("--model.layers=4", "model.layers=4"),
        ("layers=4", "model.layers=4"),
        ("model.layer=4", "model.layers=4"),
        ("modle.layers=4", "model.layers=4"),
        ("optimzer.lr=1", "optimizer.lr=1"),
        ("lerning_rate=1", "optimizer.lr=1"),
        ("lr=1", "optimizer.lr=1"),
        ("every=3", "checkpoint.every=3 or validation.every=3"),
        ("tensor-model-parallel-size=4", "mesh=tensor4"),
        ("--pipeline-model-parallel-size=4", "mesh=pipeline4"),
        ("parallelism.dp=2", "mesh=data2"),
        ("micro-batch-size=4", "batch.microbatch_size=4"),
        ("global-batch-size=4", "batch.global_size=4"),
        ("hidden-size=4", "model.hidden=4"),
        ("num-attention-heads=4", "model.heads=4"),
        ("seq-length=4", "corpus.sequence_length=4"),
        ("num-query-groups=4", "model.kv_heads=4"),
        ("ffn-hidden-size=4", "model.ffn=4"),
        ("weight-decay=0", "optimizer.weight_decay=0"),
        ("clip-grad=1", "optimizer.max_grad_norm=1"),
        ("train-iters=9", "steps=9"),
        ("sequence-parallel=true", "tensor.sequence_parallel=true"),
        ("tokens.batch_accumulation_per_replica=2", "batch.num_microbatches=2"),
        ("training.seq_len=2", "corpus.sequence_length=2"),
        ("n_layer=2", "model.layers=2"),
        ("n_head=2", "model.heads=2"),
        ("n_embd=2", "model.hidden=2"),
        ("block_size=2", "corpus.sequence_length=2"),
        ("max_iters=2", "steps=2"),
        ("learning_rate=2", "optimizer.lr=2"),
        ("grad_clip=2", "optimizer.max_grad_norm=2"),
        ("train_batch_size=2", "batch.global_size=2"),
        ("train_micro_batch_size_per_gpu=2", "batch.microbatch_size=2"),
        ("gradient_accumulation_steps=2", "batch.num_microbatches=2"),
        ("gradient_clipping=2", "optimizer.max_grad_norm=2"),
        ("num_key_value_heads=2", "model.kv_heads=2"),
        ("zero_optimization.stage=2", "data.zero=2"),
        ("zero_stage=3", "data.zero=3"),
        ("--use-distributed-optimizer=true", "data.zero=1"),
        ("--use-distributed-optimizer=false", "data.zero"),
        ("fp16.enabled=true", "dtype=float16"),
        ("bf16.enabled=true", "dtype=bfloat16"),
        ("bf16.enabled=False", "dtype"),
        ("bf16=true", "dtype=bfloat16"),
        ("--fp16=true", "dtype=float16"),
        ("torch_dtype=bfloat16", "dtype=bfloat16"),
        ("mixed_precision=bf16", "dtype=bfloat16"),
        ("mixed_precision=no", "dtype"),
        ("activation_checkpoint.mode=selective", "recompute=selective"),
        ("recompute_granularity=full", "recompute=full"),
        ("--recompute-activations=true", "recompute=selective"),
        ("gradient_checkpointing=true", "recompute=full"),
        ("optimizer.type=AdamW", "optimizer.name"),
    ],
)
def test_unknown_keys_suggest_ours(argument, suggestion):
    message = failure(argument)
    assert f"unknown key {argument.partition('=')[0]}; did you mean {suggestion}?" in message


def test_a_suggestion_leaves_out_a_value_that_means_something_else():
    # bucket_cap_mb counts MB and untie_... is the opposite: with the value the suggestion would be wrong.
    assert "did you mean data.bucket_bytes?" in failure("bucket_cap_mb=25")
    assert "did you mean model.tie_embeddings?" in failure("--untie-embeddings-and-output-weights=true")


@pytest.mark.parametrize(
    "argument, message",
    [
        (
            "dtype=bf16",
            "dtype=bf16: expected one of float32, float64, bfloat16, float16, float8; did you mean dtype=bfl",
        ),
        ("precision=bf16", "precision=bf16: expected one of float32, "),
        ("precision=torch.half", "did you mean precision=float16?"),
        ("dtype=floot32", "did you mean dtype=float32?"),
        ("optimizer.name=Adam", "did you mean optimizer.name=adamw?"),
        ("optimizer.schedule=cosin", "did you mean optimizer.schedule=cosine?"),
    ],
)
def test_a_value_that_is_none_suggests_one(argument: str, message: str):
    assert message in failure(argument)


def test_a_file_is_told_the_key_and_a_switch_its_value(tmp_path):
    text = "zero_optimization:\n  stage: 2\nbf16:\n  enabled: true\nfp16:\n  enabled: false\n"
    message = failure(yaml_file(tmp_path, text))
    assert "line 2: unknown key zero_optimization.stage; did you mean data.zero?" in message
    assert "line 4: unknown key bf16.enabled; did you mean dtype=bfloat16?" in message
    assert "line 6: unknown key fp16.enabled; did you mean dtype?" in message


def test_far_away_keys_get_no_suggestion_and_files_get_the_line(tmp_path):
    assert failure("zzzz=1") == "unknown key zzzz; --help lists all keys"
    message = failure(yaml_file(tmp_path, "\noptim:\n  lr: 1"))
    assert "c.yaml, line 3: unknown key optim.lr; did you mean optimizer.lr?" in message


def test_every_name_elsewhere_points_at_a_key_and_shadows_none():
    bare = {name.rpartition(".")[2] for name in keys()}
    for target, names in NAMES_ELSEWHERE.items():
        key, fixed, value = target.partition("=")
        assert key in keys()
        if key == "mesh":
            assert re.fullmatch("data|tensor|pipeline|context|expert", value)
        elif fixed:
            load([target])
        shadowed = {alias.removesuffix("*") for alias in names.split()} & (bare | set(keys()))
        assert not shadowed


@pytest.mark.parametrize(
    "argument, fragment",
    [
        ("steps", "did you mean steps? write key=value"),
        ("--num-layers", "did you mean model.layers? write key=value"),
        ("--use-distributed-optimizer", "did you mean data.zero=1? write key=value"),
        ("--bf16", "did you mean dtype=bfloat16? write key=value"),
        ("4", "'4' is not of the form key=value; write key=value, as in model.layers=4"),
        ("=4", "write key=value"),
        ("run.yaml", "did you mean config=run.yaml?"),
        ("--help", "write key=value"),
    ],
)
def test_arguments_without_a_value_show_the_form(argument, fragment):
    assert fragment in failure(argument)
