"""Where weight gradients go: one sink per stage, between the layers that make them and the data axis that sums them.

A layer hands the sink a parameter and a function that adds the gradient to a buffer. The sink calls it at once (a full
backward, B), or keeps it until the schedule says W. A layer without a sink returns its weight gradient through
autograd, as any torch module does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["Accumulate", "GradSink", "attach", "for_autograd"]

Accumulate = Callable[[Tensor], None]
"""Adds one microbatch's gradient to the buffer that it is given."""


class GradSink:
    """Adds weight gradients to flat buffers, now or later, and tells who listens when a parameter has got its share.

    through_autograd: somebody has hooks on the parameters, which autograd runs where it knows of them alone.
    """

    def __init__(self) -> None:
        self.through_autograd = False
        self.buffer_of: Callable[[nn.Parameter], Tensor] | None = None
        self.on_accumulated: Callable[[nn.Parameter], None] | None = None
        self._kept: list[tuple[nn.Parameter, Accumulate]] | None = None

    def add(self, parameter: nn.Parameter, accumulate: Accumulate) -> None:
        """Take one gradient: run `accumulate` on the parameter's buffer, or keep it while `keep` is in force."""
        if self._kept is None:
            self._run(parameter, accumulate)
        else:
            self._kept.append((parameter, accumulate))

    def keep(self) -> None:
        """From here on keep what comes in (I, the input-gradient pass)."""
        self._kept = []

    @property
    def keeping(self) -> bool:
        """Whether `keep` is in force."""
        return self._kept is not None

    def take(self) -> list[tuple[nn.Parameter, Accumulate]]:
        """End `keep`; returns what it kept, for `run` (W, the weight-gradient pass)."""
        kept, self._kept = self._kept or [], None
        return kept

    def run(self, kept: list[tuple[nn.Parameter, Accumulate]]) -> None:
        """Run what `take` returned, freeing each activation once it is used."""
        kept.reverse()
        while kept:
            self._run(*kept.pop())

    def _run(self, parameter: nn.Parameter, accumulate: Accumulate) -> None:
        if torch.is_grad_enabled():  # W runs outside of autograd's backward
            with torch.no_grad():
                return self._run(parameter, accumulate)
        assert self.buffer_of is not None, "nobody has said where gradients go"
        accumulate(self.buffer_of(parameter))
        if self.on_accumulated is not None:
            self.on_accumulated(parameter)


def for_autograd(parameter: nn.Parameter | None, sink: GradSink | None, x: Tensor) -> nn.Parameter | None:
    """The parameter where autograd must know of it: without a sink, or where nothing else makes it run the backward.
    Each that it knows of costs a node of the graph that is visited for nothing.
    """
    return None if sink is not None and x.requires_grad and not sink.through_autograd else parameter


def attach(model: nn.Module, sink: GradSink | None) -> None:
    """Make every layer of the model that knows of sinks use this one."""
    for module in model.modules():
        if hasattr(module, "sink"):
            module.sink = sink  # type: ignore[assignment]
