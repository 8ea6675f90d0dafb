"""A sample is a function of (seed, step, position in the global batch) alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.batches import IGNORE, batch_at, num_windows, sample_window, token_batches, validation_batches
from parallax.corpus import TokenStream
from parallax.errors import ConfigError

STREAM = TokenStream("s", (np.random.default_rng(0).integers(0, 251, 1003),), 251)
OPTIONS = {"global_size": 12, "sequence_length": 16}


@given(st.integers(1, 2000), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epoch_sees_every_window_once(count: int, seed: int, epoch: int):
    seen = [sample_window(seed, count, epoch * count + n) for n in range(count)]
    assert sorted(seen) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [[sample_window(seed, 97, epoch * 97 + n) for n in range(97)] for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 15
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(orders[0])) < 15, "neighbours do not stay together"


@pytest.mark.parametrize("size", [2, 3, 4, 6, 12])
def test_the_data_ranks_slices_are_the_global_batch(size: int):
    for step in (0, 7, 31):
        whole = batch_at(STREAM, step=step, seed=5, **OPTIONS)
        parts = [batch_at(STREAM, step=step, seed=5, data_rank=r, data_size=size, **OPTIONS) for r in range(size)]
        for field in ("tokens_BT", "targets_BT", "samples_B"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
        assert sum(part.num_tokens for part in parts) == whole.num_tokens
        assert whole.samples_B.tolist() == list(range(12)) and whole.step == step


def test_every_token_of_an_epoch_is_a_target_once():
    length = OPTIONS["sequence_length"]
    count = num_windows(STREAM, length)
    seen: list[tuple[int, ...]] = []
    batches = token_batches(STREAM, seed=1, **OPTIONS)
    rows = itertools.islice(((t, y) for b in batches for t, y in zip(b.tokens_BT, b.targets_BT, strict=True)), count)
    num_targets = 0
    for tokens, targets in rows:
        valid = targets != IGNORE
        num_targets += int(valid.sum())
        seen.append(tuple(tokens.tolist()))
        assert torch.equal(tokens[1:][valid[:-1] & valid[1:]], targets[:-1][valid[:-1] & valid[1:]])
    assert num_targets == len(STREAM) - 1
    assert len(set(seen)) == count
    starts = {tuple(STREAM.read(w * length, (w + 1) * length).tolist()) for w in range(count - 1)}
    assert starts <= set(seen)


def test_targets_are_the_token_after_and_the_padded_end_counts_nothing():
    stream = TokenStream("s", (np.arange(10),), 10)
    batches = validation_batches(stream, num_batches=1, global_size=4, sequence_length=4)
    (batch,) = batches
    assert batch.tokens_BT.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 0, 0], [0, 0, 0, 0]]
    assert batch.targets_BT.tolist()[:2] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.targets_BT.tolist()[2:] == [[9, IGNORE, IGNORE, IGNORE], [IGNORE] * 4]
    assert batch.num_tokens == 9


def test_starting_late_is_skipping():
    late = token_batches(STREAM, seed=3, start_step=9, **OPTIONS)
    for batch, step in zip(late, range(9, 13), strict=False):
        assert torch.equal(batch.tokens_BT, batch_at(STREAM, step=step, seed=3, **OPTIONS).tokens_BT)
        assert batch.step == step


def test_validation_is_the_same_each_time_on_any_data_size():
    def once(size: int) -> list[list[list[int]]]:
        parts = [
            list(validation_batches(STREAM, num_batches=2, data_rank=r, data_size=size, **OPTIONS)) for r in range(size)
        ]
        return [sum((b.tokens_BT.tolist() for b in same), []) for same in zip(*parts, strict=True)]

    assert once(1) == once(1) == once(3)


def test_microbatches_are_runs_in_order():
    batch = batch_at(STREAM, step=4, seed=0, **OPTIONS)
    parts = batch.split(3)
    assert [len(part.samples_B) for part in parts] == [4, 4, 4]
    assert torch.equal(torch.cat([part.tokens_BT for part in parts]), batch.tokens_BT)
    assert {part.step for part in parts} == {4}
    with pytest.raises(ConfigError, match="12 samples of this rank do not divide into 5"):
        batch.split(5)
    with pytest.raises(ConfigError, match="global batch of 12 does not divide over data=5"):
        batch_at(STREAM, step=0, seed=0, data_size=5, **OPTIONS)
