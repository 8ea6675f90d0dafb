"""Where a number that is not finite began: the step is run again with every module watched.

Dropout and samples are keyed, parameters were not changed: the second run computes what the first did. If it does not,
that too is an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from parallax.comm import gather_json
from parallax.pipeline.schedule import Action, Op

if TYPE_CHECKING:
    from parallax.assemble import Run
    from parallax.batches import Batch

__all__ = ["find_origin"]


def find_origin(run: Run, batch: Batch, scale: float) -> str:
    """The first module whose output, or else the gradient of whose output, is not finite; microbatch, stage and ranks.
    Or else the first parameter whose own gradient is not. scale: the step's.

    The first in the order of the numbers' own making: forwards before backwards, microbatch by microbatch, along the
    stages. Collectives: those of a step without its update, and a JSON text over the world. The gradients are lost.
    """
    seen: list[str] = []
    found: list[tuple[int, int, int, int, str]] = []

    def after(action: Action, start: float, end: float) -> None:
        backward = action.op != Op.F
        place = (run.schedule.num_stages - action.stage) if backward else action.stage
        found.extend((int(backward), action.microbatch or 0, place, number, name) for number, name in enumerate(seen))
        seen.clear()

    before, run.pipeline.recorder = run.pipeline.recorder, after
    try:
        with _watched(run, seen.append):
            run.sync.zero()
            run.pipeline.run(batch.split(run.schedule.num_microbatches), scale=scale)
    finally:
        run.pipeline.recorder = before
    own = min(((run.order[s.name], s.name) for s, g in run.grads if not bool(g.isfinite().all())), default=None)
    told = gather_json([min(found, default=None), own], run.mesh.world, run.mesh.device)
    every = [one[0] for one in told]
    known = [tuple(first) for first in every if first is not None]
    if not known:
        bad = min((tuple(one[1]) for one in told if one[1] is not None), default=None)
        if bad is not None:
            return f"it begins in the gradient of {bad[1]} itself: all outputs, and the gradients of them, are finite"
        return "run again, the step has finite numbers only: the hardware is to be doubted"
    first = min(known)
    ranks = ", ".join(str(rank) for rank, other in enumerate(every) if other is not None and tuple(other) == first)
    backward, microbatch, place, _, name = first
    what = "in the backward, in the gradient of the output of" if backward else "in the output of"
    stage = run.schedule.num_stages - place if backward else place
    return f"it begins {what} {name or 'the model'} (microbatch {microbatch}, stage {stage}, rank {ranks})"


@contextmanager
def _watched(run: Run, tell: Callable[[str], None]) -> Iterator[None]:
    handles = [
        module.register_forward_hook(_watch(name, tell))
        for stage in run.stages.values()
        for name, module in stage.named_modules()
        if name  # a stage's own output is that of a module in it
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, tell: Callable[[str], None]) -> Callable[[nn.Module, Any, Any], None]:
    def look(values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            tell(name)

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                look(tensor.detach())
                if tensor.requires_grad and torch.is_grad_enabled():
                    tensor.register_hook(look)

    return hook
