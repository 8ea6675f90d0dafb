"""Activation recomputation: run a part of the model again in the backward instead of keeping what it computed.

Dropout is keyed by position, not drawn, so the second run drops what the first one dropped and nothing has to be saved
or restored. Collectives inside of the part run again too, in the same order on every rank of their axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.checkpoint

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which the backward needs nothing but the arguments (arXiv:1604.06174)."""
    # To the end, though its last results are not needed: forward hooks that began must also end (ZeRO 3).
    return torch.utils.checkpoint.checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none", early_stop=False
    )
