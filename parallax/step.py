"""One optimizer step, the same for every mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallax.batches import Batch
from parallax.comm import all_reduce
from parallax.mesh import Axis, Mesh
from parallax.params import ParamSpec

if TYPE_CHECKING:
    from parallax.assemble import Run
    from parallax.optimizers import AdamW

__all__ = ["StepResult", "TrainState", "clip_gradients", "evaluate", "global_loss_and_norm", "train_step"]


@dataclass(slots=True)
class TrainState:
    """What a resumed run must have again: parameters (in the optimizer's flat buffers), its state, and the counts."""

    optimizer: AdamW
    step: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """step: how many are done. loss and grad_norm: of the global batch, before clipping. tokens: targets of this
    step.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int


def train_step(run: Run, state: TrainState, batch: Batch) -> StepResult:
    """One optimizer step over one global batch. The same for every mesh.

    Collectives: the token count over mesh.grad, the pipeline's and the layers' own, the gradients, and the loss with
    the norm in one small vector over tensor and pipeline. Raises FloatingPointError on every rank where the norm is
    not finite; parameters are then as before the step.
    """
    try:
        return _train_step(run, state, batch)
    except Exception as error:
        error.add_note(f"{run.mesh.label} in step {state.step + 1}")
        raise


def _train_step(run: Run, state: TrainState, batch: Batch) -> StepResult:
    tokens = count_tokens(batch, run.mesh)
    run.sync.zero()
    scaled = run.pipeline.run(batch.split(run.schedule.num_microbatches), scale=1.0 / max(1, tokens))
    loss, norm = global_loss_and_norm(scaled, run.grads, run.order, run.mesh, run.shards)
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"step {state.step + 1}: the gradient norm is {norm} (loss {loss}); the parameters are those of step "
            f"{state.step}. A lower optimizer.lr or more optimizer.warmup_steps helps most often"
        )
    config = run.config.optimizer
    clip_gradients(run.flat_grads, norm, config.max_grad_norm)
    lr = config.lr_at(state.step, run.config.steps)
    state.optimizer.step_at(lr)
    run.sync.publish()
    state.step += 1
    state.tokens += tokens
    return StepResult(step=state.step, loss=loss, grad_norm=norm, lr=lr, tokens=tokens)


def count_tokens(batch: Batch, mesh: Mesh) -> int:
    """Targets in the global batch: an all-reduce of one integer over mesh.grad."""
    count = torch.tensor([batch.num_tokens], dtype=torch.int64, device=mesh.device)
    return int(all_reduce(count, mesh.grad).item())


def global_loss_and_norm(
    scaled_loss: Tensor,
    grads: Iterable[tuple[ParamSpec, Tensor]],
    order: Mapping[str, int],
    mesh: Mesh,
    shards: Axis | None = None,
) -> tuple[float, float]:
    """The loss of the global batch and the norm of its gradient: the same bits on every rank.

    The sum of squares of each parameter is taken in float64 and laid in a vector by canonical order, so that no
    stage split changes the order in which they are added; a parameter that several ranks hold counts once.
    shards: the axis over which the gradients are cut (ZeRO). Collectives: 8 bytes over mesh.grad, then 8 bytes a
    canonical parameter over shards, tensor and pipeline.
    """
    loss = all_reduce(scaled_loss.detach().clone().view(1), mesh.grad)
    vector = torch.zeros(len(order) + 1, dtype=torch.float64, device=mesh.device)
    counted = [(spec, grad) for spec, grad in grads if spec.owned and grad.numel()]
    if counted:
        squares = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64).square() for _, grad in counted])
        # A parameter may be in several pieces here, added up in their order.
        vector.index_add_(0, torch.tensor([order[spec.name] for spec, _ in counted], device=mesh.device), squares)
    if shards is not None:
        all_reduce(vector, shards)
    if mesh.tensor.rank == 0:  # tensor ranks hold the same loss
        vector[-1] = loss[0]
    all_reduce(all_reduce(vector, mesh.tensor), mesh.pipeline)
    total, reduced = torch.stack([vector[:-1].sum(), vector[-1]]).tolist()
    return reduced, math.sqrt(total)


def clip_gradients(flat_grads: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scale the gradients so that their norm is at most max_norm; 0 leaves them alone."""
    if max_norm and norm > max_norm:
        for grads in flat_grads:
            grads.mul_(max_norm / (norm + 1e-6))


@torch.no_grad()
def evaluate(run: Run, batches: Iterable[Batch]) -> float:
    """Mean loss per target over the batches, without dropout; NaN where there is none. Two small collectives a
    batch.
    """
    total, tokens = 0.0, 0
    for stage in run.stages.values():
        stage.eval()
    for batch in batches:
        count = count_tokens(batch, run.mesh)
        losses = run.evaluator.run(batch.split(run.schedule.num_microbatches), scale=1.0)
        loss, _ = global_loss_and_norm(losses, (), {}, run.mesh)
        total, tokens = total + loss, tokens + count
    for stage in run.stages.values():
        stage.train()
    return total / tokens if tokens else math.nan
