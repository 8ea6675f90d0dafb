"""What goes wrong in a long run, and what it is told: copies that drift apart, numbers that are not finite."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax import assemble
from parallax.errors import CheckpointError, ReplicaError
from parallax.memory import format_bytes
from parallax.replicas import check_replicas
from parallax.resume import Checkpoints
from parallax.step import train_step
from tests.cases import GPT2, LLAMA, SEQUENCE_PARALLEL, TIED, VARIANTS, advance, gather_parameters, make_batch, start

FLOAT32 = {"dtype": "float32"}
KV = LLAMA | {"model.kv_heads": 2}
ROWLESS = GPT2 | {"model.vocab": 16, "model.vocab_multiple": 16}
"""The second of two ranks along tensor has no row of the vocabulary, so that its shards end elsewhere."""
# (mesh, changes, the rank whose copy changes, canonical name, local name, along which axis, ranks named)
FLIPS: dict[str, tuple[str, dict[str, Any], int, str, str, str, str]] = {
    "data": ("3x1x1", GPT2, 2, "layers.4.mlp.up.weight", "layers.4.mlp.up.weight", "data", "rank 2"),
    "zero 2": ("3x1x1", LLAMA | {"data.zero": 2}, 1, "head.weight", "head.weight", "data", "rank 1"),
    "shards of two": (
        "4x1x1",
        LLAMA | {"data.zero": 3, "data.shard_size": 2},
        3,
        "layers.4.attention.q.weight",
        "layers.4.attention.qkv.weight",
        "data",
        "rank 3",
    ),
    "norm": ("1x3x1", LLAMA, 2, "final_norm.weight", "final_norm.weight", "tensor", "rank 2"),
    "key heads": ("1x8x1", KV, 5, "layers.2.attention.k.weight", "layers.2.attention.qkv.weight", "tensor", "rank 5"),
    "shards that end elsewhere": (
        "2x2x1",
        ROWLESS | {"data.zero": 3},
        1,
        "embedding.position.weight",
        "embedding.position.weight",
        "tensor",
        "rank 1",
    ),
    "tied": ("1x1x2", GPT2 | TIED, 1, "embedding.token.weight", "head.weight", "pipeline", "rank 1"),
}


def flip(mesh: str, changes: dict[str, Any], rank: int, name: str, local: str) -> str:
    run, state = start(mesh, **changes | FLOAT32)
    advance(run, state, 1)
    check_replicas(run)  # nothing is wrong yet
    if run.mesh.rank == rank:
        flat = next(flat for flat in run.flats.values() if local in flat.by_name)
        if flat.level == 3:
            piece = next(p for p in flat.pieces if p.spec.name == name)
            values = flat.values_of(flat.segments[piece.segment])[piece.start : piece.stop]
        else:
            spec = next(s for s in flat.by_name[local].specs if s.name == name)
            values = spec.view(flat.by_name[local].parameter.data).reshape(-1)
        bits = values.view(torch.int32)
        bits[len(bits) // 2] ^= 1  # the lowest bit of one number
    try:
        check_replicas(run)
    except ReplicaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("what", FLIPS)
def test_one_flipped_bit_is_found(ranks, what: str):
    mesh, changes, rank, name, local, axis, named = FLIPS[what]
    data, tensor, pipeline = map(int, mesh.split("x"))
    for text in ranks(data * tensor * pipeline, flip, mesh, changes, rank, name, local):
        assert text.startswith(f"{name} is not the same on all ranks along {axis}") and f": {named} differs" in text


def foretold(local: int, short: int) -> tuple[str, int]:
    """What is said, and predicted for the machine that needs most of those with so many ranks; `short` are missing."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    run, _ = start("2x1x2", **GPT2)
    first, last = (memory.total for memory in run.plan.memory)
    need = 2 * max(first, last) if local == 2 else 2 * (first + last)
    assemble.memory_bytes = lambda device: need - short  # type: ignore[attr-defined]
    return run.describe(), need


@pytest.mark.parametrize("local", [2, 4, 8])
def test_the_ranks_of_a_machine_share_its_memory(ranks, local: int):
    """Two machines of two ranks hold a stage each, one of four holds both; rank 0 speaks for all."""
    for text, need in ranks(4, foretold, local, 1):
        assert f"WARNING: {format_bytes(need)} are predicted for the ranks of a machine" in text
    assert all("WARNING" not in text for text, _ in ranks(4, foretold, local, 0))


def checked_each(mesh: str, changes: dict[str, Any]) -> list[Any]:
    rows = []
    for zero in (0, 1, 2, 3):
        run, state = start(mesh, **changes | FLOAT32 | {"data.zero": zero, "check_replicas_every": 1})
        rows.append(advance(run, state, 3))
    return rows


def test_no_copy_drifts_apart(ranks):
    """After every step, with tied weights, sequence parallelism, and three data ranks, whose sums have an order."""
    cases = ("2x2x2", VARIANTS["llama-tied-sp"]), ("3x1x2", GPT2 | TIED), ("2x2x1", ROWLESS)
    for mesh, changes in cases:
        size = math.prod(map(int, mesh.split("x")))
        assert all(len(rows) == 4 for rows in ranks(size, checked_each, mesh, changes))


def broken(how: str, on_nan: str = "skip") -> list[str]:
    """Three steps on 2x1x2 with a number that is not finite in the second one."""
    run, state = start("2x1x2", **GPT2 | FLOAT32 | {"on_nan": on_nan, "batch.num_microbatches": 3})
    once = []

    def poison(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        samples, step = args[1].samples_B, args[1].step
        if step != 1 or 10 not in samples.tolist():
            return output
        if how == "forward":
            return output * float("nan")
        if how == "once" and not once:
            once.append(1)
            return output * float("nan")
        if how == "backward":
            output.register_hook(lambda grad: grad * float("inf"))
        return output

    for stage in run.stages.values():
        for name, module in stage.named_modules():
            if name == "layers.4":
                module.register_forward_hook(poison)
    texts = []
    for _ in range(3):
        try:
            result = train_step(run, state, make_batch(run.config, run.mesh, state.step))
            texts.append(result.skipped)
        except FloatingPointError as error:
            return [*texts, f"stopped: {error}"]
    return texts


def test_a_nan_names_where_it_begins(ranks):
    # Sample 10 is the third of data rank 0's third microbatch; layers.4 is on the second stage: rank 2 of 2x1x2.
    forward, once, backward = ({text[1] for text in ranks(4, broken, how)} for how in ("forward", "once", "backward"))
    (text,) = forward
    assert "it begins in the output of layers.4 (microbatch 2, stage 1, rank 2)" in text
    (text,) = backward
    assert "it begins in the backward, in the gradient of the output of layers.4" in text
    assert "(microbatch 2, stage 1, rank 2)" in text
    (text,) = once
    assert "run again, the step has finite numbers only: the hardware is to be doubted" in text
    for texts in ranks(4, broken, "forward", "stop"):
        assert texts[0] == "" and texts[1].startswith("stopped: step 2: ") and "layers.4 (microbatch 2" in texts[1]


def rolled_back(output: str) -> dict[str, Any]:
    """Steps 1 and 2, a checkpoint, two steps more of which the second is bad, back, and on."""
    run, state = start("2x1x2", **LLAMA | FLOAT32 | {"on_nan": "rollback", "output": output})
    checkpoints = Checkpoints(run, Path(output))
    advance(run, state, 2)
    checkpoints.save(state)
    saved = gather_parameters(run, state)
    advance(run, state, 2)
    state.batches = 4
    said = checkpoints.roll_back(state)
    now = gather_parameters(run, state)
    same = all(a[1].equal(b[1]) for name in saved for a, b in zip(saved[name], now[name], strict=True))
    found = {"said": said, "same": same, "counts": (state.step, state.batches)}
    advance(run, state, 1)
    checkpoints.save(state)
    again, other = start("2x1x2", **LLAMA | FLOAT32 | {"output": output, "resume": "auto"})
    Checkpoints(again, Path(output)).resume(other)
    found["resumed"] = (other.step, other.batches)
    for _ in range(3):
        checkpoints.roll_back(state)
    try:
        checkpoints.roll_back(state)
    except CheckpointError as error:
        found["end"] = str(error)
    return found


def test_a_run_goes_back_and_on_with_other_samples(ranks, tmp_path: Path):
    for found in ranks(4, rolled_back, str(tmp_path)):
        assert found["same"] and found["counts"] == (2, 4) and found["resumed"] == (3, 5)
        assert found["said"].startswith("step 4 went wrong: back at step 2, ")
        assert "has gone back to" in found["end"] and "3 times already" in found["end"]


def test_going_back_needs_a_checkpoint(tmp_path: Path):
    run, state = start("1x1x1", **LLAMA | {"on_nan": "rollback", "output": str(tmp_path)})
    with pytest.raises(CheckpointError, match="before there was a checkpoint"):
        Checkpoints(run, tmp_path).roll_back(state)


def test_sequence_parallel_norms_are_copies(ranks):
    assert ranks(2, flip, "1x2x1", LLAMA | SEQUENCE_PARALLEL, 1, "final_norm.weight", "final_norm.weight")[0]


def weight_gradient_alone() -> str:
    """Every output and its gradient is finite; the product that makes one weight's gradient is not."""
    run, state = start("1x1x1", **LLAMA | FLOAT32 | {"on_nan": "skip"})
    (sink,) = {id(m.sink): m.sink for m in run.stages[0].modules() if getattr(m, "sink", None) is not None}.values()
    parameter = run.flats[0].by_name["layers.3.mlp.down.weight"].parameter
    honest = sink.add

    def add(of: torch.nn.Parameter, accumulate: Any) -> None:
        honest(of, accumulate)
        if of is parameter:
            honest(of, lambda out: out.view(-1)[5:6].fill_(float("inf")))

    sink.add = add
    return train_step(run, state, make_batch(run.config, run.mesh, 0)).skipped


def test_a_weight_gradient_that_overflows_alone_is_named(ranks):
    (text,) = ranks(1, weight_gradient_alone)
    assert "it begins in the gradient of layers.3.mlp.down.weight itself" in text
