"""The output layer fused with its loss, wherever its weight and tokens lie."""

from __future__ import annotations

import math
from typing import Any

import pytest

from parallax.models import costs
from parallax.tensor import fused_loss
from parallax.tensor.loss import WholeCrossEntropy
from tests.cases import LLAMA, SEQUENCE_PARALLEL, TIED, VARIANTS, fit_kv_heads, train, worst

CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "1x1x1": [(VARIANTS["gpt2-tied"], {}), (VARIANTS["llama-padded"], {})],
    "1x4x1": [(VARIANTS["llama-padded"] | SEQUENCE_PARALLEL, {}), (VARIANTS["gpt2-tied"], {})],
    "2x2x2": [
        (VARIANTS["llama-tied-sp"], {"data.zero": 3}),
        (LLAMA | SEQUENCE_PARALLEL, {"pipeline.schedule": "zb-h1", "data.zero": 2}),
        (LLAMA | TIED, {"pipeline.schedule": "zb-v"}),
    ],
}


def fused(mesh: str, cases: list[Any], whole: bool) -> list[Any]:
    costs.FUSE_ABOVE, fused_loss.LOGITS_AT_ONCE = 0, 1000
    if whole:
        fused_loss.cross_entropy_of = WholeCrossEntropy
    return [train(mesh, changes | options) for changes, options in cases]


@pytest.mark.parametrize(("mesh", "whole"), [*((mesh, False) for mesh in CASES), ("1x4x1", True)])
def test_the_numbers_are_those_of_the_two_apart(ranks, mesh: str, whole: bool):
    """whole: the loss as a GPU takes it."""
    tensor = int(mesh.split("x")[1])
    cases = [(fit_kv_heads(changes, tensor), options) for changes, options in CASES[mesh]]
    for every in ranks(math.prod(map(int, mesh.split("x"))), fused, mesh, cases, whole):
        for rows, (changes, options) in zip(every, cases, strict=True):
            assert worst(rows, train("1x1x1", changes)) <= 1e-10, options
