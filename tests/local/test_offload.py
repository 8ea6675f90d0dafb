"""Activations in the host's memory: the same bits, and no weight goes along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parallax.models import offload
from tests.cases import GPT2, TIED, advance, gather_parameters, start

BLOCKED = {"model.dropout": 0.0, "corpus.sequence_length": 96}


@pytest.mark.parametrize(
    "changes",
    [{}, {"recompute": "full"}, {"recompute": "selective"}, BLOCKED, BLOCKED | {"recompute": "full"}],
    ids=str,
)
def test_it_changes_no_bit(monkeypatch, changes: dict[str, Any]):
    packed: list[int] = []
    honest = offload.pack

    def watch(tensor: torch.Tensor, least_bytes: int) -> offload.Kept:
        kept = honest(tensor, 0)
        if kept[0] is not None:
            assert not isinstance(tensor, nn.Parameter) and kept[1].data_ptr() != tensor.data_ptr()
            packed.append(kept[1].nbytes)
        return kept

    monkeypatch.setattr(offload, "pack", watch)
    found = []
    for wish in ("false", "true"):
        packed.clear()
        run, state = start("1x1x1", **GPT2 | TIED | {"model.dropout": 0.1} | changes | {"offload_activations": wish})
        rows = advance(run, state, 2)
        found.append((rows, gather_parameters(run, state)))
        assert bool(packed) == (wish == "true")
    assert found[0][0] == found[1][0]
    for name, boxes in found[0][1].items():
        assert all(a[1].equal(b[1]) for a, b in zip(boxes, found[1][1][name], strict=True))


def test_what_is_small_stays():
    assert offload.pack(torch.zeros(10), 64)[0] is None and offload.pack(torch.zeros(16), 64)[0] is not None
