"""A torch optimizer for what a rank of a wrapped module updates."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from parallax.comm import all_reduce
from parallax.errors import ConfigError
from parallax.optimizers import FlatOptimizer
from parallax.step import clip_gradients, global_loss_and_norm
from parallax.wrap_left_out import LeftOut
from parallax.wrap_rules import check_elementwise
from parallax.wrap_state import FlatState

if TYPE_CHECKING:
    from parallax.wrap import DataParallel

__all__ = ["Optimizer"]

Hook = Callable[..., Any]
WHEN = ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")
"""The hooks that torch's optimizers have."""


class Optimizer(torch.optim.Optimizer):
    """The given optimizer over this rank's flat segments. Elementwise ones only: AdamW, SGD, Lion and the like.
    Those known by name to look at whole tensors are refused; elementwise=True vouches for one that is only named so.

    `clip_grad_norm_` is to be used instead of torch's with zero > 0, where a rank has a part of the gradients alone and
    `param.grad` is None. Learning-rate schedulers of torch work on it.
    """

    def __init__(
        self,
        model: DataParallel,
        kind: Callable[..., torch.optim.Optimizer],
        *,
        elementwise: bool = False,
        **options: Any,
    ) -> None:
        # Not torch's own __init__: the parameters and their state are the inner optimizer's.
        if isinstance(kind, type) and not elementwise:
            check_elementwise(kind)
        self.model = model
        self._flat = FlatOptimizer(
            {0: model.flat},
            lambda groups: kind(groups, **options),
            lambda kind: {} if kind == "decay" else {"weight_decay": 0.0},
        )
        self.inner = self._flat.inner
        self._left_out = LeftOut(self._flat, model.flat)
        self._state = FlatState(model, self._flat)
        if "weight_decay" not in self.inner.defaults:  # which only who was built knows: defaults, a partial
            for group in self.inner.param_groups:
                group.pop("weight_decay", None)
        if not elementwise:
            check_elementwise(type(self.inner))
        self._hooks: dict[str, OrderedDict[int, Hook]] = {when: OrderedDict() for when in WHEN}
        self.defaults = self.inner.defaults
        model.when_loaded(self._flat.refresh)
        if model.flat.level == 0:
            model.when_reduced(self._flat.show_grads)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by torch's GradScaler at each step, which unscales and checks the gradients itself."""
        level = self.model.flat.level
        if level or self.model.joining or self.model.lossy:
            raise ConfigError(
                f"a GradScaler needs every rank's whole gradients at every step; zero={level}, join or lossy "
                "compression hide them: use zero=0 without these, or bfloat16, which needs no GradScaler"
            )
        return False

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    def synchronize(self) -> None:
        """Wait until the gradients are reduced, for who wants to look at them before the step."""
        self.model.reduce()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale the mean gradients so that their norm over the whole model is at most max_norm; returns the norm."""
        self.model.reduce()
        if self.model.joining:
            self._agree(max_norm)
        else:
            self.model.take_grads()
        return self._clip(max_norm)

    def _clip(self, max_norm: float) -> float:
        flat, model = self.model.flat, self.model
        grads = [flat.grads_of(segment) for segment in flat.segments]
        if flat.grad_dtype.is_complex:  # the norm of its real and imaginary parts
            grads = [torch.view_as_real(grad) for grad in grads]
        pieces = [(p.spec, grads[p.segment][p.start : p.stop]) for p in flat.pieces]
        zero = torch.zeros((), dtype=torch.float64, device=model.mesh.device)
        _, norm, _ = global_loss_and_norm(zero, pieces, model.order, model.mesh, model.shards)
        clip_gradients(grads, norm, max_norm)
        model.note_grads()
        return norm

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Reduce what is left, update, let every rank have the new parameters, and begin with zero gradients."""
        if closure is not None:
            raise ConfigError("an optimizer over data ranks takes no closure; call backward before step")
        self.model.after_backward.reduce_late()
        if self.model.joining:
            while (max_norm := self._agree()) is not None:  # a rank without batches clips when the others do
                self._clip(max_norm)
        for hook in self._hooks["step_pre"].values():
            hook(self, (), {})
        self.model.check_step()
        with self._left_out.kept(self.model.left_out):
            self._flat.step()
        self.model.sync.publish()
        self.model.send_buffers()
        self.model.begin_step()
        for hook in self._hooks["step_post"].values():
            hook(self, (), {})

    def register_step_pre_hook(self, hook: Hook) -> RemovableHandle:
        """Have hook(optimizer, (), {}) called before each update, when the gradients are reduced."""
        return self._register("step_pre", hook)

    def register_step_post_hook(self, hook: Hook) -> RemovableHandle:
        """Have hook(optimizer, (), {}) called after each update, when the gradients are gone."""
        return self._register("step_post", hook)

    def register_state_dict_pre_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Have hook(optimizer) called before a state dict is made."""
        return self._register("state_dict_pre", hook, prepend)

    def register_state_dict_post_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Have hook(optimizer, state_dict) called when it is made; what it returns, if anything, takes its place."""
        return self._register("state_dict_post", hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Have hook(optimizer, state_dict) called before it is loaded; what it returns, if anything, is."""
        return self._register("load_state_dict_pre", hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Hook, prepend: bool = False) -> RemovableHandle:
        """Have hook(optimizer) called when a state dict is loaded."""
        return self._register("load_state_dict_post", hook, prepend)

    def _register(self, when: str, hook: Hook, prepend: bool = False) -> RemovableHandle:
        handle = RemovableHandle(self._hooks[when])
        self._hooks[when][handle.id] = hook
        if prepend:
            self._hooks[when].move_to_end(handle.id, last=False)
        return handle

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copy and pickle ask for. A second owner of the module's gradients there cannot be."""
        raise ConfigError(
            "an optimizer of a wrapped module can be neither copied nor pickled; keep optimizer.whole_state_dict() "
            "and load it into another parallax.optimizer(model, ...)"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ConfigError("this optimizer has the wrapped module's parameters; add others to the module, then wrap it")

    def _agree(self, max_norm: float | None = None) -> float | None:
        """What comes next on all ranks: a clip to the norm that is returned, or, with None, the update.

        A rank that has run out of batches has no scheduler that goes on: it takes the others' learning rates.
        """
        self.model.take_grads()
        mine = [0.0 if max_norm is None else 1.0, max_norm or 0.0, float(self.model.changes())]
        mine += [group["lr"] if self.model.active else float("-inf") for group in self.param_groups]
        agreed = torch.tensor(mine, dtype=torch.float64, device=self.model.mesh.device)
        clips, norm, changes, *rates = all_reduce(agreed, self.model.mesh.grad, "max").tolist()
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate
        self.model.follow_changes(changes)
        return norm if clips else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients; after `step` they are zero already."""
        self.model.drop_gradients()

    def state_dict(self) -> dict[str, Any]:
        """At zero=0 as torch's own optimizers have it, with masters where they are apart from the model; any rank may
        ask, any zero and number of ranks load it. From zero=1 on this rank's part, marked as such: see
        `whole_state_dict`.
        """
        return self._saved(self._state.part if self._state.cut else self._state.whole)

    def whole_state_dict(self) -> dict[str, Any]:
        """The whole state at any zero, as torch's own optimizers have it: by parameter, in the module's order.

        All ranks call it and have it; one may save it for all. Any zero and number of ranks load it. A collective from
        zero=1 on, of (n-1)/n of the state's bytes and 520 bytes more.
        """
        return self._saved(self._state.whole)

    def _saved(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        for hook in self._hooks["state_dict_pre"].values():
            hook(self)
        state_dict = make() | self._left_out.saved()
        for hook in self._hooks["state_dict_post"].values():
            found = hook(self, state_dict)
            state_dict = state_dict if found is None else found
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a whole state, of this class or of torch's, or this rank's own part. All ranks call it.

        Raises ConfigError for another rank's part and for what does not fit, on every rank of the shards, which hear of
        each other's: 520 bytes.
        """
        for hook in self._hooks["load_state_dict_pre"].values():
            found = hook(self, state_dict)
            state_dict = state_dict if found is None else found
        self._state.load(state_dict)
        self._left_out.load(state_dict)
        for hook in self._hooks["load_state_dict_post"].values():
            hook(self)
