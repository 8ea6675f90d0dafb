"""ZeRO: whatever is cut over the data ranks, the numbers are those of copies, bit for bit where the order is one."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from parallax.data.gather import Gather
from parallax.data.zero import Zero
from parallax.pipeline.schedules import SCHEDULES
from tests.cases import (
    GPT2,
    LLAMA,
    SEQUENCE_PARALLEL,
    TIED,
    VARIANTS,
    advance,
    assemble_whole,
    fit_kv_heads,
    gather_parameters,
    start,
    train,
    worst,
)

MESHES = ["4x1x1", "2x2x2", "2x1x4", "3x1x2", "4x2x1"]
KINDS = ("parameters", "exp_avg", "exp_avg_sq")
LEVELS: dict[str, dict[str, Any]] = {
    "0": {},
    "1": {"data.zero": 1},
    "2": {"data.zero": 2},
    "3": {"data.zero": 3},
    "3 once a step": {"data.zero": 3, "data.gather": "step"},
}


def size_of(mesh: str) -> int:
    return math.prod(map(int, mesh.split("x")))


def final(mesh: str, changes: dict[str, Any], num_steps: int = 4) -> dict[str, Any]:
    """(loss, norm) of each step with a validation between, and this rank's boxes at the end."""
    run, state = start(mesh, **changes)
    rows = advance(run, state, num_steps)
    return {"rows": rows, **{kind: gather_parameters(run, state, kind) for kind in KINDS}}


def final_each(mesh: str, changes: dict[str, Any], levels: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: final(mesh, changes | level) for name, level in levels.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_every_level_is_copies_bit_for_bit(ranks, mesh: str):
    """Float32, four steps with clipping: parameters, both moments, losses; tied weights, dropout, partial gradients."""
    changes = VARIANTS["gpt2-dropout-sp"] | TIED | {"dtype": "float32", "optimizer.max_grad_norm": 0.5}
    parts = ranks(size_of(mesh), final_each, mesh, changes, LEVELS)
    copies = {kind: assemble_whole([part["0"][kind] for part in parts]) for kind in KINDS}
    for name in LEVELS:
        assert [loss for loss, _ in parts[0][name]["rows"]] == [loss for loss, _ in parts[0]["0"]["rows"]], name
        assert worst(parts[0][name]["rows"], parts[0]["0"]["rows"]) <= 1e-14, "pieces of a norm, in float64"
        for kind in KINDS:
            whole = assemble_whole([part[name][kind] for part in parts])
            assert whole.keys() == copies[kind].keys()
            for key, values in whole.items():
                assert values.equal(copies[kind][key]), (name, kind, key)


def train_each(mesh: str, changes: dict[str, Any], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: train(mesh, changes | option) for name, option in options.items()}


@pytest.mark.parametrize("mesh", ["2x2x2", "3x1x2", *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[::2])])
def test_every_level_trains_as_one_rank(ranks, mesh: str):
    """Float64, four steps and a validation, with gradients reduced once a step or every microbatch."""
    tensor = int(mesh.split("x")[1])
    changes = fit_kv_heads(VARIANTS["llama-tied-sp"], tensor)
    options = {name: level for name, level in LEVELS.items() if name != "0"}
    options |= {f"{z} each": {"data.zero": z, "data.reduce": "microbatch"} for z in (2, 3)}
    alone = train("1x1x1", changes)
    for rows in ranks(size_of(mesh), train_each, mesh, changes, options):
        differences = {name: worst(rows[name], alone) for name in options}
        assert max(differences.values()) <= 1e-10, differences


SCHEDULED = GPT2 | TIED | {"model.layers": 4, "batch.num_microbatches": 4, "model.dropout": 0.1}


def check_schedules(ranks: Any, mesh: str, levels: list[int]) -> None:
    # Two stages on each of four pipeline ranks need more layers.
    changes = SCHEDULED | ({"model.layers": 7} if mesh.endswith("x4") else {})
    changes |= {"batch.global_size": 48} if mesh.startswith("4") else {}
    alone = train("1x1x1", changes)
    options = {f"{name} {z}": {"pipeline.schedule": name, "data.zero": z} for name in SCHEDULES for z in levels}
    for rows in ranks(size_of(mesh), train_each, mesh, changes, options, timeout_s=1200):
        differences = {name: worst(rows[name], alone) for name in options}
        assert max(differences.values()) <= 1e-10, differences


@pytest.mark.parametrize("level", [1, 3])
def test_every_schedule_runs_on_cut_parameters(ranks, level: int):
    check_schedules(ranks, "2x1x2", [level])


def test_recomputation_gathers_what_it_needs(ranks):
    """Whole layers recomputed on cut parameters, with sequence parallelism and a split backward."""
    changes = SCHEDULED | SEQUENCE_PARALLEL
    modes = [("full", "1f1b", 3), ("every-2", "zb-v", 3), ("full", "zb-h1", 3), ("full", "zb-v", 0)]
    modes.append(("selective", "interleaved", 2))
    options = {str(mode): {"recompute": mode[0], "pipeline.schedule": mode[1], "data.zero": mode[2]} for mode in modes}
    alone = train("1x1x1", changes)
    for rows in ranks(8, train_each, "2x2x2", changes, options):
        differences = {name: worst(rows[name], alone) for name in options}
        assert max(differences.values()) <= 1e-10, differences


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mesh", MESHES)
def test_every_schedule_level_and_mesh(ranks, mesh: str):
    check_schedules(ranks, mesh, [1, 2, 3])


@pytest.mark.parametrize("mesh", ["4x1x1", "4x1x2"])
def test_shards_within_a_group_and_copies_across(ranks, mesh: str):
    options = {str(z): {"data.zero": z, "data.shard_size": 2} for z in (1, 2, 3)}
    alone = train("1x1x1", VARIANTS["gpt2-tied"])
    for rows in ranks(size_of(mesh), train_each, mesh, VARIANTS["gpt2-tied"], options):
        assert max(worst(rows[name], alone) for name in options) <= 1e-10


PLAIN = LLAMA | {"dtype": "float32", "data.bucket_bytes": 10**9, "model.vocab": 128}


def traffic(level: dict[str, Any], num_microbatches: int) -> dict[str, Any]:
    """What the second step sends over data, and the bytes of each bucket, early ones in order of use."""
    changes = PLAIN | level | {"batch.num_microbatches": num_microbatches, "batch.global_size": 24}
    run, state = start("4x1x1", **changes)
    advance(run, state, 1)
    before = Counter(run.mesh.data.traffic)
    advance(run, state, 1)
    (flat,) = run.flats.values()
    sizes = [(b.stop - b.start) * 4 for b in reversed(flat.early)]
    late = (flat.late.stop - flat.late.start) * 4 if flat.late else 0
    return {"sent": Counter(run.mesh.data.traffic) - before, "early": sizes, "late": late, "names": len(run.order)}


def traffic_each(levels: dict[str, dict[str, Any]]) -> dict[tuple[str, int], Any]:
    return {(name, m): traffic(level, m) for name, level in levels.items() for m in (1, 3)}


def test_a_step_sends_what_the_paper_says(ranks):
    """In units of P(n-1)/n: 2 with levels 0, 1 and 2; with level 3 a gathering for each forward and each backward, but
    not twice where they turn.
    """
    levels = {name: LEVELS[name] for name in LEVELS if name != "0"}
    levels["2 each"] = {"data.zero": 2, "data.reduce": "microbatch"}
    for every in ranks(4, traffic_each, levels):
        for (name, m), found in every.items():
            early, late, sent = found["early"], found["late"], found["sent"]
            whole = sum(early) + late
            gathered = whole
            if name == "3":  # the head is there when the backward begins, the embedding when the next forward does
                gathered = late + m * (2 * sum(early) - early[-1]) - (m - 1) * early[0]
            reduced = (m if name == "2 each" else 1) * sum(early) + late
            assert sent["reduce_scatter"] == reduced * 3 // 4, name
            assert sent["all_gather"] == gathered * 3 // 4, name
            scalars = (8, 24, (found["names"] + 2) * 8)  # tokens; loss and whether all is finite; the norm's vector
            assert sent["all_reduce"] == sum(2 * 3 * n // 4 for n in scalars), name


def held(level: dict[str, Any]) -> dict[str, int]:
    """Elements that a rank holds after a step, and the most gradients and parameters during one."""
    run, state = start("4x1x1", **PLAIN | level | {"batch.num_microbatches": 1})
    (flat,) = run.flats.values()
    most = Counter()

    def look(kind: str, num: int) -> None:
        most[kind] = max(most[kind], num)

    def watch(*_: Any) -> None:
        look("grads", flat._grads.numel() + sum(t.numel() for t in flat._lent.values()))
        look("values", sum(t.untyped_storage().nbytes() // 4 for t in flat._values))

    for parameter in (p.parameter for p in flat.placed):
        parameter.register_post_accumulate_grad_hook(watch)
    for op, honest in list(run.pipeline._do.items()):
        run.pipeline._do[op] = lambda action, honest=honest: (honest(action), watch())[0]
    for sink in run.pipeline.sinks.values():
        told = sink.on_accumulated
        sink.on_accumulated = lambda p, told=told: (watch(), told(p))[0]
    advance(run, state, 2)
    masters = sum(t.numel() for t in state.optimizer.flat_state(0)["exp_avg"])
    after = sum(t.untyped_storage().nbytes() // 4 for t in flat._values)
    largest = max(b.stop - b.start for b in flat.early)
    return {
        "all": flat.stop,
        "late": flat.late.stop - flat.late.start if flat.late else 0,
        "largest": largest,
        "moments": masters,
        "values": after,
        "shards": flat._value_shards.numel(),
        "grad shards": flat._grad_shards.numel(),
        "most grads": most["grads"],
        "most values": most["values"],
    }


def held_each(levels: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {name: held(level) for name, level in levels.items()}


def test_a_rank_holds_its_part_and_a_few_blocks(ranks):
    """Level 1 cuts the moments, 2 the gradients, 3 the parameters, of which a step holds three blocks at most."""
    for every in ranks(4, held_each, LEVELS):
        for name, found in every.items():
            part = found["all"] // (1 if name == "0" else 4)
            assert found["moments"] == part, name
            if name in "01":
                assert found["values"] == found["all"] and found["most grads"] == found["all"]
            if name >= "2":
                assert found["grad shards"] == part
            if name == "3":
                assert found["values"] == 0 and found["shards"] == part
                # two blocks' gradients: the one that fills, and a stretch of the next
                assert found["most grads"] <= found["late"] + 2 * found["largest"]
                assert found["late"] < found["most values"] <= found["late"] + 3 * found["largest"]


def test_stale_parameters_would_be_seen(ranks):
    """The check can fail: without the gathering after the step the copies of the others stay behind."""
    alone = train("1x1x1", VARIANTS["gpt2-tied"])
    assert worst(ranks(2, forgetful, "publish")[0], alone) > 1e-6
    assert worst(ranks(2, forgetful, "retire")[0], alone) > 1e-6


def forgetful(what: str) -> Any:
    if what == "publish":
        Gather.publish = lambda self: None  # type: ignore[method-assign]
    else:
        Zero._retire = lambda self: self._pending.popleft()[2].wait()  # type: ignore[method-assign]
    return train("2x1x1", VARIANTS["gpt2-tied"] | {"data.zero": 1})


def go(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str) -> Any:
    from parallax.resume import Checkpoints

    run, state = start(mesh, **changes | {"output": output, "resume": wish})
    checkpoints = Checkpoints(run, Path(output))
    checkpoints.resume(state)
    before = {kind: gather_parameters(run, state, kind) for kind in KINDS}
    rows = advance(run, state, num_steps)
    checkpoints.save(state)
    return {"rows": rows, "before": before, **{kind: gather_parameters(run, state, kind) for kind in KINDS}}


def whole(parts: list[Any]) -> dict[str, Any]:
    return {kind: assemble_whole([part[kind] for part in parts]) for kind in KINDS}


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    for kind in KINDS:
        assert left[kind].keys() == right[kind].keys()
        assert all(values.equal(right[kind][name]) for name, values in left[kind].items()), kind


def go_each(mesh: str, changes: dict[str, Any], output: str, num_steps: int, wish: str) -> dict[int, Any]:
    return {z: go(mesh, changes | {"data.zero": z}, f"{output}/{z}", num_steps, wish) for z in (1, 2, 3)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_is_the_same_run(ranks, tmp_path: Path, dtype: str):
    changes = GPT2 | TIED | SEQUENCE_PARALLEL | {"dtype": dtype, "model.dropout": 0.1, "model.layers": 3}
    straight = ranks(4, go_each, "2x1x2", changes, str(tmp_path / "a"), 4, "none")
    first = ranks(4, go_each, "2x1x2", changes, str(tmp_path / "b"), 2, "none")
    second = ranks(4, go_each, "2x1x2", changes, str(tmp_path / "b"), 2, "auto")
    for level in (1, 2, 3):
        assert first[0][level]["rows"] + second[0][level]["rows"] == straight[0][level]["rows"]
        assert_equal(whole([part[level] for part in second]), whole([part[level] for part in straight]))


def test_another_level_on_another_mesh_takes_up_the_run(ranks, tmp_path: Path):
    """What one saved the next one loads, bit for bit; one of them with shards in groups of two."""
    changes = VARIANTS["gpt2-tied"] | {"model.layers": 3}
    alone = train("1x1x1", changes, 8)[:-1]
    rows: list[Any] = []
    saved: Any = None
    groups = {"data.zero": 1, "data.shard_size": 2}
    plan = [("4x1x1", {"data.zero": 3}), ("4x1x2", groups), ("1x2x2", {}), ("3x1x2", {"data.zero": 2})]
    for number, (mesh, level) in enumerate(plan):
        wish = "auto" if number else "none"
        found = ranks(size_of(mesh), go, mesh, changes | level, str(tmp_path), 2, wish)
        if saved is not None:
            assert_equal(whole([part["before"] for part in found]), saved)
        saved = whole(found)
        rows += found[0]["rows"]
    assert worst(rows, alone) <= 1e-10


def test_a_piece_is_the_boxes_of_its_range():
    from parallax.data.layout import boxes_of_range

    for shape in [(7,), (4, 5), (3, 1, 4), (2, 3, 4, 5), ()]:
        size = math.prod(shape)
        x = torch.arange(size).view(shape)
        for first in range(size + 1):
            for last in range(first, size + 1):
                found = [
                    x[tuple(slice(a, b) for a, b in box)].reshape(-1) for box in boxes_of_range(shape, first, last)
                ]
                assert torch.equal(torch.cat([*found, torch.empty(0, dtype=x.dtype)]), torch.arange(first, last))
