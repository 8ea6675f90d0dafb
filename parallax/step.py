"""One optimizer step, the same for every mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from parallax.batches import Batch
from parallax.comm import all_reduce, gather_json
from parallax.errors import NotFiniteError
from parallax.mesh import Axis, Mesh
from parallax.params import ParamSpec
from parallax.postmortem import find_origin
from parallax.precision.loss_scale import LossScale
from parallax.replicas import check_replicas
from parallax.stop import Stop
from parallax.transfer import to_device

if TYPE_CHECKING:
    from parallax.assemble import Run
    from parallax.optimizers import TrainOptimizer

__all__ = ["StepResult", "TrainState", "clip_gradients", "evaluate", "global_loss_and_norm", "train_step"]


@dataclass(slots=True)
class TrainState:
    """What a resumed run must have again: parameters (in the optimizer's flat buffers), its state, and the counts.

    step: optimizer steps done. batches: global batches used up, which are more after a roll-back.
    """

    optimizer: TrainOptimizer
    loss_scale: LossScale = field(default_factory=LossScale)
    step: int = 0
    tokens: int = 0
    batches: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """step: how many are done. loss and grad_norm: of the global batch, before clipping. tokens: targets of this step.
    skipped: why the step changed no parameter, or nothing.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: str = ""


def train_step(run: Run, state: TrainState, batch: Batch, stop: Stop | None = None) -> StepResult:
    """One optimizer step over one global batch. The same for every mesh.

    stop: where a rank's wish to end becomes everybody's; the step is done all the same.

    Collectives: the token count over mesh.grad, the pipeline's and the layers' own, the gradients, and the loss with
    the norm in one small vector over tensor and pipeline. Where the norm is not finite no parameter changes, on any
    rank: in float16 the step is skipped and the loss scale halved, else on_nan decides: NotFiniteError on every
    rank alike, or a skipped step.
    """
    number = state.step + 1
    try:
        return _train_step(run, state, batch, stop)
    except Exception as error:
        error.add_note(f"{run.mesh.label} in step {number}")
        raise


def _train_step(run: Run, state: TrainState, batch: Batch, stop: Stop | None) -> StepResult:
    count = count_tokens(batch, run.mesh)
    scale = state.loss_scale.value
    run.sync.zero(scale)
    each = scale * count.clamp(min=1).double().reciprocal()
    scaled = run.pipeline.run(batch.split(run.schedule.num_microbatches), scale=each)
    loss, norm, tokens = global_loss_and_norm(scaled, run.grads, run.order, run.mesh, run.shards, stop, count)
    loss, norm = loss / scale, norm / scale
    config = run.config.optimizer
    lr = config.lr_at(state.step, run.config.steps)
    skipped = "" if math.isfinite(norm) else explain(run, state, batch, tokens, loss, norm)
    if not skipped:
        clip_gradients(run.flat_grads, norm, config.max_grad_norm, scale)
        state.optimizer.step_at(lr)
        run.sync.publish()
    state.loss_scale.update(not skipped)
    state.step += 1
    state.batches += 1
    state.tokens += tokens
    every = run.config.check_replicas_every
    if every and state.step % every == 0:
        check_replicas(run)
    return StepResult(state.step, loss, norm, lr, tokens, skipped)


def explain(run: Run, state: TrainState, batch: Batch, tokens: int, loss: float, norm: float) -> str:
    """What is wrong with a step whose norm is not finite: the first parameter and the ranks that hold the gradients,
    and, but for an overflow of float16 that a smaller loss scale may cure, where it begins: the step is run again,
    watched.

    Raises NotFiniteError where such a step shall end the run. Collectives: a JSON text over the world; a step's.
    """
    bad = [spec.name for spec, grad in run.grads if not bool(grad.isfinite().all())]
    everywhere = gather_json(sorted(set(bad), key=run.order.__getitem__)[:1], run.mesh.world, run.mesh.device)
    found = [(run.order[names[0]], names[0], rank) for rank, names in enumerate(everywhere) if names]
    where = "no gradient alone is"
    if found:
        _, name, _ = min(found)
        ranks = ", ".join(str(rank) for _, other, rank in found if other == name)
        where = f"first in {name} (rank {ranks})"
    text = f"the gradient norm is {norm} (loss {loss}), {where}"
    scale = state.loss_scale.value
    if run.config.dtype == "float16" and scale > 1 and math.isfinite(loss):
        return text  # a smaller scale may do; where the loss is not finite itself, none does
    text = f"{text}; {find_origin(run, batch, scale / max(1, tokens))}"
    if run.config.on_nan != "stop":
        return text
    raise NotFiniteError(
        f"step {state.step + 1}: {text}; the parameters are those of step {state.step}. A lower optimizer.lr or more "
        "optimizer.warmup_steps helps most often; on_nan=skip goes on without such steps, on_nan=rollback from the "
        "last checkpoint, with other samples"
    )


def count_tokens(batch: Batch, mesh: Mesh) -> Tensor:
    """Targets in the global batch, an int64 scalar: an all-reduce of one integer over mesh.grad. It stays where the
    batch is, so that a GPU gets its work of the step before the count is known to the host.
    """
    return all_reduce(batch.count()[None], mesh.grad)[0]


def global_loss_and_norm(
    scaled_loss: Tensor,
    grads: Iterable[tuple[ParamSpec, Tensor]],
    order: Mapping[str, int],
    mesh: Mesh,
    shards: Axis | None = None,
    stop: Stop | None = None,
    count: Tensor | None = None,
) -> tuple[float, float, int]:
    """The loss of the global batch, the norm of its gradient, the same bits on every rank, and the count.

    The sum of squares of each parameter is taken in float64 and laid in a vector by canonical order, so that no
    stage split changes the order in which they are added; a parameter that several ranks hold counts once.
    A norm that is not finite on one rank is so on all, whatever the cause: nobody takes a step that another skips.
    shards: the axis over which the gradients are cut (ZeRO). stop: is agreed if any rank wishes it. count: of
    `count_tokens`. All of it is read at once: the only place of a step where the host waits for the device.
    Collectives: 8 bytes a canonical parameter and 16 more over shards, tensor and pipeline, 24 bytes over mesh.grad.
    """
    vector = torch.zeros(len(order) + 2, dtype=torch.float64, device=mesh.device)
    counted = [(spec, grad) for spec, grad in grads if spec.owned and grad.numel()]
    if counted:
        norms = torch._foreach_norm([grad for _, grad in counted], 2, dtype=torch.float64)  # on a GPU a few kernels
        # A parameter may be in several pieces here, added up in their order.
        places = torch.tensor([order[spec.name] for spec, _ in counted])
        vector.index_add_(0, to_device(places, mesh.device), torch.stack(norms).square_())
    if shards is not None:
        all_reduce(vector, shards)
    if mesh.tensor.rank == 0:  # tensor ranks hold the same loss
        vector[-2] = scaled_loss.detach()
    vector[-1].fill_(stop is not None and stop.wished)  # an assignment would wait for a GPU
    all_reduce(all_reduce(vector, mesh.tensor), mesh.pipeline)
    total = vector[:-2].sum()
    overflow = torch.where(total.isfinite(), 0.0, total)
    shared = all_reduce(torch.stack([vector[-2], vector[-1], overflow]), mesh.grad)
    known = torch.stack([total, total.new_zeros(()) if count is None else count.double()])
    loss, wishes, bad, total_squares, tokens = torch.cat([shared, known]).tolist()
    if stop is not None and wishes > 0:
        stop.agreed = True
    return loss, bad if bad else math.sqrt(total_squares), int(tokens)


def clip_gradients(flat_grads: Sequence[Tensor], norm: float, max_norm: float, scale: float = 1.0) -> None:
    """Divide the gradients by scale, and scale them so that their norm is at most max_norm; 0 does not clip.

    norm: after the division.
    """
    factor = max_norm / (norm + 1e-6) if max_norm and norm > max_norm else 1.0
    if factor != 1.0 or scale != 1.0:
        for grads in flat_grads:
            grads.mul_(factor / scale)


@torch.no_grad()
def evaluate(run: Run, batches: Iterable[Batch], stop: Stop | None = None) -> float:
    """Mean loss per target over the batches, without dropout; NaN where there is none. Two small collectives a
    batch. stop: as in train_step; no further batch is looked at once it is agreed, and the mean of some is NaN.
    """
    total, tokens = 0.0, 0
    for stage in run.stages.values():
        stage.eval()
    for batch in batches:
        count = count_tokens(batch, run.mesh)
        losses = run.evaluator.run(batch.split(run.schedule.num_microbatches), scale=1.0)
        loss, _, targets = global_loss_and_norm(losses, (), {}, run.mesh, stop=stop, count=count)
        total, tokens = total + loss, tokens + targets
        if stop is not None and stop.agreed:
            break
    for stage in run.stages.values():
        stage.train()
    cut_short = stop is not None and stop.agreed
    return total / tokens if tokens and not cut_short else math.nan
