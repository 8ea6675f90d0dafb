"""The mesh of ranks: `MeshShape` is arithmetic only; `Axis`, `Mesh` and `init_mesh` are live.

Ranks are laid out pipeline outermost, then data, then context, tensor innermost, so that tensor
peers are neighbours on the fastest link:

    rank = ((pipeline * D + data) * C + context) * T + tensor

torch is imported by `init_mesh` alone, so that planners and schedules can use the arithmetic
without it.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from parallax.errors import MeshError
from parallax.shared_memory import Board, share

if TYPE_CHECKING:
    import torch

__all__ = ["Axis", "Mesh", "MeshShape", "cut_axis", "init_mesh", "planned_mesh"]

# Outermost first. `expert` is no axis of ranks: it refolds data x context for expert weights.
RANK_AXES = ("pipeline", "data", "context", "tensor")
POSITIONAL = ("data", "tensor", "pipeline")
SHORT = {"dp": "data", "tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert"}
DEFAULT_TIMEOUT_S = 600.0
SLOT_BYTES = {"tensor": 1 << 20, "data": 1 << 20, "pipeline": 1 << 16, "world": 1 << 16}
"""Of shared memory on one machine, twice a rank: for activations and gradients, and for the few numbers of the rest."""


@dataclass(frozen=True, slots=True)
class MeshShape:
    """Sizes of the axes, and which rank sits where. Pure arithmetic.

    >>> MeshShape.parse("2x4x3")
    MeshShape(pipeline=3, data=2, context=1, tensor=4, expert=1)
    """

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for f in fields(self):
            size = getattr(self, f.name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise MeshError(f"mesh axis {f.name} has size {size!r}; every size is an integer of at least 1")
        if (self.data * self.context) % self.expert:
            raise MeshError(
                f"expert={self.expert} does not divide data x context = {self.data * self.context}; "
                "expert parallelism refolds those ranks, so choose a divisor"
            )

    @classmethod
    def parse(cls, text: str | MeshShape) -> MeshShape:
        """Read `2x2x2` (data x tensor x pipeline) or `data2xtensor4`, `dp2xtp4`, in any order and subset.

        Raises MeshError for anything else, with the form that is expected.
        """
        if isinstance(text, MeshShape):
            return text
        parts = re.split(r"(?<=\d)x", str(text).strip().lower())  # an x after a size: context and expert have one too
        if all(re.fullmatch(r"[+-]?\d+", part) for part in parts):
            if len(parts) != len(POSITIONAL):
                raise MeshError(
                    f"mesh={text} has {len(parts)} sizes; write three, data x tensor x pipeline (mesh=2x2x2), "
                    "or name them (mesh=data2xtensor4)"
                )
            return cls(**dict(zip(POSITIONAL, map(int, parts), strict=True)))
        sizes: dict[str, int] = {}
        for part in parts:
            match = re.fullmatch(r"([a-z]+)([+-]?\d+)", part)
            name = match and SHORT.get(match[1], match[1])
            if not match or name not in RANK_AXES + ("expert",):
                raise MeshError(
                    f"mesh={text}: {part!r} is not an axis with its size; the axes are data, tensor, pipeline, "
                    "context, expert (dp, tp, pp, cp, ep), as in mesh=data2xtensor4xpipeline2"
                )
            if name in sizes:
                raise MeshError(f"mesh={text} names {name} twice; give each axis once")
            sizes[str(name)] = int(match[2])
        return cls(**sizes)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return math.prod(getattr(self, axis) for axis in RANK_AXES)

    def axis_size(self, axis: str) -> int:
        return int(getattr(self, axis))

    def coords(self, rank: int) -> dict[str, int]:
        """Mesh coordinates of a rank, by axis name, outermost first."""
        if not 0 <= rank < self.size:
            raise MeshError(f"rank {rank} is outside the mesh of {self.size} ranks (0 to {self.size - 1})")
        coords: dict[str, int] = {}
        for axis in reversed(RANK_AXES):
            rank, coords[axis] = divmod(rank, self.axis_size(axis))
        return {axis: coords[axis] for axis in RANK_AXES}

    def rank_at(self, coords: Mapping[str, int]) -> int:
        """The rank at these coordinates; an axis not named counts as 0."""
        _check_axes(coords)
        rank = 0
        for axis in RANK_AXES:
            if not 0 <= coords.get(axis, 0) < self.axis_size(axis):
                raise MeshError(f"{axis}={coords[axis]} is outside the mesh, whose {axis} is {self.axis_size(axis)}")
            rank = rank * self.axis_size(axis) + coords.get(axis, 0)
        return rank

    def peers(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` only along `axes`, in ascending order; `rank` is among them."""
        _check_axes(axes)
        coords = self.coords(rank)
        free = [range(self.axis_size(a)) if a in axes else (coords[a],) for a in RANK_AXES]
        return tuple(self.rank_at(dict(zip(RANK_AXES, point, strict=True))) for point in itertools.product(*free))

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """Every group of peers along `axes`, ordered by its first rank."""
        return sorted({self.peers(rank, *axes) for rank in range(self.size)})

    def describe(self) -> str:
        """`data=2 tensor=2 pipeline=2 (8 ranks)`: the three axes always, the others when above 1."""
        shown = [a for a in (*POSITIONAL, "context", "expert") if a in POSITIONAL or self.axis_size(a) > 1]
        ranks = "1 rank" if self.size == 1 else f"{self.size} ranks"
        return " ".join(f"{a}={self.axis_size(a)}" for a in shown) + f" ({ranks})"

    def __str__(self) -> str:
        if self.context == self.expert == 1:
            return f"{self.data}x{self.tensor}x{self.pipeline}"
        named = [f.name for f in fields(self) if self.axis_size(f.name) > 1]
        return "x".join(f"{a}{self.axis_size(a)}" for a in named)


def _check_axes(names: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in RANK_AXES]:
        raise MeshError(f"{unknown[0]!r} is no axis of ranks; those are {', '.join(RANK_AXES)}")


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One axis as a rank sees it: its peers along that axis, and its place among them.

    `group` is None exactly when size is 1; collectives are then the identity. `ranks` are global.
    `traffic` counts the bytes that comm.py sent for this axis, by kind of collective. `board`: memory that the ranks
    share, where they are on one machine's CPUs. `joined`: the models that follow uneven batches over it (wrap.py).
    """

    name: str
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: Any = None
    backend: str = ""
    traffic: Counter[str] = field(default_factory=Counter)
    board: Board | None = None
    joined: list[Any] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def __repr__(self) -> str:
        return f"Axis({self.name}, {self.rank} of {self.size})"


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """The live mesh of one rank. Passed to whoever needs it; there is no global one.

    pipeline_up carries what travels to lower pipeline ranks: two directions, two channels, because
    NCCL matches by order of posting and one ordered channel per pair of ranks can deadlock 1F1B.
    grad is data x context: the ranks that sum a dense gradient.
    """

    shape: MeshShape
    rank: int
    device: torch.device
    pipeline: Axis
    pipeline_up: Axis
    data: Axis
    context: Axis
    tensor: Axis
    expert: Axis
    grad: Axis
    world: Axis

    @property
    def coords(self) -> dict[str, int]:
        return self.shape.coords(self.rank)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (self.pipeline, self.pipeline_up, self.data, self.context, self.tensor, self.grad, self.world)

    @property
    def label(self) -> str:
        """`[rank 5 pipeline1 data0 tensor1]`: how a rank signs its log lines."""
        named = [f"{a}{i}" for a, i in self.coords.items() if a != "context" or self.shape.context > 1]
        return f"[rank {self.rank} {' '.join(named)}]"

    def traffic(self) -> dict[str, dict[str, int]]:
        """Bytes sent by this rank so far, by axis and kind, point-to-point included."""
        counted: dict[str, Counter[str]] = {}
        for axis in {id(a.traffic): a for a in self.axes}.values():
            name = "pipeline" if axis.name == "pipeline_up" else axis.name
            counted.setdefault(name, Counter()).update(axis.traffic)
        return {name: dict(kinds) for name, kinds in counted.items() if kinds}

    @property
    def device_mesh(self) -> Any:
        """The same ranks as a torch DeviceMesh, for torch's own tools. Imports DTensor's machinery: seconds."""
        from torch.distributed.device_mesh import init_device_mesh

        sizes = tuple(self.shape.axis_size(a) for a in RANK_AXES)
        return init_device_mesh(self.device.type, sizes, mesh_dim_names=RANK_AXES)


def init_mesh(
    mesh: str | MeshShape = "1x1x1",
    *,
    device_type: str = "auto",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Mesh:
    """Join the processes and build this rank's mesh. Without a launcher it is the mesh of one process.

    mesh: `2x2x2`, the named form, or a MeshShape. device_type: `auto` (cuda if there is one), `cpu`, `cuda`.
    rank, world_size and init_method default to what torchrun puts in the environment.
    Collectives: the rendezvous, and one group per axis above size 1. On an axis of size 1 there is no group.
    Raises MeshError, on every rank alike and before any rendezvous, when the sizes do not multiply to the ranks.
    """
    shape = MeshShape.parse(mesh)
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    started = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
    if shape.size != started:
        raise MeshError(
            f"mesh={mesh} needs {shape.size} ranks, {'torchrun started' if started > 1 else 'there is'} {started}; "
            f"start {shape.size} (torchrun --nproc_per_node {shape.size} ...) or choose sizes that multiply to "
            f"{started}"
        )
    for axis in ("context", "expert"):
        if shape.axis_size(axis) > 1:
            raise MeshError(f"mesh axis {axis}={shape.axis_size(axis)} is not supported yet; leave {axis} at 1")
    device = _device(device_type, rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if shape.size > 1:
        _init_process_group(backend, device, rank, started, timeout_s, init_method)
    return _build(shape, rank, device, backend, timeout_s)


def planned_mesh(mesh: str | MeshShape, rank: int) -> Mesh:
    """The mesh as `rank` would see it, for plans: there are no other processes, so no axis above 1 can talk."""
    import torch

    return _build(MeshShape.parse(mesh), rank, torch.device("cpu"), "", live=False)


def _device(device_type: str, rank: int) -> torch.device:
    import torch

    if device_type == "auto":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    if device_type == "cpu":
        return torch.device("cpu")
    if device_type != "cuda":
        raise MeshError(f"device={device_type} is unknown; use auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise MeshError("device=cuda, but torch sees no CUDA device here; use device=cpu or device=auto")
    local_rank = int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count()
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _init_process_group(
    backend: str, device: torch.device, rank: int, world_size: int, timeout_s: float, init_method: str | None
) -> None:
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return
    # gloo connects pairs on first use; eager full meshes cost 20 times as much per group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    timeout = timedelta(seconds=timeout_s)
    if init_method is not None:
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=timeout)
        return
    # torchelastic's agent keeps one store across restarts; keys of the dead attempt would be read as
    # live addresses, so each attempt has a namespace of its own.
    store, rank, world_size = next(iter(rendezvous("env://", rank, world_size, timeout=timeout)))
    prefix = f"parallax/attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    dist.init_process_group(
        backend, store=PrefixStore(prefix, store), rank=rank, world_size=world_size, timeout=timeout
    )


def _build(
    shape: MeshShape,
    rank: int,
    device: torch.device,
    backend: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    *,
    live: bool = True,
) -> Mesh:
    def axis(name: str, *over: str, ranks: tuple[int, ...] | None = None) -> Axis:
        peers = ranks or shape.peers(rank, *over)
        group = None
        if live and math.prod(shape.axis_size(a) for a in over) > 1:
            group = _new_group(shape, over, rank)
        board = share(group, rank, peers, SLOT_BYTES.get(name, 0), timeout_s) if backend == "gloo" else None
        return Axis(name, peers.index(rank), peers, group, backend, board=board)

    data = axis("data", "data")
    # With context at 1 the ranks that sum a gradient are the data peers: one group serves both.
    grad = data if shape.context == 1 else axis("grad", "data", "context")
    pipeline = axis("pipeline", "pipeline")
    # gloo matches by tag, so one group is two channels already; NCCL needs a communicator per direction.
    up = pipeline if backend == "gloo" else axis("pipeline_up", "pipeline")
    everyone = tuple(range(shape.size))
    world = _world_group(shape) if live else None
    board = share(world, rank, everyone, SLOT_BYTES["world"], timeout_s) if backend == "gloo" else None
    return Mesh(
        shape=shape,
        rank=rank,
        device=device,
        pipeline=pipeline,
        pipeline_up=up,
        data=data,
        context=axis("context", "context"),
        tensor=axis("tensor", "tensor"),
        expert=Axis("expert", 0, (rank,)),
        grad=grad,
        world=Axis("world", rank, everyone, world, backend, board=board),
    )


def cut_axis(mesh: Mesh, axis: Axis, over: tuple[str, ...], size: int) -> tuple[Axis, Axis]:
    """Cut an axis into runs of `size` neighbours: the run that this rank is in, and its peers at the same place of the
    others. over: the mesh axes that `axis` goes along. Collectives: makes groups, so every rank must call it.
    Raises MeshError where size does not divide the axis.
    """
    if axis.size % size:
        raise MeshError(f"{axis.name} has {axis.size} ranks, {size} does not divide them; choose a divisor")
    if size in (1, axis.size):
        alone = Axis(f"{axis.name}_alone", 0, (mesh.rank,), None, axis.backend)
        return (alone, axis) if size == 1 else (axis, alone)
    runs = [ranks[at : at + size] for ranks in mesh.shape.groups(*over) for at in range(0, axis.size, size)]
    rows = [ranks[at::size] for ranks in mesh.shape.groups(*over) for at in range(size)]

    def mine(name: str, groups: list[tuple[int, ...]]) -> Axis:
        import torch.distributed as dist

        made = {ranks: dist.new_group(list(ranks)) for ranks in groups}
        ranks = next(ranks for ranks in groups if mesh.rank in ranks)
        return Axis(name, ranks.index(mesh.rank), ranks, made[ranks], axis.backend)

    return mine(f"{axis.name}_shard", runs), mine(f"{axis.name}_replica", rows)


def _world_group(shape: MeshShape) -> Any:
    if shape.size == 1:
        return None
    import torch.distributed as dist

    return dist.group.WORLD


def _new_group(shape: MeshShape, over: tuple[str, ...], rank: int) -> Any:
    """Create every group along `over` (all ranks must take part) and return the one that holds `rank`."""
    import torch.distributed as dist

    mine = None
    for ranks in shape.groups(*over):
        if len(ranks) == shape.size:
            return dist.new_group(list(ranks)) if dist.get_backend() == "nccl" else dist.group.WORLD
        group = dist.new_group(list(ranks))
        if rank in ranks:
            mine = group
    return mine
