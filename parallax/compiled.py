"""torch.compile for the elementwise work between products and collectives (`compile=true`).

What is compiled are functions of tensors alone: the forward and the backward of norms, activations and rotary
positions. Collectives, the buffers that gradients are added to, and the order of a schedule stay outside of every
graph, so nothing of parallelism can be traced, moved or lost; a function is compiled once for all layers of a stage.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

from parallax.errors import ConfigError

__all__ = ["pick", "require_compiler"]

Function = Callable[..., Any]


def pick(function: Function, wish: bool, each_shape: bool = False) -> Function:
    """The function itself, or, if it is wished for, its compiled form.

    each_shape: compiled for every shape anew, up to torch's limit of 8, instead of once for all after the second.
    """
    return _compiled(function, each_shape) if wish else function


@functools.cache
def _compiled(function: Function, each_shape: bool) -> Function:
    import torch

    return torch.compile(function, dynamic=False if each_shape else None)


def require_compiler(device_type: str) -> None:
    """Raise ConfigError where torch has nothing to compile with."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("compile=true needs triton for a GPU, which is not installed; pip install triton")
    compiler = os.environ.get("CXX", "g++")
    if device_type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile=true needs a C++ compiler, and there is no {compiler}; install g++, set CXX, or leave compile out"
        )
