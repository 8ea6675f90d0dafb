"""ZeRO where each rank runs other blocks: right numbers, or an error that says so."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import parallax
from parallax.mesh import Mesh, init_mesh
from tests.ranks.workers import over_sockets


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(5)])

    def forward(self, x: Tensor, skip: int) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number != skip:
                x = x + block(x).tanh()
        return x


def drop(zero: int, gather: str) -> float | str:
    return train(init_mesh("2x1x1", device_type="cpu"), zero, gather)


def run_out_of_time(file: str) -> float | str:
    torch.distributed.destroy_process_group()
    mesh = init_mesh("2x1x1", device_type="cpu", init_method=f"file://{file}", timeout_s=3)
    return train(mesh, 3, "block")


def train(mesh: Mesh, zero: int, gather: str) -> float | str:
    """The largest difference of a parameter from one process after three steps, or the error."""
    torch.manual_seed(0)
    alone = Dropping().double()
    model = parallax.data_parallel(copy.deepcopy(alone), mesh, zero=zero, gather=gather, bucket_bytes=64)
    optimizer = parallax.optimizer(model, torch.optim.SGD, lr=0.1)
    plain = torch.optim.SGD(alone.parameters(), lr=0.1)
    try:
        for _ in range(3):
            batches = torch.rand(2, 6, 4, dtype=torch.float64)
            for rank in range(2):
                (alone(batches[rank], 1 + rank).square().mean() / 2).backward()
            model(batches[mesh.rank], 1 + mesh.rank).square().mean().backward()
            for each in (optimizer, plain):
                each.step()
                each.zero_grad()
    except RuntimeError as error:
        time.sleep(1)  # the other rank must find out by itself
        return "\n".join([str(error), *getattr(error, "__notes__", [])])
    state = model.state_dict()
    return max(float((values - state[name]).abs().max()) for name, values in alone.state_dict().items())


@pytest.mark.parametrize(("zero", "gather"), [(0, "block"), (1, "block"), (2, "block"), (3, "step")])
def test_ranks_may_run_other_blocks(ranks, zero: int, gather: str):
    assert max(ranks(2, drop, zero, gather)) <= 1e-12


def test_level_3_is_told_that_ranks_run_other_blocks(ranks):
    for told in ranks(2, drop, 3, "block"):
        assert "ranks made different calls: rank 0" in told and "use gather=step or zero=2" in told
        assert "blocks.2." in told and "blocks.3." in told, "what each was about to reduce"


def test_level_3_over_sockets_runs_out_of_time_and_says_why(ranks, tmp_path: Path):
    for told in ranks(2, over_sockets, run_out_of_time, str(tmp_path / "meet"), timeout_s=40):
        assert "with it were gathered. With zero=3 all ranks must run the same blocks" in told, told
