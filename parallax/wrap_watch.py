"""What must not change while a module is wrapped, and whose its parameters are."""

from __future__ import annotations

from typing import Any

from torch import nn

from parallax.data.buckets import FlatBuffers
from parallax.data.countdown import is_counted
from parallax.errors import ConfigError
from parallax.optimizers.masters import narrow

__all__ = ["Unwrapped", "Watch", "check_free"]


def check_free(module: nn.Module) -> None:
    """A parameter has one flat buffer, one optimizer: a second wrap would take it away from the first in silence."""
    taken = next((name for name, parameter in module.named_parameters() if is_counted(parameter)), None)
    if taken is not None:
        raise ConfigError(
            f"{taken} is wrapped already, and a parameter can be of one wrapped module alone: to wrap again, wrap "
            "what `model.unwrap()` of the first wrap returns; where two models share parameters, wrap one module that "
            "holds both"
        )


class Watch:
    """Sees what would train in the module but not in the flat buffers, which are all that the optimizer knows."""

    def __init__(self, module: nn.Module, flat: FlatBuffers) -> None:
        self._module, self._flat = module, flat
        self._known = {placed.parameter for placed in flat.placed}
        self._frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}

    def check(self) -> None:
        """Raises ConfigError where a parameter would not be trained; takes in new memory where that is right."""
        if any(p.requires_grad and p not in self._known for p in self._module.parameters()):
            self._name_the_unknown()
        self.check_memory()

    def _name_the_unknown(self) -> None:
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad or parameter in self._known:
                continue
            if parameter in self._frozen:
                raise ConfigError(
                    f"{name} was frozen when the module was wrapped and is not now; nothing would train it: let all "
                    "that trains require gradients, then wrap `model.unwrap()` again"
                )
            raise ConfigError(
                f"{name} is not the parameter that was wrapped, and nothing would train it: load values with "
                "`model.load_state_dict(state)` (the module's own with assign=True replaces parameters), and to change "
                "the module, change `model.unwrap()` and wrap it again"
            )

    def check_memory(self) -> None:
        """A parameter that was given memory of other values, by `parameter.data = tensor`.

        Copies hold all of it, and take it in. Elsewhere a rank has a part, or others' parts are still on the way, and
        what was assigned may have been made of values that were not there.
        """
        for placed in self._flat.strays():
            dtype = placed.parameter.dtype
            if dtype != self._flat.dtype:
                raise ConfigError(
                    f"the parameters were {self._flat.dtype} when wrapped and are {dtype} now; convert "
                    "`model.unwrap()`, then wrap it again"
                )
            fits = placed.parameter.shape == placed.shape and placed.start < self._flat.stop
            if not fits or self._flat.level or narrow(self._flat):
                raise ConfigError(
                    f"{placed.name} was given other memory (`parameter.data = tensor` and vector_to_parameters do), "
                    f"which with zero={self._flat.level} and {dtype} is not what the optimizer updates: load values "
                    "with `model.load_state_dict(state)`, or change `model.unwrap()` and wrap it again"
                )
            self._flat.take_in(placed)

    def check_gradients(self) -> None:
        """Where the gradients are cut, a script's own are no part of them."""
        for placed in self._flat.placed:
            grad = placed.parameter.grad
            if grad is not None and bool(grad.any()):
                raise ConfigError(
                    f"{placed.name}.grad was assigned after the gradients were reduced, of which with "
                    f"zero={self._flat.level} a rank has a part alone; change gradients with zero=0"
                )


class Unwrapped:
    """In place of the BucketSync, and of the Watch, of a model that was unwrapped."""

    def __getattr__(self, name: str) -> Any:
        raise ConfigError("this model was unwrapped, and trains no more; wrap its module again, and make an optimizer")
