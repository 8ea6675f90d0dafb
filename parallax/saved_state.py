"""What a run's checkpoint says beside its tensors, checked before anything of the run is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parallax.checkpoint import Manifest
from parallax.errors import DamagedCheckpoint

__all__ = ["Counts", "read_counts"]

SECTIONS = ("batch", "corpus", "data")
"""Of the saved configuration: what is read when a run goes on."""


@dataclass(frozen=True, slots=True)
class Counts:
    """See TrainState."""

    step: int
    tokens: int
    batches: int


def read_counts(manifest: Manifest) -> Counts:
    """How far the run was. Raises DamagedCheckpoint where the state is none that `Checkpoints.save` writes."""
    state = manifest.state
    try:
        step = _count(state, "step")
        counts = Counts(step, _count(state, "tokens"), _count(state, "batches", step))
        if counts.step != manifest.step:
            raise ValueError(f"step is {counts.step}, the manifest's is {manifest.step}")
        if counts.batches < counts.step:
            raise ValueError(f"batches is {counts.batches}, fewer than the {counts.step} steps")
        if _count(state, "skipped_steps", 0) > counts.step:
            raise ValueError(f"skipped_steps is {state['skipped_steps']}, more than the {counts.step} steps")
        _count(state, "good_steps", 0)
        scale = state.get("loss_scale", 1.0)
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= 2.0**1000:
            raise ValueError(f"loss_scale is {scale!r}")
        config = _section(state, "config")
        for name in SECTIONS:
            _section(config, name)
    except ValueError as error:
        raise DamagedCheckpoint(f"{manifest.path} is damaged: in its state {error}; take another checkpoint") from None
    return counts


def _count(state: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = state.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{name} is {value!r}")
    return value


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise ValueError(f"{name} is no object")
    return found
