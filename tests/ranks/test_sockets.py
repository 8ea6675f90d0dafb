"""Key tests of collectives, ZeRO and the wrapper over sockets, where a collective goes on after it has begun.

Ranks on one machine share memory, so that the others' tests hardly ever take this way.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import test_comm, test_wrap, test_zero
from tests.ranks.workers import over_sockets, run_ranks


@pytest.fixture
def sockets() -> Any:
    """As `ranks`, without shared memory."""

    def run(size: int, function: Any, *args: Any, **options: Any) -> list[Any]:
        return run_ranks(size, over_sockets, function, *args, **options)

    return run


@pytest.mark.parametrize("size", [2, 3])
def test_collectives(sockets: Any, size: int):
    test_comm.test_collectives_are_what_they_say(sockets, size, torch.float64)


@pytest.mark.parametrize("mesh", ["2x1x1", "3x1x2"])
def test_every_level_trains_as_one_rank(sockets: Any, mesh: str):
    test_zero.test_every_level_trains_as_one_rank(sockets, mesh)


def test_every_level_is_copies_bit_for_bit(sockets: Any):
    test_zero.test_every_level_is_copies_bit_for_bit(sockets, "2x2x1")


def test_three_lines_train_any_module(sockets: Any):
    test_wrap.test_three_lines_train_any_module(sockets, "sgd")


def test_ranks_with_fewer_batches(sockets: Any):
    test_wrap.test_ranks_with_fewer_batches_hang_nobody(sockets, 2)
