"""What must not change while a module is wrapped, and whose its parameters are."""

from __future__ import annotations

from typing import Any

from torch import nn

from parallax.data.countdown import is_counted
from parallax.errors import ConfigError

__all__ = ["Unwrapped", "check_free"]


def check_free(module: nn.Module) -> None:
    """A parameter has one flat buffer, one optimizer: a second wrap would take it away from the first in silence."""
    taken = next((name for name, parameter in module.named_parameters() if is_counted(parameter)), None)
    if taken is not None:
        raise ConfigError(
            f"{taken} is wrapped already, and a parameter can be of one wrapped module alone: to wrap again, wrap "
            "what `model.unwrap()` of the first wrap returns; where two models share parameters, wrap one module that "
            "holds both"
        )


class Unwrapped:
    """In place of the BucketSync of a model that was unwrapped."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigError("this model was unwrapped, and trains no more; wrap its module again, and make an optimizer")
