"""parallax: 3D-parallel training for PyTorch, where the mesh is invisible in the numbers.

Shape suffixes of names: B microbatch (samples), T tokens of a sequence, N = B*T tokens, D model, H heads, G key/value
heads, K head dim, F hidden of the MLP, V vocabulary, E experts. Upper case is the global size, lower case this rank's
shard: h_Nf holds f = F/tensor features of all N tokens, x_nD all features of n = N/tensor tokens.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "init_mesh": "mesh",
    "data_parallel": "wrap",
    "optimizer": "wrap",
    "allreduce": "arrays",
    "allgather": "arrays",
    "broadcast": "arrays",
}

__all__ = ["allgather", "allreduce", "broadcast", "data_parallel", "init_mesh", "optimizer"]


def __getattr__(name: str) -> Any:
    """The few names of everyday use, imported when they are used: `import parallax` alone brings no torch."""
    if name == "__version__":
        return importlib.import_module("parallax.version").version()
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"parallax.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'parallax' has no attribute {name!r}")
