"""Mesh arithmetic, on asymmetric meshes: a symmetric one cannot show a swapped axis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.errors import MeshError
from parallax.mesh import MeshShape, init_mesh

SIZES = st.integers(1, 4)
SHAPES = st.builds(MeshShape, pipeline=SIZES, data=SIZES, context=SIZES, tensor=SIZES)
NAMES = {"data": "dp", "tensor": "tp", "pipeline": "pp", "context": "cp"}


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("2x3x4", MeshShape(data=2, tensor=3, pipeline=4)),
        (" 2X3X4 ", MeshShape(data=2, tensor=3, pipeline=4)),
        ("1x1x1", MeshShape()),
        ("tensor4", MeshShape(tensor=4)),
        ("pipeline2xdata3", MeshShape(data=3, pipeline=2)),
        ("dp2xtp4xpp3xcp2xep4", MeshShape(data=2, tensor=4, pipeline=3, context=2, expert=4)),
        ("data2xtensor4xpipeline2xcontext2xexpert4", MeshShape(2, 2, 2, 4, 4)),
        ("context3xpp2", MeshShape(pipeline=2, context=3)),
    ],
)
def test_both_forms_are_read(text: str, shape: MeshShape):
    assert MeshShape.parse(text) == shape
    assert MeshShape.parse(shape) is shape


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2x2", r"has 2 sizes; write three, data x tensor x pipeline \(mesh=2x2x2\), or name them"),
        ("2x2x2x2", "has 4 sizes; write three"),
        ("0x1x1", "axis data has size 0; every size is an integer of at least 1"),
        ("2x-1x1", "axis tensor has size -1; every size is an integer of at least 1"),
        ("model2", "'model2' is not an axis.*the axes are data, tensor, pipeline, context, expert"),
        ("data2xdata2", "names data twice; give each axis once"),
        ("dp2xdata2", "names data twice; give each axis once"),
        ("2.5x1x1", "is not an axis with its size; the axes are .* as in mesh=data2xtensor4xpipeline2"),
        ("", "is not an axis with its size; the axes are"),
        ("data", "is not an axis with its size; the axes are"),
        ("data2xexpert3", "expert=3 does not divide data x context = 2; .* choose a divisor"),
    ],
)
def test_what_is_no_mesh_gets_the_fix(text: str, message: str):
    with pytest.raises(MeshError, match=message):
        MeshShape.parse(text)


def test_sizes_are_integers():
    with pytest.raises(MeshError, match="data has size 2.0"):
        MeshShape(data=2.0)  # type: ignore[arg-type]
    with pytest.raises(MeshError, match="data has size True"):
        MeshShape(data=True)


@pytest.mark.parametrize(
    ("text", "table"),
    [
        # (pipeline, data, tensor) of rank 0, 1, 2, ...
        ("3x2x1", [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (0, 2, 0), (0, 2, 1)]),
        ("1x2x3", [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1)]),
        ("1x2x4", [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 0, 1), (3, 0, 0), (3, 0, 1)]),
        ("2x1x3", [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)]),
    ],
)
def test_pipeline_is_outermost_and_tensor_innermost(text: str, table: list[tuple[int, int, int]]):
    shape = MeshShape.parse(text)
    found = [tuple(shape.coords(rank)[a] for a in ("pipeline", "data", "tensor")) for rank in range(shape.size)]
    assert found == table


def test_context_lies_between_data_and_tensor():
    shape = MeshShape.parse("data2xcontext2xtensor2")
    assert shape.peers(0, "tensor") == (0, 1)
    assert shape.peers(0, "context") == (0, 2)
    assert shape.peers(0, "data") == (0, 4)
    assert shape.peers(0, "data", "context") == (0, 2, 4, 6)


@given(SHAPES)
def test_coordinates_and_ranks_are_inverse(shape: MeshShape):
    for rank in range(shape.size):
        coords = shape.coords(rank)
        assert shape.rank_at(coords) == rank
        assert all(0 <= index < shape.axis_size(axis) for axis, index in coords.items())


@given(SHAPES, st.sets(st.sampled_from(["pipeline", "data", "context", "tensor"])))
def test_groups_partition_the_ranks(shape: MeshShape, axes: set[str]):
    groups = shape.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(shape.size))
    for group in groups:
        assert list(group) == sorted(group)
        for rank in group:
            assert shape.peers(rank, *axes) == group
        fixed = [a for a in ("pipeline", "data", "context", "tensor") if a not in axes]
        assert all(len({shape.coords(rank)[a] for rank in group}) == 1 for a in fixed)


@given(st.permutations(list(NAMES)), st.lists(st.tuples(SIZES, st.booleans()), max_size=4))
def test_the_named_form_is_read_in_any_order_and_subset(order: list[str], chosen: list[tuple[int, bool]]):
    named = list(zip(order, chosen, strict=False))
    text = "x".join(f"{NAMES[axis] if short else axis}{size}" for axis, (size, short) in named)
    if named:
        assert MeshShape.parse(text) == MeshShape(**{axis: size for axis, (size, _) in named})


@given(SHAPES)
def test_text_reads_back(shape: MeshShape):
    assert MeshShape.parse(str(shape)) == shape


def test_a_rank_outside_is_refused():
    with pytest.raises(MeshError, match=r"rank 6 is outside the mesh of 6 ranks \(0 to 5\)"):
        MeshShape.parse("3x2x1").coords(6)


def test_it_is_described_with_names():
    assert MeshShape.parse("2x3x4").describe() == "data=2 tensor=3 pipeline=4 (24 ranks)"
    assert MeshShape().describe() == "data=1 tensor=1 pipeline=1 (1 rank)"
    assert MeshShape.parse("cp2").describe() == "data=1 tensor=1 pipeline=1 context=2 (2 ranks)"


@pytest.mark.parametrize(
    ("mesh", "world", "message"),
    [
        ("2x2x4", 8, "mesh=2x2x4 needs 16 ranks, torchrun started 8; start 16 .* or choose sizes that multiply to 8"),
        ("2x1x1", 1, "needs 2 ranks, there is 1; start 2"),
        ("2x1x1", 3, "needs 2 ranks, torchrun started 3; start 2 .* or choose sizes that multiply to 3"),
        ("1x1x1", 2, "needs 1 ranks, torchrun started 2"),
        ("cp2", 2, "context=2 is not supported yet"),
        ("data2xexpert2", 2, "expert=2 is not supported yet"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_any_rendezvous(mesh: str, world: int, message: str):
    with pytest.raises(MeshError, match=message):
        init_mesh(mesh, device_type="cpu", rank=0, world_size=world)


def test_axes_and_coordinates_that_are_not_there_are_refused():
    shape = MeshShape.parse("2x2x1")
    for call, message in [
        (lambda: shape.peers(0, "dta"), "'dta' is no axis of ranks; those are pipeline, data, context, tensor"),
        (lambda: shape.groups("dp"), "'dp' is no axis"),
        (lambda: shape.rank_at({"data": 5}), "data=5 is outside the mesh, whose data is 2"),
        (lambda: shape.rank_at({"model": 0}), "'model' is no axis"),
    ]:
        with pytest.raises(MeshError, match=message):
            call()
