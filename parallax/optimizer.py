"""AdamW over flat buffers, with float32 master weights where the model computes in less."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallax.config import OptimizerConfig
from parallax.data.buckets import FlatBuffers

__all__ = ["AdamW"]


class _Flat:
    """The optimizer's view of one stage: for each segment that this rank updates its master and two moments."""

    def __init__(self, flat: FlatBuffers) -> None:
        self.flat = flat
        self.narrow = flat.dtype in (torch.bfloat16, torch.float16)
        values = [flat.values_of(segment) for segment in flat.segments]
        self.masters = [v.float() if self.narrow else v for v in values]
        self.exp_avg = [torch.zeros_like(master) for master in self.masters]
        self.exp_avg_sq = [torch.zeros_like(master) for master in self.masters]
        self.parameters = [nn.Parameter(master) for master in self.masters]

    def set_gradients(self) -> None:
        for parameter, segment in zip(self.parameters, self.flat.segments, strict=True):
            parameter.grad = self.flat.grads_of(segment).to(parameter.dtype)


class AdamW:
    """torch's fused AdamW (arXiv:1711.05101) over a few flat tensors a stage. Norms and biases do not decay.

    The state is laid out as the segments of the parameters are, so that the checkpoint cuts both alike, and a rank has
    state for what it updates alone. Collectives: none.
    """

    def __init__(self, config: OptimizerConfig, flats: Mapping[int, FlatBuffers]) -> None:
        self._flats = {stage: _Flat(flat) for stage, flat in flats.items()}
        groups = [
            {
                "params": [
                    parameter
                    for f in self._flats.values()
                    for parameter, segment in zip(f.parameters, f.flat.segments, strict=True)
                    if segment.decay == decay
                ],
                "weight_decay": weight,
            }
            for decay, weight in ((True, config.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for flat in self._flats.values():
            for parameter, exp_avg, exp_avg_sq in zip(flat.parameters, flat.exp_avg, flat.exp_avg_sq, strict=True):
                self._adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": exp_avg,
                    "exp_avg_sq": exp_avg_sq,
                }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with this learning rate from the gradients in the flat buffers."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for flat in self._flats.values():
            flat.set_gradients()
        self._adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's own parameters, where they are not the same memory."""
        for flat in self._flats.values():
            if flat.narrow:
                for segment, master in zip(flat.flat.segments, flat.masters, strict=True):
                    flat.flat.values_of(segment).copy_(master)

    def set_step(self, step: int) -> None:
        """Resume the bias correction at this many steps done."""
        for state in self._adamw.state.values():
            state["step"].fill_(float(step))

    def flat_state(self, stage: int) -> dict[str, list[Tensor]]:
        """What a checkpoint holds of a stage, by kind: a tensor for each of the stage's segments."""
        flat = self._flats[stage]
        return {"parameters": flat.masters, "exp_avg": flat.exp_avg, "exp_avg_sq": flat.exp_avg_sq}
