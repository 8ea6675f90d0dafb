"""What data_parallel refuses, before any collective, so that every rank refuses alike."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from parallax.config_fields import LOSSY
from parallax.data.choose import CASTS
from parallax.errors import ConfigError
from parallax.mesh import Mesh

__all__ = ["check_compression", "check_dropped", "check_elementwise", "check_join", "check_module", "check_output"]


NOT_ELEMENTWISE = re.compile(
    "adafactor|adahessian|adalite|adamini|adamp|adam_mini|adanorm|apollo|centraliz|dadapt|fromage|galore|kfac|kron|lamb|"
    "larc|lars|lbfgs|mechanic|muon|newton|nero|novograd|prodigy|psgd|ranger|scion|sgdp|shampoo|soap|sparseadam|spectral|"
    "stableadam|yellowfin",
    re.IGNORECASE,
)
"""Parts of the names of optimizers that look at more than one element at a time: flat segments have
no tensors, and cuts go through the middle of them."""
SHORT_NAMES = re.compile(r"SAM(?![a-z])|^L?DoG$|^CAME$|^SM3$|^Dion$|^sam$")
"""Those whose names are part of other words."""


def check_module(module: nn.Module, mesh: Mesh, zero: int, shard_size: int | None, gather: str) -> None:
    _check_values(module, mesh)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the module has no parameters that require a gradient; there is nothing to train")
    if mesh.pipeline.size > 1:
        raise ConfigError(
            f"data_parallel wraps a whole model, the mesh has pipeline={mesh.pipeline.size}; use recipes/gpt.py"
        )
    kinds = {(p.dtype, p.device.type) for p in parameters}
    if len(kinds) > 1:
        raise ConfigError(f"the parameters are of {len(kinds)} kinds ({', '.join(map(str, kinds))}); make them one")
    if zero not in (0, 1, 2, 3):
        raise ConfigError(f"zero={zero} is unknown; choose 0, 1, 2 or 3")
    if gather not in ("block", "step"):
        raise ConfigError(f"gather={gather} is unknown; choose block or step")
    if shard_size is not None and (zero == 0 or mesh.grad.size % shard_size):
        raise ConfigError(f"shard_size={shard_size} needs zero=1 to 3 and must divide the {mesh.grad.size} data ranks")
    tables = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    sparse = next((name for name, m in tables if m.sparse), None)
    if sparse is not None:
        raise ConfigError(f"{sparse or 'the module'} has sparse gradients, which are not reduced; make it sparse=False")
    (kind,) = kinds
    if kind[1] != mesh.device.type:
        raise ConfigError(f"the module is on {kind[1]}, the mesh on {mesh.device}; move it: model.to(mesh.device)")


def _check_values(module: nn.Module, mesh: Mesh) -> None:
    """Whether there are values, one after the other, that ranks can exchange."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise ConfigError(
                f"{name} is of a lazy module that has seen no input, and has no shape; call the module with one batch, "
                "on every rank, before it is wrapped"
            )
        if tensor.is_meta:
            raise ConfigError(
                f"{name} is on the meta device and has no values; build the module on {mesh.device}, or call "
                f"module.to_empty(device='{mesh.device}') and give it its initial values before it is wrapped"
            )
        if tensor.layout != torch.strided or tensor.is_nested:
            raise ConfigError(
                f"{name} is of layout {tensor.layout}, and ranks exchange dense tensors alone; keep it dense "
                f"({name}.to_dense()), or keep its indices and its values as two buffers"
            )


def check_compression(compression: str, rank: int, ratio: float, zero: int) -> None:
    known = ("none", *CASTS, *LOSSY)
    if compression not in known:
        raise ConfigError(f"compression={compression} is unknown; choose {', '.join(known[:-1])} or {known[-1]}")
    if compression in LOSSY and zero:
        raise ConfigError(f"compression={compression} needs whole gradients, and zero={zero} cuts them; use zero=0")
    if rank < 1 or not 0 < ratio <= 1:
        raise ConfigError(f"compression_rank={rank} must be at least 1, compression_ratio={ratio} above 0, at most 1")


def check_elementwise(kind: type) -> None:
    for name in (base.__name__ for base in kind.__mro__):
        if SHORT_NAMES.search(name) or NOT_ELEMENTWISE.search(name):
            raise ConfigError(
                f"{name} does not treat each element by itself, or is named like one that does not; use AdamW, SGD or "
                "another that does, or, if you know that this one does, parallax.optimizer(..., elementwise=True)"
            )


def check_output(name: str, block: nn.Module, args: Any, output: Any) -> None:
    """A hook on a block of zero=3: its backward is seen by the tensors that it returns, in whatever torch can open."""
    for leaf in tree_leaves(output):
        inside = tree_leaves(list(getattr(leaf, "__dict__", {}).values()))
        if not isinstance(leaf, Tensor) and any(isinstance(value, Tensor) and value.requires_grad for value in inside):
            raise ConfigError(
                f"zero=3 cannot see the backward of block {name} through a {type(leaf).__name__}; return tensors, "
                "tuples, lists or dicts of them, or use gather='step'"
            )


def check_join(under_way: bool, level: int, lossy: bool) -> None:
    """Raise ConfigError where a rank without batches could not follow the others."""
    if under_way:
        raise ConfigError(
            "a join over these ranks is under way, and a rank that is done can follow the steps of one model "
            "alone: wrap one module that holds both, or give every rank as many batches"
        )
    if level == 3:
        raise ConfigError("join cannot follow the gatherings of zero=3; use zero=2, or give every rank as many batches")
    if lossy:
        raise ConfigError("join weighs gradients anew, not what compression owes; leave out one of the two")


def check_dropped(awaited: bool) -> None:
    """Raise ConfigError where gradients are dropped of a step that others take part in."""
    if awaited:
        raise ConfigError(
            "within join the ranks that are done wait for a step after this backward; make it, with gradients times "
            "zero if it shall change nothing, instead of dropping them"
        )
