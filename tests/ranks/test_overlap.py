"""Overlap is real: on a slow link the reductions of early buckets are over before the backward is."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from parallax.comm import Pending
from parallax.data import replicate, zero
from parallax.data.countdown import Countdown
from tests.cases import LLAMA, advance, start

LAYER_S, MESSAGE_S = 0.03, 0.02


class Link:
    """A link that takes MESSAGE_S for each message, one after another, beside whatever else goes on."""

    def __init__(self) -> None:
        self.free_at = 0.0
        self.done_at: list[float] = []
        self.waited_s = 0.0

    def slow(self, begin: Any) -> Any:
        def slowed(flat: torch.Tensor, axis: Any, *about: str) -> Pending:
            pending = begin(flat, axis, *about)
            self.free_at = max(self.free_at, time.perf_counter()) + MESSAGE_S
            self.done_at.append(self.free_at)
            return _Slowed(self, pending, self.free_at)

        return slowed


class _Slowed(Pending):
    def __init__(self, link: Link, inner: Pending, done_at: float) -> None:
        self.link, self.inner, self.done_at = link, inner, done_at  # type: ignore[misc]

    def advance(self) -> None:
        self.inner.advance()

    def wait(self) -> torch.Tensor:
        left = max(0.0, self.done_at - time.perf_counter())
        self.link.waited_s += left
        time.sleep(left)
        return self.inner.wait()


_Slowed.__slots__ = ()  # type: ignore[misc]


def second_step(level: int, overlap: bool) -> dict[str, Any]:
    link = Link()
    replicate.sum_start = link.slow(replicate.sum_start)
    zero.reduce_scatter_start = link.slow(zero.reduce_scatter_start)
    if not overlap:
        Countdown._accumulated = lambda self, parameter: None  # type: ignore[method-assign]
    changes = LLAMA | {"dtype": "float32", "data.zero": level, "data.bucket_bytes": 45000, "batch.num_microbatches": 1}
    run, state = start("2x1x1", **changes)
    (stage,) = run.stages.values()
    for layer in stage.layers.values():  # type: ignore[union-attr,operator]
        layer.register_full_backward_hook(lambda *args: time.sleep(LAYER_S))
    ends: list[float] = []
    honest = run.sync.reduce
    run.sync.reduce = lambda index: (ends.append(time.perf_counter()), honest(index))  # type: ignore[method-assign]
    advance(run, state, 1)
    link.done_at.clear()
    link.waited_s = 0.0
    rows = advance(run, state, 1)
    early = sum(done < ends[-1] for done in link.done_at)
    return {"rows": rows, "early": early, "messages": len(link.done_at), "waited_s": link.waited_s}


@pytest.mark.parametrize("level", [0, 1, 2])
def test_reductions_end_before_the_backward_does(ranks, level: int):
    for found in ranks(2, second_step, level, True):
        # Seven layers take 0.03 s each, their messages 0.02 s: what is left at the end is the last layer's and after.
        assert 7 <= found["messages"] <= 11, found
        assert found["early"] >= found["messages"] - 3, found
        assert found["waited_s"] < 0.5 * found["messages"] * MESSAGE_S, found


def test_without_overlap_it_would_be_seen(ranks):
    """The check can fail: buckets that all go at the end."""
    found = ranks(2, second_step, 0, False)[0]
    assert found["early"] == 0 and found["waited_s"] > 0.7 * found["messages"] * MESSAGE_S
    assert found["rows"] == ranks(2, second_step, 0, True)[0]["rows"], "the numbers are the same"
