"""What a step sends, by axis and kind, counted where it is sent: equal to the formulas of the docstrings."""

from __future__ import annotations

from typing import Any

import pytest

from parallax.assemble import Run
from tests.cases import advance, start

SIZES = {
    "dtype": "float32",
    "model.layers": 4,
    "model.hidden": 64,
    "model.heads": 4,
    "model.ffn": 128,
    "model.vocab": 256,
    "corpus.sequence_length": 16,
    "batch.global_size": 36,
    "batch.num_microbatches": 3,
    "model.positions": "learned",
    "model.norm": "layernorm",
    "model.activation": "gelu",
    "model.bias": "true",
}
FLOAT, DOUBLE, INT = 4, 8, 8


def all_reduce(num_bytes: int, size: int) -> int:
    return 2 * (size - 1) * num_bytes // size


def measure(mesh: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What the second step sends: the first one learns."""
    run, state = start(mesh, **SIZES | changes)
    advance(run, state, 1)
    before = run.mesh.traffic()
    advance(run, state, 1)
    after = run.mesh.traffic()
    sent = {
        axis: {kind: n - before.get(axis, {}).get(kind, 0) for kind, n in kinds.items()}
        for axis, kinds in after.items()
    }
    sent = {axis: {kind: n for kind, n in kinds.items() if n} for axis, kinds in sent.items()}
    return {"sent": {axis: kinds for axis, kinds in sent.items() if kinds}, "expected": expected(run)}


def expected(run: Run) -> dict[str, dict[str, int]]:
    """The formulas, from the mesh, the config and the spans alone."""
    mesh, config = run.mesh, run.config
    p, d, t = mesh.shape.pipeline, mesh.shape.data, mesh.shape.tensor
    rank, m = mesh.pipeline.rank, run.batch.num_microbatches
    first, last = rank == 0, rank == p - 1
    low, high = run.plan.spans[rank]
    num_layers = len([unit for unit in range(low, high) if 1 <= unit <= config.model.layers])
    tokens = run.batch.microbatch_size * config.corpus.sequence_length
    hidden = config.model.hidden
    activation = tokens * hidden * FLOAT
    vector = (len(run.order) + 2) * DOUBLE  # with the loss and the wish to end
    out: dict[str, dict[str, int]] = {"data": {}, "tensor": {}, "pipeline": {}}

    parallel = config.tensor.sequence_parallel
    if t > 1:
        passes = m * (4 * num_layers + first + last)  # attention and MLP, each once forward and once backward
        if parallel:
            shard = activation // t
            gathers = m * (4 * num_layers + first + last)
            out["tensor"]["all_gather"] = gathers * (t - 1) * shard
            out["tensor"]["reduce_scatter"] = passes * (t - 1) * activation // t
            partial = num_layers * (2 * 2 * hidden + 2 * hidden)  # two norms, two row biases
            partial += first * config.corpus.sequence_length * hidden + last * 2 * hidden
            out["tensor"]["all_reduce"] = all_reduce(partial * FLOAT, t)
        else:
            out["tensor"]["all_reduce"] = passes * all_reduce(activation, t)
        out["tensor"]["all_reduce"] += all_reduce(vector, t)
        if last:
            statistics = m * (t - 1) * 3 * tokens * FLOAT
            out["tensor"]["all_gather"] = out["tensor"].get("all_gather", 0) + statistics
    if d > 1:
        # Each parameter starts at a multiple of 64 elements in the flat buffers, a tied one is there once; the two
        # buckets are multiples of 64 a rank.
        (stage,) = run.stages.values()
        (flat,) = run.flats.values()
        sizes = {q.data_ptr(): q.numel() for q in stage.parameters()}
        params = sum(-(-size // 64) * 64 for size in sizes.values()) * FLOAT
        padding = sum(
            b.stop - b.start - sum(-(-q.parameter.numel() // 64) * 64 for q in b.placed) for b in flat.buckets
        )
        assert padding < len(flat.buckets) * 64 * d
        params += padding * FLOAT
        out["data"]["all_reduce"] = all_reduce(INT, d) + all_reduce(3 * DOUBLE, d)
        if d > 2 and mesh.data.board is None:  # over sockets a sum in rank order is two messages
            out["data"]["reduce_scatter"] = out["data"]["all_gather"] = (d - 1) * params // d
        else:
            out["data"]["all_reduce"] += all_reduce(params, d)
    if p > 1:
        boundary = activation // t if parallel and t > 1 else activation
        out["pipeline"]["send"] = m * boundary * ((not last) + (not first))
        out["pipeline"]["all_reduce"] = all_reduce(vector, p)
        if config.model.tie_embeddings and (first or last):
            out["pipeline"]["exchange"] = config.model.vocab // t * hidden * FLOAT
    return {axis: kinds for axis, kinds in out.items() if kinds}


@pytest.mark.parametrize(("parallel", "tied"), [("false", "true"), ("true", "false")])
@pytest.mark.parametrize("mesh", ["2x2x2", "1x4x1", "4x1x1"])
def test_a_step_sends_what_the_docstrings_say(ranks, mesh: str, parallel: str, tied: str):
    changes = {"tensor.sequence_parallel": parallel, "model.tie_embeddings": tied}
    data, tensor, pipeline = map(int, mesh.split("x"))
    for rank, found in enumerate(ranks(data * tensor * pipeline, measure, mesh, changes)):
        assert found["sent"] == found["expected"], f"rank {rank}"
