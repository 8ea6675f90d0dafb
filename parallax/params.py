"""ParamSpec: where each parameter lives and who reduces it. One table, read by the reducer, the norm,
the checkpoint and the initialisation.

A module says how its parameters are laid out in a class or instance attribute `layouts`, a mapping from
parameter name to `Layout` (or to several, for fused weights); what it does not mention is replicated.
`collect` turns a model into the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from parallax.errors import ConfigError
from parallax.mesh import Axis, Mesh
from parallax.rng import derive_key, fill_normal

__all__ = ["Box", "Init", "Layout", "ParamSpec", "collect", "even_cut", "fill"]

Box = tuple[tuple[int, int], ...]
"""(start, stop) along each dim of a global tensor: the one contiguous piece that a rank holds."""


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: a constant, or normal with this standard deviation around it."""

    mean: float = 0.0
    std: float = 0.0


@dataclass(frozen=True, slots=True)
class Layout:
    """One piece of a local parameter: which box of which global tensor its rows are.

    name: replaces the module's own name in the canonical name; None keeps it. A fused weight has one
    Layout per piece, stacked along dim 0: `attention.qkv.weight` is `attention.q.weight` and so on.
    shards: axis -> the one dim it cuts. box: None is the whole tensor.
    sum_over: axes besides data over which each rank's gradient is only a part of the sum.
    owned: this rank counts the piece in the norm; of several tensor ranks that hold the same box, one does.
    replicas: how many neighbouring tensor ranks hold the same box of a parameter that tensor cuts.
    tied_to: the canonical name of the parameter that this one must stay equal to. hidden: a matrix from activations to
    activations, not an embedding or a head.
    """

    global_shape: tuple[int, ...]
    box: Box | None = None
    name: str | None = None
    shards: Mapping[str, int] = field(default_factory=dict)
    sum_over: tuple[str, ...] = ()
    owned: bool = True
    init: Init = Init()
    decay: bool = True
    replicas: int = 1
    tied_to: str | None = None
    hidden: bool = False

    @property
    def rows(self) -> int:
        """How many rows (dim 0) of the local parameter this piece takes."""
        shape = self.box_shape
        return shape[0] if shape else 1

    @property
    def box_shape(self) -> tuple[int, ...]:
        return self.global_shape if self.box is None else tuple(stop - start for start, stop in self.box)


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One canonical parameter as this rank holds it.

    name: canonical, independent of mesh and stage. box: this rank's piece of the global tensor.
    parameter: the local nn.Parameter's name in the model; rows: its rows (dim 0) that hold the box, the
    box's other dims being the parameter's own. owned: whether this rank, among those that differ only in tensor and
    pipeline coordinate, counts the parameter in the norm and writes it (replicas do not).
    grad_axis: who sums the gradient; sum_over: axes to sum over before that.
    tensor_ranks: coordinates along tensor of the ranks that hold this very box.
    tied: a second use of the parameter of this name (an output head that shares the embedding), with a gradient
    of its own until the reduction. Its rank may or may not be the one that holds the first use. decay: whether weight
    decay is usual for it. hidden: as in Layout.
    """

    name: str
    global_shape: tuple[int, ...]
    shards: Mapping[str, int]
    grad_axis: Axis
    box: Box
    parameter: str
    rows: tuple[int, int]
    sum_over: tuple[str, ...] = ()
    owned: bool = True
    init: Init = Init()
    decay: bool = True
    hidden: bool = False
    tied: bool = False
    tensor_ranks: tuple[int, ...] = (0,)

    @property
    def box_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)

    def view(self, local: Tensor) -> Tensor:
        """The rows of a tensor shaped like the local parameter that belong to this box, without padding."""
        return local if not self.global_shape else local[self.rows[0] : self.rows[1]]


def even_cut(size: int, parts: int, index: int, what: str) -> tuple[int, int]:
    """The index-th of `parts` equal ranges of `size`. Raises ConfigError when it does not divide."""
    if size % parts:
        raise ConfigError(f"{what}={size} does not divide by tensor={parts}; choose a multiple of {parts}")
    step = size // parts
    return index * step, (index + 1) * step


def collect(model: nn.Module, mesh: Mesh) -> list[ParamSpec]:
    """The table of a model, in the model's own order. Raises ConfigError on a name that occurs twice."""
    specs: list[ParamSpec] = []
    shared: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in shared:  # one object under two names has the first one
                continue
            shared.add(parameter)
            specs += _pieces(module, module_name, name, parameter, mesh)
    seen: set[str] = set()
    for spec in specs:
        if spec.tied:
            continue
        if spec.name in seen:
            raise ConfigError(f"two parameters share the canonical name {spec.name}; give each module its own name")
        seen.add(spec.name)
    return specs


def _pieces(module: nn.Module, module_name: str, name: str, parameter: Tensor, mesh: Mesh) -> Iterator[ParamSpec]:
    said = getattr(module, "layouts", None)  # or something else of this name, of a module that knows nothing of it
    layouts = said.get(name) if isinstance(said, Mapping) else None
    if isinstance(layouts, Layout):
        layouts = (layouts,)
    if not isinstance(layouts, tuple) or not all(isinstance(layout, Layout) for layout in layouts):
        layouts = (Layout(tuple(parameter.shape), owned=mesh.tensor.rank == 0),)
    start = 0
    for layout in layouts:
        box = layout.box or tuple((0, size) for size in layout.global_shape)
        rows = box[0][1] - box[0][0] if box else 1
        owner = module_name
        first = mesh.tensor.rank // layout.replicas * layout.replicas
        holders = range(first, first + layout.replicas) if "tensor" in layout.shards else range(mesh.tensor.size)
        if layout.name is not None:
            owner = ".".join([*module_name.split(".")[:-1], layout.name])
        yield ParamSpec(
            name=layout.tied_to or (f"{owner}.{name}" if owner else name),
            global_shape=layout.global_shape,
            shards=layout.shards,
            grad_axis=mesh.grad,
            box=box,
            parameter=f"{module_name}.{name}" if module_name else name,
            rows=(start, start + rows),
            sum_over=tuple(a for a in layout.sum_over if mesh.shape.axis_size(a) > 1),
            owned=layout.owned and layout.tied_to is None,
            init=layout.init,
            decay=layout.decay,
            hidden=layout.hidden,
            tied=layout.tied_to is not None,
            tensor_ranks=tuple(holders),
        )
        start += rows


def fill(out: Tensor, piece: Layout | ParamSpec, seed: int, name: str) -> None:
    """Give `out`, of the shape of the piece's box, its initial values: a function of (seed, name, global element)."""
    box = piece.box or tuple((0, size) for size in piece.global_shape)
    if piece.init.std == 0 or out.numel() == 0:
        out.fill_(piece.init.mean)
    else:
        fill_normal(out, box, piece.global_shape, derive_key(seed, name), piece.init.mean, piece.init.std)
