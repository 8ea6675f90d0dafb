"""Stage splits: the union of the stages is the model exactly once, and the slowest stage is as fast as can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.config import ModelConfig
from parallax.config_io import load
from parallax.errors import ConfigError, ScheduleError
from parallax.models.costs import FUSE_ABOVE, LOGITS_ON_A_GPU, unit_costs
from parallax.pipeline.split import Unit, balanced_split, check_partition, split_from_layers, stage_table
from parallax.stage_plan import plan_stages

UNITS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8).map(
    lambda pairs: [Unit(f"u{i}", float(flops), params) for i, (flops, params) in enumerate(pairs)]
)


def every_split(num_units: int, num_stages: int) -> list[list[tuple[int, int]]]:
    cuts = itertools.combinations(range(1, num_units), num_stages - 1)
    return [list(itertools.pairwise([0, *cut, num_units])) for cut in cuts]


@given(UNITS, st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_no_contiguous_split_is_better(units: list[Unit], num_stages: int):
    if num_stages > len(units):
        with pytest.raises(ConfigError, match="cannot share"):
            balanced_split(units, num_stages)
        return
    spans = balanced_split(units, num_stages)
    check_partition(spans, units)

    def flops(span: tuple[int, int]) -> float:
        return sum(u.flops for u in units[slice(*span)])

    def params(span: tuple[int, int]) -> int:
        return sum(u.params for u in units[slice(*span)])

    splits = every_split(len(units), num_stages)
    fastest = min(max(map(flops, split)) for split in splits)
    assert max(map(flops, spans)) <= 1.05 * fastest
    near = [split for split in splits if max(map(flops, split)) <= 1.05 * fastest]
    assert max(map(params, spans)) == min(max(map(params, split)) for split in near)


def test_embedding_and_head_are_counted():
    """A large vocabulary: the head costs as much as many layers, so its stage has fewer."""
    config = ModelConfig(layers=16, hidden=256, heads=8, vocab=32000)
    units = [Unit(*cost) for cost in unit_costs(config, 512)]
    spans = balanced_split(units, 4)
    layers = [last - first for first, last in spans]
    assert layers[-1] < layers[1]
    assert spans[0][0] == 0 and spans[-1][1] == 18


def test_the_user_s_split_counts_layers():
    units = [Unit(str(i), 1.0, 1) for i in range(9)]
    assert split_from_layers([3, 1, 3], units) == ((0, 4), (4, 5), (5, 9))
    assert split_from_layers([0, 7, 0], units) == ((0, 1), (1, 8), (8, 9))
    with pytest.raises(ConfigError, match=r"sums to 6, the model has 7 layers"):
        split_from_layers([3, 3], units)
    for empty in ([3, 0, 4], [-1, 8]):
        with pytest.raises(ConfigError, match="leaves a stage empty"):
            split_from_layers(empty, units)


@pytest.mark.parametrize(
    "spans",
    [[(0, 2), (3, 4)], [(0, 3), (2, 4)], [(0, 4), (4, 4)], [(0, 3)], [(1, 4)], [(2, 4), (0, 2)]],
    ids=["lost", "twice", "empty", "lost end", "lost start", "order"],
)
def test_a_split_that_is_not_the_model_once_is_refused(spans: list[tuple[int, int]]):
    with pytest.raises(ScheduleError, match="exactly once"):
        check_partition(spans, [Unit(str(i), 1.0, 1) for i in range(4)])


def test_more_stages_than_units_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="5 pipeline stages cannot share 4 units .* use pipeline of at most 4"):
        balanced_split([Unit(str(i), 1.0, 1) for i in range(4)], 5)
    with pytest.raises(ConfigError, match="0 pipeline stages"):
        balanced_split([Unit("head", 1.0, 1)], 0)


def test_the_table_names_every_stage():
    units = [Unit("embedding", 0.0, 1000), Unit("layers.0", 30.0, 2000), Unit("head", 10.0, 500)]
    lines = stage_table([(0, 2), (2, 3)], units, [1, 0]).splitlines()
    assert lines[1].split() == ["0", "1", "3,000", "75.0%", "embedding", "..", "layers.0"]
    assert lines[2].split() == ["1", "0", "500", "25.0%", "head"]
    lines = stage_table([(0, 2), (2, 3)], units, [1, 0], [2, 1], [3e9, 1.2e6]).splitlines()
    assert lines[1].split()[4:7] == ["2", "3,000", "MB"] and lines[2].split()[4:7] == ["1", "1", "MB"]


@given(UNITS, st.integers(1, 4))
@settings(max_examples=60)
def test_ranks_with_two_stages_are_balanced_as_wholes(units: list[Unit], num_ranks: int):
    if 2 * num_ranks > len(units):
        return
    places = [min(s, 2 * num_ranks - 1 - s) for s in range(2 * num_ranks)]

    def busiest(spans: object) -> float:
        total = [0.0] * num_ranks
        for rank, (first, last) in zip(places, spans, strict=True):  # type: ignore[arg-type]
            total[rank] += sum(u.flops for u in units[first:last])
        return max(total)

    spans = balanced_split(units, 2 * num_ranks, places)
    check_partition(spans, units)
    assert busiest(spans) <= busiest(balanced_split(units, 2 * num_ranks))


def test_the_default_model_in_a_v_on_two_ranks_is_even():
    """Six layers on four stages: the rank with embedding and head gets three of them too."""
    config = ModelConfig()
    units = [Unit(*cost) for cost in unit_costs(config, 128)]
    spans = balanced_split(units, 4, [0, 1, 1, 0])
    layers = [sum(1 <= u <= 6 for u in range(*span)) for span in spans]
    assert layers[0] + layers[3] == layers[1] + layers[2] == 3


@given(UNITS, st.integers(1, 4), st.integers(1, 120))
@settings(max_examples=80)
def test_the_memory_cap_is_kept_or_refused(units: list[Unit], num_stages: int, cap: int):
    """Of the splits within the cap the fastest, against all of them."""
    if num_stages > len(units):
        return

    def memory(stage: int, span: tuple[int, int]) -> int:
        return sum(u.params for u in units[slice(*span)]) * (num_stages - stage)

    fitting = [
        split
        for split in every_split(len(units), num_stages)
        if all(memory(s, span) <= cap for s, span in enumerate(split))
    ]
    try:
        spans = balanced_split(units, num_stages, allowed=lambda stage, span: memory(stage, span) <= cap)
    except ConfigError:
        assert not fitting
        return
    assert list(spans) in fitting

    def slowest(split: object) -> float:
        return max(sum(u.flops for u in units[slice(*span)]) for span in split)  # type: ignore[attr-defined]

    assert slowest(spans) <= 1.05 * min(map(slowest, fitting))


def test_early_stages_hold_more_and_a_cap_moves_layers_to_later_ones():
    options = ["mesh=1x1x4", "model.layers=16", "model.hidden=64", "batch.num_microbatches=8", "batch.global_size=32"]
    free = plan_stages(load(options))
    totals = [m.total for m in free.memory]
    most = max(totals)
    assert totals[0] == most
    capped = plan_stages(load([*options, f"pipeline.max_memory_bytes={round(most * 0.9)}"]))
    assert max(m.total for m in capped.memory) <= most * 0.9 and capped.spans[0][1] < free.spans[0][1]
    with pytest.raises(ConfigError, match="too small for any split into 4 stages"):
        plan_stages(load([*options, f"pipeline.max_memory_bytes={round(most * 0.2)}"]))
    assert "in flight" in free.describe() and " MB  " in free.describe()


@pytest.mark.parametrize("vocab", [1000, 50_000])
def test_a_gpu_is_planned_for_the_loss_too(vocab: int):
    """Of the last stage alone, once whatever is in flight: probabilities in float32, and logits that are not held."""
    options = ["dtype=bfloat16", "mesh=1x1x2", f"model.vocab={vocab}", "corpus.sequence_length=1024"]
    options += ["batch.global_size=8", "batch.microbatch_size=2", "recompute=full"]  # attention keeps nothing anywhere
    on_cpu, on_gpu = (plan_stages(load([*options, f"device={device}"])).memory for device in ("cpu", "cuda"))
    logits = 2 * 1024 * vocab
    expected = 4 * logits if logits <= FUSE_ABOVE else min(logits, LOGITS_ON_A_GPU) * (2 + 4)
    assert on_gpu[1].activations - on_cpu[1].activations == expected
    assert on_gpu[0] == on_cpu[0]
