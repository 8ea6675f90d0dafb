"""AdamW over flat buffers, with float32 master weights where the model computes in less."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from parallax.config import OptimizerConfig
from parallax.data.buckets import FlatBuffers

__all__ = ["AdamW"]


class _Flat:
    """The optimizer's view of one stage: masters, first and second moments, each laid out like `flat.values`."""

    def __init__(self, flat: FlatBuffers) -> None:
        self.flat = flat
        narrow = flat.values.dtype in (torch.bfloat16, torch.float16)
        self.master = flat.values.float() if narrow else flat.values
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        ranges = [(0, flat.decay_stop, True), (flat.decay_stop, flat.stop, False)]
        self.parts = [(nn.Parameter(self.master[a:b]), a, b, decay) for a, b, decay in ranges if b > a]

    @property
    def narrow(self) -> bool:
        return self.master is not self.flat.values

    def gradient(self, start: int, stop: int) -> Tensor:
        grad = self.flat.grads[start:stop]
        return grad if grad.dtype == self.master.dtype else grad.to(self.master.dtype)


class AdamW:
    """torch's fused AdamW (arXiv:1711.05101) over a few flat tensors a stage. Norms and biases do not decay.

    The state is laid out as the parameters are, so that the checkpoint cuts both alike. Collectives: none.
    """

    def __init__(self, config: OptimizerConfig, flats: Mapping[int, FlatBuffers]) -> None:
        self._flats = {stage: _Flat(flat) for stage, flat in flats.items()}
        groups = [
            {
                "params": [p for f in self._flats.values() for p, _, _, d in f.parts if d == decay],
                "weight_decay": weight,
            }
            for decay, weight in ((True, config.weight_decay), (False, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for flat in self._flats.values():
            for parameter, start, stop, _ in flat.parts:
                self._adamw.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": flat.exp_avg[start:stop],
                    "exp_avg_sq": flat.exp_avg_sq[start:stop],
                }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with this learning rate from the gradients in the flat buffers."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for flat in self._flats.values():
            for parameter, start, stop, _ in flat.parts:
                parameter.grad = flat.gradient(start, stop)
        self._adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the model's own parameters, where they are not the same memory."""
        for flat in self._flats.values():
            if flat.narrow:
                flat.flat.values.copy_(flat.master)

    def set_step(self, step: int) -> None:
        """Resume the bias correction at this many steps done."""
        for state in self._adamw.state.values():
            state["step"].fill_(float(step))

    def flat_state(self, stage: int) -> dict[str, Tensor]:
        """What a checkpoint holds of a stage, by kind: flat tensors laid out like the stage's values."""
        flat = self._flats[stage]
        return {"parameters": flat.master, "exp_avg": flat.exp_avg, "exp_avg_sq": flat.exp_avg_sq}
