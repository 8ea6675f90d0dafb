"""Parameters that a step passes by, as torch's optimizers do where there is no gradient, though they lie in flat
segments with others."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from parallax.data.buckets import FlatBuffers
from parallax.errors import ConfigError
from parallax.optimizers import FlatOptimizer

__all__ = ["LeftOut"]


class LeftOut:
    """Lets a flat step leave some parameters, and what the optimizer has for them, as they are, bit for bit.

    What an optimizer counts for a whole segment, as Adam its steps, goes on meanwhile: there a parameter that comes
    back would be updated as if it had been there all along, which is a ConfigError.
    """

    def __init__(self, optimizer: FlatOptimizer, flat: FlatBuffers) -> None:
        self._optimizer, self._flat = optimizer, flat
        self._missed: dict[str, int] = {}

    def saved(self) -> dict[str, dict[str, int]]:
        """For a state dict: how many steps each parameter has missed by now, where there are such."""
        return {"left_out": dict(self._missed)} if self._missed else {}

    def load(self, saved: Mapping[str, Any]) -> None:
        self._missed = dict(saved.get("left_out", {}))

    @contextmanager
    def kept(self, names: Collection[str]) -> Iterator[None]:
        """Around a step that passes by the named parameters of the module."""
        names = sorted(names)  # every rank names the same one
        back = next((name for name in self._missed if name not in names), None)
        if back is not None and self._counts():
            kind = type(self._optimizer.inner).__name__
            raise ConfigError(
                f"{back} was left out of {self._missed[back]} steps, frozen or without a gradient, and is back; {kind} "
                "counts steps for all parameters at once and would take it for one that was there: wrap "
                "`model.unwrap()` again and make a new optimizer, or leave it out no more"
            )
        if not names:
            self._missed.clear()
            yield
            return
        self._missed = {name: self._missed.get(name, 0) + 1 for name in names}
        before = {key: tensor.clone() for key, tensor in self._of(names)}
        yield
        with torch.no_grad():
            for key, tensor in self._of(names):  # what came in this step begins at zero, as if it had not
                tensor.copy_(before[key]) if key in before else tensor.zero_()
        fresh = [name for name, count in self._missed.items() if count == 1]
        if fresh and self._counts():
            warnings.warn(
                f"{fresh[0]} ({len(fresh)} in all) is left out of the step, frozen or without a gradient; as "
                f"{type(self._optimizer.inner).__name__} counts steps for all parameters at once, it must stay so",
                stacklevel=3,
            )

    def _of(self, names: Collection[str]) -> Iterator[tuple[tuple[int, str], Tensor]]:
        """Every tensor that a step may change of the named parameters: masters, the model's own, elementwise state."""
        for number, piece in enumerate(self._flat.pieces):
            if piece.spec.parameter not in names:
                continue
            part = slice(piece.start, piece.stop)
            master = self._optimizer.masters[0][piece.segment]
            yield (number, " master"), master.detach()[part]
            if self._optimizer.apart:
                yield (number, " value"), self._flat.values_of(self._flat.segments[piece.segment])[part]
            for key, value in self._optimizer.inner.state.get(master, {}).items():
                if isinstance(value, Tensor) and value.shape == master.shape:
                    yield (number, key), value[part]

    def _counts(self) -> bool:
        """Whether the optimizer keeps more than elements: then a segment's parameters cannot part ways and meet."""
        inner, masters = self._optimizer.inner, self._optimizer.masters[0]
        kept = [(m, value) for m in masters for value in inner.state.get(m, {}).values() if value is not None]
        counts = any(not isinstance(value, Tensor) or value.shape != master.shape for master, value in kept)
        return counts or any(group.get("dampening") for group in inner.param_groups)  # SGD's not in the first step
