"""Sharding a plain nn.Module along tensor by the names of its layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from parallax.comm import broadcast
from parallax.errors import ConfigError
from parallax.mesh import Axis
from parallax.params import Layout
from parallax.tensor.layers import ColumnParallelLinear, Piece, RowParallelLinear, VocabParallelEmbedding
from parallax.tensor.ops import gather_features

__all__ = ["Column", "Row", "Vocab", "shard_module"]


@dataclass(frozen=True, slots=True)
class Column:
    """Cut an nn.Linear by output features. pieces: the outputs fused in it, each cut on its own (query, key, value).

    gather_output: make the output whole again on every rank, for what follows it and knows nothing of shards.
    """

    pieces: Sequence[Piece] = ()
    gather_output: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Cut an nn.Linear by input features: it takes what a Column layer returns."""


@dataclass(frozen=True, slots=True)
class Vocab:
    """Cut an nn.Embedding by its ids."""


Style = Column | Row | Vocab
NAMED: Mapping[str, Style] = {"column": Column(), "row": Row(), "vocab": Vocab()}


def shard_module(model: nn.Module, plan: Mapping[str, Style | str], tensor: Axis) -> nn.Module:
    """Replace the layers that a plan names by their tensor-parallel kinds, in place; returns the model.

    plan: module name or glob (`layers.*.up`) -> Column(), Row(), Vocab(), or "column", "row", "vocab". Pair a Column
    with the Row that follows it; code between the two sees 1/tensor of the features, so a view by heads must leave
    the number of heads to be found (-1). Weights are those of tensor rank 0, whatever the other ranks started from;
    two layers that share a weight share it still. Sequence parallelism is not for plain modules.
    Collectives: a broadcast of every parameter and buffer; then those of the layers.
    Raises ConfigError, before the first collective, for a name that nothing matches, a layer of the wrong type, or a
    size that tensor does not divide.
    """
    chosen = _choose(model, plan)
    # Every layer is made on the meta device first: what cannot be cut is found before any rank sends.
    made = {name: _make(name, model.get_submodule(name), style, tensor) for name, style in chosen.items()}
    _check_shared(model, made)
    with torch.no_grad():
        for whole in [*model.parameters(), *model.buffers()]:
            if not whole.is_meta:
                broadcast(whole.data, tensor)
        filled: dict[Tensor, nn.Parameter] = {}
        for name, layer in made.items():
            _fill(layer, model.get_submodule(name), filled)
    for name, layer in made.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return model


def _choose(model: nn.Module, plan: Mapping[str, Style | str]) -> dict[str, Style]:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen: dict[str, Style] = {}
    for pattern, wish in plan.items():
        style = NAMED.get(wish) if isinstance(wish, str) else wish
        if style is None:
            raise ConfigError(f"plan: {pattern!r} asks for {wish!r}; the styles are {', '.join(NAMED)}")
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            close = get_close_matches(pattern, names, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"plan: no module is named {pattern!r}{hint}")
        for name in found:
            if name in chosen and chosen[name] != style:
                raise ConfigError(f"plan: {name} is matched by two patterns with different styles; let one of them go")
            chosen[name] = style
    return chosen


class _Gathered(ColumnParallelLinear):
    """A column layer whose output is whole again. Not fused: the shards of several pieces would interleave."""

    def forward(self, x: Tensor) -> Tensor:
        return gather_features(super().forward(x), self.tensor)


def _make(name: str, old: nn.Module, style: Style, tensor: Axis) -> nn.Module:
    """The new layer on the meta device. Raises ConfigError that names the layer."""
    kind = nn.Embedding if isinstance(style, Vocab) else nn.Linear
    if type(old) is not kind:
        raise ConfigError(
            f"plan: {name} is a {type(old).__name__}; {type(style).__name__} cuts a plain {kind.__name__}"
        )
    try:
        if isinstance(old, nn.Embedding):
            if old.padding_idx is not None or old.max_norm is not None or old.sparse or old.scale_grad_by_freq:
                raise ConfigError("padding_idx, max_norm, sparse and scale_grad_by_freq are not supported")
            return VocabParallelEmbedding(
                old.num_embeddings, old.embedding_dim, tensor, device="meta", dtype=old.weight.dtype
            )
        assert isinstance(old, nn.Linear)
        bias, dtype = old.bias is not None, old.weight.dtype
        if isinstance(style, Row):
            return RowParallelLinear(old.in_features, old.out_features, tensor, bias=bias, device="meta", dtype=dtype)
        assert isinstance(style, Column)
        if style.gather_output and style.pieces:
            raise ConfigError("gather_output and pieces exclude each other; gather after the pieces are apart")
        if any(piece.num_shards not in (None, tensor.size) for piece in style.pieces):
            # Their gradients are partial sums, and nothing would add them up in a plain module.
            raise ConfigError("pieces that several ranks repeat are not supported; give each piece a shard per rank")
        layer = _Gathered if style.gather_output else ColumnParallelLinear
        return layer(
            old.in_features, old.out_features, tensor, bias=bias, pieces=style.pieces, device="meta", dtype=dtype
        )
    except ConfigError as error:
        raise ConfigError(f"plan: {name}: {error}") from None


def _check_shared(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Layers that share a weight must be cut alike, and no layer outside of the plan may share one."""
    seen: dict[Tensor, tuple[str, torch.Size]] = {}
    for name, layer in made.items():
        for parameter_name, empty in layer.named_parameters(recurse=False):
            whole = getattr(model.get_submodule(name), parameter_name)
            other, shape = seen.setdefault(whole, (name, empty.shape))
            if shape != empty.shape:
                raise ConfigError(
                    f"plan: {name} and {other} share a weight but are cut differently; cut both along the vocabulary, "
                    "and choose a vocabulary that tensor divides"
                )
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in made and (both := [seen[p][0] for p in module.parameters(recurse=False) if p in seen]):
            raise ConfigError(f"plan: {name} shares a weight with {both[0]}, which is cut; put {name} in the plan too")


def _fill(layer: nn.Module, old: nn.Module, filled: dict[Tensor, nn.Parameter]) -> None:
    """Give a new layer its boxes of the old one's parameters."""
    for parameter_name, empty in list(layer.named_parameters(recurse=False)):
        whole = getattr(old, parameter_name)
        if whole not in filled:
            local = whole.new_zeros(empty.shape)
            _copy_boxes(local, whole, layer.layouts[parameter_name])  # type: ignore[index, arg-type]
            filled[whole] = nn.Parameter(local, requires_grad=whole.requires_grad)
        setattr(layer, parameter_name, filled[whole])


def _copy_boxes(local: Tensor, whole: Tensor, layouts: Layout | tuple[Layout, ...]) -> None:
    """Fused pieces are stacked along dim 0, in the whole as in the shard."""
    row, first = 0, 0
    for layout in layouts if isinstance(layouts, tuple) else (layouts,):
        piece = whole[first : first + layout.global_shape[0]]
        box = layout.box or tuple((0, size) for size in layout.global_shape)
        local[row : row + layout.rows] = piece[tuple(slice(a, b) for a, b in box)]
        row, first = row + layout.rows, first + layout.global_shape[0]
