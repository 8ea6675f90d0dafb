"""Each bug that DESIGN names, planted: the parity test must see it. A test that cannot fail proves nothing."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

import parallax.assemble
import parallax.models.transformer
import parallax.step
from parallax import params
from parallax.data import sync
from parallax.data.countdown import Countdown
from parallax.data.replicate import Replicate
from parallax.tensor import layers
from tests.cases import GPT2, SEQUENCE_PARALLEL, TIED, train, worst

LOUD = 1e-6


def skip_the_data_reduction() -> None:
    Replicate.launch = lambda self, flat, bucket: None  # type: ignore[method-assign]


def skip_a_bucket() -> None:
    honest = Countdown._launch_next

    def forgetful(self: Any) -> None:
        if self._next == 1:
            self._next += 1
        else:
            honest(self)

    Countdown._launch_next = forgetful  # type: ignore[method-assign]


def skip_the_input_gradient_reduction() -> None:
    from parallax.comm import Pending

    layers.all_reduce_start = lambda tensor, axis, op="sum": Pending(tensor)


def skip_the_partial_norm_gradients() -> None:
    sync.sum_partial = lambda flats, mesh: None


def count_replicated_gradients_twice() -> None:
    honest = params._pieces

    def pieces(*args: Any) -> Any:
        return [dataclasses.replace(spec, owned=True) for spec in honest(*args)]

    params._pieces = pieces  # type: ignore[assignment]


def average_the_means() -> None:
    """Each rank divides by its own token count, then the ranks are averaged."""

    def local(batch: Any, mesh: Any) -> Any:
        return batch.count() * mesh.grad.size

    parallax.step.count_tokens = local


def sum_ties_after_the_data_axis() -> None:
    """The tied gradient joins after its bucket has been reduced."""
    honest = parallax.assemble.FlatBuffers

    def early(*args: Any, **options: Any) -> Any:
        return honest(*args, **options | {"tied": ()})

    def finish(self: Any) -> None:
        self.wait()  # or it would depend on the moment which of the two comes first
        finish_honestly(self)

    finish_honestly = Replicate.finish
    Replicate.finish = finish  # type: ignore[method-assign]
    parallax.assemble.FlatBuffers = early  # type: ignore[assignment, misc]


def forget_one_use_of_a_tied_weight() -> None:
    sync.sum_ties = lambda ties, flats, mesh: None


def initialise_by_rank() -> None:
    honest = parallax.assemble.fill

    def by_rank(out: Any, piece: Any, seed: int, name: str) -> None:
        honest(out, piece, seed + int(os.environ["RANK"]), name)

    parallax.assemble.fill = by_rank


def lose_a_layer() -> None:
    honest = parallax.assemble.build_stage

    def short(config: Any, mesh: Any, units: Any, model: Any) -> Any:
        return honest(config, mesh, [u for u in units if u != 3], model)

    parallax.assemble.build_stage = short


def key_dropout_by_rank() -> None:
    honest = parallax.models.transformer.TokenRows

    class Local(honest):  # type: ignore[misc, valid-type]
        def __init__(self, microbatch: Any, mesh: Any, sequence_parallel: bool) -> None:
            super().__init__(microbatch, mesh, sequence_parallel)
            self.rows_n = self.rows_n - self.rows_n[0]

    parallax.models.transformer.TokenRows = Local  # type: ignore[misc]


def plant(bug: Any, mesh: str, changes: dict[str, Any]) -> Any:
    bug()
    return train(mesh, changes, 2)


BUGS = [
    (skip_the_data_reduction, "2x1x1", {}),
    (skip_a_bucket, "2x1x1", {}),
    (skip_the_input_gradient_reduction, "1x2x1", {}),
    (skip_the_partial_norm_gradients, "1x2x1", SEQUENCE_PARALLEL),
    (count_replicated_gradients_twice, "1x2x1", {}),
    (average_the_means, "2x1x1", {}),
    (sum_ties_after_the_data_axis, "2x1x1", TIED),
    (forget_one_use_of_a_tied_weight, "1x1x2", TIED),
    (initialise_by_rank, "1x2x1", {}),
    (lose_a_layer, "1x1x2", {}),
    (key_dropout_by_rank, "2x1x1", {"model.dropout": 0.2}),
]


honest: dict[Any, Any] = {}
"""By case: what one rank says, once the mesh without a bug has been seen to say the same."""


@pytest.mark.parametrize(("bug", "mesh", "changes"), BUGS, ids=[bug.__name__ for bug, _, _ in BUGS])
def test_a_planted_bug_is_seen(ranks, bug: Any, mesh: str, changes: dict[str, Any]):
    changes = GPT2 | changes
    case = (mesh, *sorted(changes.items()))
    if case not in honest:
        honest[case] = train("1x1x1", changes, 2)
        assert worst(ranks(2, train, mesh, changes, 2)[0], honest[case]) <= 1e-10
    alone = honest[case]
    rows = ranks(2, plant, bug, mesh, changes)
    assert max(worst(r, alone) for r in rows) > LOUD
