"""How one run of elements is updated: torch's fused functions, and Lion.

The functions, not torch's optimizer classes: making one of those imports torch's compiler, two seconds for every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from parallax.config import OptimizerConfig

__all__ = ["RULES", "Rule", "Update"]


@dataclass(frozen=True, slots=True)
class Update:
    """What is the same for all elements of one update. num_steps: done before it."""

    config: OptimizerConfig
    num_steps: int
    lr: float
    decay: float


@dataclass(frozen=True, slots=True)
class Rule:
    """apply(parameters, gradients, state, update) changes parameters and state in place, element by element.

    state: the names of the tensors that it keeps, which start as zeros.
    """

    apply: Callable[[Tensor, Tensor, Mapping[str, Tensor], Update], None]
    state: tuple[str, ...]


def apply_adamw(p: Tensor, grad: Tensor, state: Mapping[str, Tensor], update: Update) -> None:
    """AdamW (arXiv:1711.05101)."""
    count = torch.full((), float(update.num_steps), device=p.device)
    first, second = update.config.betas
    adamw(
        [p],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [count],
        fused=True,
        amsgrad=False,
        beta1=first,
        beta2=second,
        lr=update.lr,
        weight_decay=update.decay,
        eps=update.config.eps,
        maximize=False,
    )


def apply_sgd(p: Tensor, grad: Tensor, state: Mapping[str, Tensor], update: Update) -> None:
    """Stochastic gradient descent with Nesterov momentum; weight decay is part of the gradient."""
    sgd(
        [p],
        [grad],
        [state.get("momentum_buffer")],
        fused=True,
        weight_decay=update.decay,
        momentum=update.config.momentum,
        lr=update.lr,
        dampening=0.0,
        nesterov=update.config.momentum > 0,
        maximize=False,
    )


def apply_lion(p: Tensor, grad: Tensor, state: Mapping[str, Tensor], update: Update) -> None:
    """Lion (arXiv:2302.06675, algorithm 2): p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g), m <- b2 m + (1 - b2) g.

    The paper's advice: a learning rate 3 to 10 times smaller than AdamW's, and as much more weight decay.
    """
    (first, second), moment = update.config.betas, state["exp_avg"]
    sign = moment.lerp(grad, 1 - first).sign_()
    p.mul_(1 - update.lr * update.decay).add_(sign, alpha=-update.lr)
    moment.lerp_(grad, 1 - second)


RULES: Mapping[str, Rule] = {
    "adamw": Rule(apply_adamw, ("exp_avg", "exp_avg_sq")),
    "sgd": Rule(apply_sgd, ("momentum_buffer",)),
    "lion": Rule(apply_lion, ("exp_avg",)),
}
