"""Collectives through shared memory: the same values as sums in rank order, no race, nothing left, nobody hangs."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from parallax import comm, shared_memory
from parallax.mesh import init_mesh
from tests.ranks.workers import RankFailure

SIZES = (1, 7, 64, 1000, 262_144, 262_145, 700_001)  # a slot holds 262144 floats


def values(rank: int, size: int, number: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * number + rank))


def in_rank_order(n: int, size: int, number: int = 0) -> torch.Tensor:
    total = values(0, size, number)
    for rank in range(1, n):
        total = total + values(rank, size, number)
    return total


def all_kinds(n: int) -> bool:
    mesh = init_mesh(f"1x{n}x1", device_type="cpu")
    axis, r = mesh.tensor, mesh.tensor.rank
    assert axis.board is not None and mesh.world.board is not None
    for size in SIZES:
        expected = in_rank_order(n, size)
        assert comm.all_reduce(values(r, size), axis).equal(expected)
        most = torch.stack([values(i, size) for i in range(n)]).amax(0)
        assert comm.all_reduce(values(r, size), axis, "max").equal(most)
        wide = values(r, size).view(-1, 1).expand(-1, 3)  # not contiguous
        assert comm.all_gather(wide, axis).equal(torch.cat([values(i, size) for i in range(n)])[:, None].expand(-1, 3))
        whole = comm.reduce_scatter(values(r, n * size).view(n * size, 1), axis)
        assert whole.equal(in_rank_order(n, n * size)[r * size : (r + 1) * size, None])
        assert comm.broadcast(values(r, size), axis, n - 1).equal(values(n - 1, size))
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        mine = (values(r, 500) * 8).to(dtype)
        total = (values(0, 500) * 8).to(dtype)
        for i in range(1, n):
            total = total + (values(i, 500) * 8).to(dtype)
        assert comm.all_reduce(mine, axis).equal(total)
    texts = comm.gather_json({"rank": r, "text": "é" * 3000 * r}, mesh.world, mesh.device)
    assert [one["rank"] for one in texts] == list(range(n)) and texts[-1]["text"] == "é" * 3000 * (n - 1)
    return not list(Path("/dev/shm").glob(f"parallax-*{os.getpid()}*"))


@pytest.mark.parametrize("n", [2, 3, 6])
def test_every_collective(ranks, n: int):
    before = set(Path("/dev/shm").iterdir())
    assert all(ranks(n, all_kinds, n))
    assert set(Path("/dev/shm").iterdir()) <= before, "its name is gone before the first use"


def race(n: int, rounds: int) -> bool:
    """Ranks that come late at random places, and collectives back to back."""
    mesh = init_mesh(f"1x{n}x1", device_type="cpu")
    dice = random.Random(mesh.rank)
    for number in range(rounds):
        size = (5, 3000, 270_000)[number % 3]
        if dice.random() < 0.1:
            time.sleep(dice.random() * 0.003)
        found = comm.all_reduce(values(mesh.rank, size, number), mesh.tensor)
        if dice.random() < 0.1:
            time.sleep(dice.random() * 0.003)
        assert found.equal(in_rank_order(n, size, number)), number
        gathered = comm.all_gather(torch.tensor([number * n + mesh.rank]), mesh.tensor)
        assert gathered.tolist() == [number * n + i for i in range(n)], number
    return True


@pytest.mark.parametrize("n", [2, 5])
def test_no_race(ranks, n: int):
    assert all(ranks(n, race, n, 300))


def lose_one(n: int) -> Any:
    mesh = init_mesh(f"1x{n}x1", device_type="cpu")
    comm.all_reduce(torch.ones(3), mesh.tensor)
    if mesh.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        comm.all_reduce(torch.ones(3), mesh.tensor)
    except RuntimeError as error:
        assert time.monotonic() - begun < 5
        raise RuntimeError(f"told: {error}") from None
    return "it must not get here"


def test_a_dead_rank_is_named(ranks):
    with pytest.raises(RankFailure) as failure:
        ranks(3, lose_one, 3)
    assert "told: rank 1 (process" in str(failure.value) and "has ended while rank" in str(failure.value)


def end_while_sharing(token: str) -> None:
    honest = os.open

    def end(path: Any, *rest: Any, **options: Any) -> int:
        if token in str(path) and os.environ["RANK"] == "1":
            os._exit(9)
        return honest(path, *rest, **options)

    os.open = end
    shared_memory.secrets.token_hex = lambda size: token
    init_mesh("2x1x1", device_type="cpu")


def test_a_rank_that_ends_while_memory_is_shared_leaves_no_file(ranks):
    token = f"test-{os.getpid()}"
    with pytest.raises(RankFailure):
        ranks(2, end_while_sharing, token)
    assert not list(Path("/dev/shm").glob(f"*{token}*"))


def without(n: int) -> Any:
    os.environ["PARALLAX_SHARED_MEMORY"] = "0"
    mesh = init_mesh(f"1x{n}x1", device_type="cpu")
    assert mesh.tensor.board is None and mesh.world.board is None
    found = comm.all_reduce(values(mesh.rank, 1000), mesh.tensor)
    dist.barrier()
    return found.equal(in_rank_order(n, 1000))


def test_sockets_are_the_other_way(ranks):
    assert all(ranks(2, without, 2))


def different(n: int) -> dict[str, str]:
    """What a rank is told that calls something else than the others; and that all goes on afterwards."""
    mesh = init_mesh(f"1x{n}x1", device_type="cpu")
    axis, odd = mesh.tensor, mesh.rank == 1
    calls = {
        "size": lambda: comm.all_gather(torch.ones(4 if odd else 2), axis),
        "long": lambda: comm.all_reduce(torch.ones(400_000 if odd else 200), axis),
        "dtype": lambda: comm.all_reduce(torch.ones(4, dtype=torch.float64 if odd else torch.float32), axis),
        "operation": lambda: comm.broadcast(torch.ones(4), axis) if odd else comm.all_reduce(torch.ones(4), axis),
        "source": lambda: comm.broadcast(torch.ones(4), axis, int(odd)),
        "what it is": lambda: comm.reduce_scatter_start(torch.ones(2 * n), axis, "b" if odd else "a"),
    }
    told = {}
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="ranks made different calls") as error:
            call()
        told[name] = str(error.value)
        assert comm.all_reduce(torch.ones(3), axis).tolist() == [n] * 3
    return told


@pytest.mark.parametrize("n", [2, 6])
def test_ranks_that_make_different_calls_are_all_told(ranks, n: int):
    for rank, told in enumerate(ranks(n, different, n)):
        assert f"rank {0 if rank < 2 else rank} " in told["size"] and "rank 1 " in told["size"]
        assert "all-gather of 8 bytes of float32, rank 1 all-gather of 16 bytes" in told["size"] or rank > 1
        assert "of 800 bytes" in told["long"] and "of 1600000 bytes" in told["long"]
        assert "16 bytes of float32" in told["dtype"] and "32 bytes of float64" in told["dtype"]
        assert "all-reduce (sum) of" in told["operation"] and "broadcast from 0 of" in told["operation"]
        assert "broadcast from 0" in told["source"] and "broadcast from 1" in told["source"]
        assert "of float32, a" in told["what it is"] and "of float32, b" in told["what it is"]
