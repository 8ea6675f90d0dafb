"""What ZeRO gathers together, in models of every shape: against one process that sees every rank's batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.data.gather import block_of, find_blocks
from parallax.mesh import Mesh, init_mesh
from tests.ranks.workers import over_sockets

D, V = 8, 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class ListInDict(nn.Module):
    """The containers of nanoGPT, and its tied head."""

    def __init__(self) -> None:
        super().__init__()
        blocks = nn.ModuleList([Block() for _ in range(3)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, D), "h": blocks, "ln_f": nn.LayerNorm(D)})
        self.lm_head = nn.Linear(D, V, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class Pair(nn.Module):
    """Has no forward: it is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)


class ListsInList(nn.Module):
    """The containers of vit-pytorch, and what else is in a list and is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)]) for _ in range(3)])
        self.layers.append(Pair())
        self.layers.append(nn.ParameterList([nn.Parameter(torch.ones(D))]))
        self.out = nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for one, other in list(self.layers)[:3]:
            x = x + one(x).tanh()
            x = x + other(x).tanh()
        x = x + self.layers[3].second(self.layers[3].first(x).tanh())
        return self.out(x * self.layers[4][0])


class Shared(nn.Module):
    """A block that runs three times, a layer in two blocks, one in a block and out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.same = nn.ModuleList([Block()] * 3)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.blocks[1].up = self.blocks[0].up
        self.last = self.blocks[2].down
        self.out = nn.Linear(D, V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in [*self.same, *self.blocks]:
            x = block(x)
        return self.out(self.last(torch.cat([x, x], -1)))


MODELS = {"list in dict": ListInDict, "lists in list": ListsInList, "shared": Shared}


def test_a_block_is_called_and_alone_with_its_weights():
    blocks = {name: [n for n, _ in find_blocks(make())] for name, make in MODELS.items()}
    assert blocks["list in dict"] == [*(f"transformer.{n}" for n in ("wte", "h.0", "h.1", "h.2", "ln_f"))]
    assert blocks["lists in list"] == [f"layers.{i}.{j}" for i in range(3) for j in range(2)]
    gpt, shared = ListInDict(), Shared()
    assert block_of(gpt)[gpt.lm_head.weight] is None
    found = block_of(shared)
    assert [found[p] for p in (shared.blocks[0].up.weight, shared.last.weight)] == [None, None]
    assert found[shared.same[2].up.weight] == "same.0" and found[shared.blocks[2].up.weight] == "blocks.2"


def far_from_alone(zero: int) -> dict[str, float]:
    """The largest difference of a loss over four steps."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    return {name: train(make(), mesh, zero) for name, make in MODELS.items()}


def train(alone: nn.Module, mesh: Mesh, zero: int) -> float:
    torch.manual_seed(0)
    for parameter in alone.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    model = parallax.data_parallel(copy.deepcopy(alone), mesh, zero=zero, bucket_bytes=600)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    generator, worst = torch.Generator().manual_seed(1), 0.0
    for _ in range(4):
        batches = torch.randint(0, V, (2, 4, 5), generator=generator)
        losses = [nn.functional.cross_entropy(alone(x).transpose(1, 2), x) for x in batches]
        own = batches[mesh.rank]
        loss = nn.functional.cross_entropy(model(own).transpose(1, 2), own)
        worst = max(worst, abs(float(loss - losses[mesh.rank])))
        loss.backward()
        optimizer.step()
        (sum(losses) / 2).backward()
        plain.step()
        plain.zero_grad()
    return worst


@pytest.mark.parametrize(("zero", "sockets"), [(3, False), (1, True), (2, True), (3, True)])
def test_lists_in_lists_and_tied_weights_are_gathered_before_use(ranks, zero: int, sockets: bool):
    for found in ranks(2, over_sockets, far_from_alone, zero) if sockets else ranks(2, far_from_alone, zero):
        assert max(found.values()) <= 1e-12, found
