"""Dynamic loss scaling: float16 has no room for small gradients, so the loss is multiplied before the backward and the
gradients are divided after it (arXiv:1710.03740).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LossScale"]


@dataclass(slots=True)
class LossScale:
    """The factor on the loss, a power of two. It halves when a gradient overflows, and that step is skipped; it doubles
    after `window` steps without. The norm that decides is the same on every rank, so every rank decides alike.

    window: 0 never changes the scale (dtypes that need none). skipped: steps so far that changed no parameter.
    """

    value: float = 1.0
    window: int = 0
    good: int = 0
    skipped: int = 0

    def update(self, finite: bool) -> None:
        """Take note of a step."""
        if not finite:
            self.skipped += 1
        if not self.window:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good >= self.window:
            self.value, self.good = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"loss_scale": self.value, "good_steps": self.good, "skipped_steps": self.skipped}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` returned; a checkpoint without it leaves the scale as it is."""
        if self.window:
            self.value = float(state.get("loss_scale", self.value))
            self.good = int(state.get("good_steps", 0))
        self.skipped = int(state.get("skipped_steps", 0))
