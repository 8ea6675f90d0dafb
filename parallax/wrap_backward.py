"""When a backward of a wrapped module is over: its gradients are reduced there, as DDP does, for scripts look at them,
or clip them, where backward has returned."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from parallax.wrap import DataParallel

__all__ = ["AfterBackward"]


class AfterBackward:
    """Has the model reduce its gradients when a backward ends that gave it any.

    Both the outputs of a forward and the parameters tell of a backward. The outputs are first: within a checkpoint that
    is reentrant a parameter's backward is one of its own, whose end is not the end. The parameters know of those that
    went through no output: of a method other than forward, of an evaluating module, of what torch cannot open.
    """

    def __init__(self, model: DataParallel) -> None:
        self._model, self._queued, self._given = model, False, False
        model.sync.when_gradient(self._gives)

    def reset(self) -> None:
        """Forget a backward that failed: its end will not come."""
        self._queued = False

    def watch(self, output: Any) -> None:
        """A training forward has returned this."""
        self.reset()
        for leaf in tree_leaves(output):
            inside = [leaf] if isinstance(leaf, Tensor) else list(getattr(leaf, "__dict__", {}).values())
            for tensor in inside:
                # A leaf, as a parameter that is returned, would keep the hook for good.
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                    tensor.register_hook(self._begins)

    def _gives(self) -> None:
        if not (self._queued and self._given):
            self._begins()
            self._given = True

    def _begins(self, grad: Tensor | None = None) -> None:
        if self._model.reduced:
            raise RuntimeError(
                "a second backward before the optimizer's step, after the gradients were reduced; all backwards "
                "but the last belong, with their forward, into `with model.accumulate():` (one backward through a "
                "checkpoint outside of the model's forward needs use_reentrant=False)"
            )
        if not self._queued and not self._model.accumulating:
            self._queued, self._given = True, False
            # torch has no public way to be called when a backward ends; its own FSDP takes this one.
            torch.autograd.Variable._execution_engine.queue_callback(self._ends)

    def _ends(self) -> None:
        self._queued = False
        if self._given:  # else it was of the inputs alone, as autograd.grad's
            self._model.reduce()

    def reduce_late(self) -> None:
        """At the step: reduce, where no backward has done it.

        Raises RuntimeError where the gradients are whole and this rank had none: the other ranks' are reduced when
        their backward returns, and what their script then does to them, a clip, this rank's has not.
        """
        model = self._model
        late = not (model.reduced or model.joining or model.flat.level) and model.mesh.grad.size > 1
        model.reduce()
        if late and model.flat.untouched:
            raise RuntimeError(
                "no gradient reached a parameter on this rank before the step, so that gradients were reduced only "
                "now, behind what the script does to them after its backward; let every rank's loss depend on the "
                "model (`loss + 0 * output.sum()`), or call optimizer.synchronize() after the backward"
            )

    def warn(self) -> None:
        """Somebody asks for the parameters: it may be for gradients that are not there."""
        model = self._model
        if model.flat.level and model.reduced:
            warnings.warn(
                f"param.grad is None with zero={model.flat.level}, where a rank has a part of the gradients: clip with "
                "optimizer.clip_grad_norm_(max_norm), torch's own would clip nothing",
                stacklevel=3,
            )
        elif not (model.reduced or model.accumulating or model.flat.untouched):
            warnings.warn(
                "param.grad is None while gradients add up in `model.accumulate()`: before you look at them or clip "
                "them, do the last backward outside of it or call optimizer.synchronize(); drop them with "
                "model.zero_grad()",
                stacklevel=3,
            )
