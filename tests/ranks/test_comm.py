"""Each collective against arithmetic on one rank, with the bytes that its docstring promises."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from parallax import comm
from parallax.mesh import Axis, Mesh, init_mesh

ROWS, COLUMNS = 12, 5  # 12 divides by 2, 3 and 4


def values(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(rank)).to(dtype)


def every_collective(mesh_name: str, dtype: torch.dtype) -> dict[str, Any]:
    mesh = init_mesh(mesh_name, device_type="cpu")
    axis, mine = mesh.tensor, values(mesh.tensor.rank, dtype)
    found: dict[str, Any] = {
        "all_reduce": comm.all_reduce(mine.clone(), axis),
        "max": comm.all_reduce(mine.clone(), axis, "max"),
        "all_gather": comm.all_gather(mine, axis),
        "reduce_scatter": comm.reduce_scatter(mine, axis),
        "broadcast": comm.broadcast(mine.clone(), axis, source=1),
        "input": mine,
    }
    if axis.rank < 2:
        found["exchange"] = comm.exchange_sum(mine.clone(), axis, 1 - axis.rank)
    # Pieces of a gathered text have different lengths.
    found["json"] = comm.gather_json({"rank": axis.rank, "text": "é" * axis.rank}, axis, mesh.device)
    del axis.traffic["all_gather"]
    comm.all_gather(mine, axis)
    return found | {"traffic": dict(axis.traffic), "rank": axis.rank}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives_are_what_they_say(ranks, size: int, dtype: torch.dtype):
    every = ranks(size, every_collective, f"1x{size}x1", dtype)
    inputs = torch.stack([values(rank, dtype) for rank in range(size)])
    exact = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    nbytes = ROWS * COLUMNS * dtype.itemsize
    for rank, found in enumerate(every):
        assert torch.equal(found["input"], values(rank, dtype)), "inputs are left alone"
        torch.testing.assert_close(found["all_reduce"], inputs.sum(0), **exact)
        assert torch.equal(found["max"], inputs.amax(0))
        assert torch.equal(found["all_gather"], inputs.flatten(0, 1))
        step = ROWS // size
        torch.testing.assert_close(found["reduce_scatter"], inputs.sum(0)[rank * step : (rank + 1) * step], **exact)
        assert torch.equal(found["broadcast"], inputs[1])
        assert found["json"] == [{"rank": r, "text": "é" * r} for r in range(size)]
        sent = found["traffic"]
        assert sent["all_reduce"] == 2 * (2 * (size - 1) * nbytes // size)
        assert sent["all_gather"] == (size - 1) * nbytes
        assert sent["reduce_scatter"] == (size - 1) * nbytes // size
        assert sent.get("broadcast", 0) == ((size - 1) * nbytes if rank == 1 else 0)
        assert sent.get("exchange", 0) == (nbytes if rank < 2 else 0)
    assert torch.equal(every[0]["exchange"], every[1]["exchange"]), "the same bits on both"
    torch.testing.assert_close(every[0]["exchange"], inputs[0] + inputs[1], **exact)


def test_on_one_rank_every_collective_is_the_identity_and_sends_nothing():
    axis = Axis("tensor")
    x = torch.randn(4, 3)
    assert comm.all_reduce(x, axis) is x
    assert comm.all_gather(x, axis) is x
    assert comm.reduce_scatter(x, axis) is x
    assert comm.broadcast(x, axis) is x
    assert comm.gather_json({"a": [1]}, axis, x.device) == [{"a": [1]}]
    assert not axis.traffic


def describe_mesh(name: str) -> dict[str, Any]:
    mesh = init_mesh(name, device_type="cpu")

    def sum_of_ranks(axis: Axis) -> int:
        return int(comm.all_reduce(torch.tensor([mesh.rank]), axis))

    axes = {"data": mesh.data, "tensor": mesh.tensor, "pipeline": mesh.pipeline, "grad": mesh.grad}
    return {
        "label": mesh.label,
        "sums": {n: sum_of_ranks(a) for n, a in axes.items()},
        "ranks": {n: a.ranks for n, a in axes.items()},
        "groups": {n: a.group is None for n, a in axes.items()},
        "torch": torch_says(mesh),
    }


def torch_says(mesh: Mesh) -> dict[str, list[int]]:
    import torch.distributed as dist

    return {
        name: dist.get_process_group_ranks(mesh.device_mesh.get_group(name)) for name in ("data", "tensor", "pipeline")
    }


@pytest.mark.parametrize("name", ["3x2x1", "1x2x3", "2x1x3"])
def test_groups_join_the_ranks_of_an_axis(ranks, name: str):
    """Asymmetric meshes, so that a swapped axis shows; torch's own DeviceMesh says the same."""
    every = ranks(6, describe_mesh, name)
    data, tensor, pipeline = map(int, name.split("x"))
    for rank, found in enumerate(every):
        p, rest = divmod(rank, data * tensor)
        d, t = divmod(rest, tensor)
        assert found["label"] == f"[rank {rank} pipeline{p} data{d} tensor{t}]"
        peers = {
            "data": [(p * data + i) * tensor + t for i in range(data)],
            "tensor": [(p * data + d) * tensor + i for i in range(tensor)],
            "pipeline": [(i * data + d) * tensor + t for i in range(pipeline)],
        }
        for axis, members in peers.items():
            assert list(found["ranks"][axis]) == members == found["torch"][axis]
            assert found["sums"][axis] == sum(members)
            assert found["groups"][axis] == (len(members) == 1), "an axis of one rank has no group"
        assert found["ranks"]["grad"] == found["ranks"]["data"]


LAYOUTS = {
    "slice": lambda x: x.flatten()[::2],
    "columns": lambda x: x[:, 1:4],
    "transposed": lambda x: x.t(),
    "expanded": lambda x: x[:, :1].expand(ROWS, 1000),
    "0-d": lambda x: x[3, 2],
    "empty": lambda x: x[:0],
    "one of every two": lambda x: x.flatten()[::2][:1],
    "conjugate": lambda x: torch.complex(x, -x).conj(),
    "negated": lambda x: torch.complex(x, x).conj().imag,
    "int16": lambda x: (x * 100).to(torch.int16),
    "uint16": lambda x: (x * 100).abs().to(torch.uint16),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "bool": lambda x: x > 0,
}
"""Views of memory that has more before, between and after their elements; dtypes that gloo has not heard of."""


def of_any_layout(shared: str) -> dict[str, Any]:
    os.environ["PARALLAX_SHARED_MEMORY"] = shared
    mesh = init_mesh("2x1x1", device_type="cpu")
    axis, found = mesh.data, {}
    for name, view in LAYOUTS.items():
        sent = comm.broadcast(view(values(axis.rank, torch.float64)), axis, source=1)
        found[name] = sent.resolve_conj().to(torch.complex64)  # numbers of any dtype, which any pickle can hold
    for name in ("slice", "columns", "transposed", "negated"):
        memory = values(axis.rank, torch.float64)
        found[f"sum {name}"] = comm.all_reduce(LAYOUTS[name](memory), axis).clone()
        found[f"memory {name}"] = memory
        found[f"gather {name}"] = comm.all_gather(LAYOUTS[name](values(axis.rank, torch.float64)), axis)
        swapped = LAYOUTS[name](values(axis.rank, torch.float64))
        found[f"exchange {name}"] = comm.exchange(swapped, axis, 1 - axis.rank).clone()
    return found


@pytest.mark.parametrize("shared", ["0", "1"])
def test_what_is_sent_are_the_elements_whatever_the_strides_and_the_dtype(ranks, shared: str):
    inputs = [values(rank, torch.float64) for rank in range(2)]
    for rank, found in enumerate(ranks(2, of_any_layout, shared)):
        for name, view in LAYOUTS.items():
            assert found[name].equal(view(inputs[1]).resolve_conj().to(torch.complex64)), name
        for name in ("slice", "columns", "transposed", "negated"):
            views = [LAYOUTS[name](x) for x in inputs]
            assert found[f"sum {name}"].equal(views[0] + views[1]), name
            assert found[f"gather {name}"].equal(torch.cat(views)), name
            assert found[f"exchange {name}"].equal(views[1 - rank]), name
        # What lies between the elements is left alone.
        assert found["memory slice"].flatten()[1::2].equal(inputs[rank].flatten()[1::2])
        assert found["memory columns"][:, 0].equal(inputs[rank][:, 0])


def test_a_gather_into_strides_is_an_error(ranks):
    assert all("out has strides (1, 12)" in text for text in ranks(2, gather_into_strides))


def gather_into_strides() -> str:
    axis = init_mesh("2x1x1", device_type="cpu").data
    with pytest.raises(ValueError) as error:
        comm.all_gather_start(torch.ones(6, 5), axis, out=torch.empty(5, 12).t())
    return str(error.value)
