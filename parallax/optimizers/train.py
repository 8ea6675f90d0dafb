"""The optimizers that a configuration names: elementwise updates of flat segments, a chunk at a time.

A chunk of parameters, its gradient and its state are all that an update needs at once. So the state may be kept
elsewhere (in the memory of the host: optimizer.offload) or in less (bfloat16, rounded stochastically), and be brought
up for its chunk alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial

import torch
from torch import Tensor

from parallax.config import OptimizerConfig
from parallax.data.buckets import FlatBuffers
from parallax.data.layout import Piece, Segment
from parallax.optimizers.chance import Rows, bits_by_box, places_of
from parallax.optimizers.masters import Masters
from parallax.optimizers.rules import RULES, Update
from parallax.params import ParamSpec
from parallax.precision.rounding import round_stochastically
from parallax.rng import derive_key

__all__ = ["TrainOptimizer", "kind_of"]

CHUNK, ON_A_GPU = 1 << 22, 1 << 24
"""Elements that are brought up at once: 16 MB of each float32 tensor; 64 MB where a GPU updates, in fewer kernels."""


def kind_of(config: OptimizerConfig) -> Callable[[ParamSpec], str]:
    """How the optimizer treats a parameter: `decay` or `no_decay`, and with Muon `hidden` or `hidden_no_decay`."""

    def kind(spec: ParamSpec) -> str:
        decays = spec.decay and not any(fnmatch(spec.name, pattern) for pattern in config.no_decay or ())
        if config.name == "muon" and spec.hidden:
            return "hidden" if decays else "hidden_no_decay"
        return "decay" if decays else "no_decay"

    return kind


class TrainOptimizer(Masters):
    """An elementwise rule over this rank's segments; the numbers do not depend on how they are cut into chunks.

    seed: of the rounding of bfloat16 state. State of an element is rounded by a function of (seed, step, name, global
    element), so no mesh shows. Collectives: none.
    """

    def __init__(self, config: OptimizerConfig, flats: Mapping[int, FlatBuffers], seed: int = 0) -> None:
        super().__init__(flats, torch.device("cpu") if config.offload else None)
        self.config, self.seed, self.num_steps = config, seed, 0
        self.rule = RULES["adamw" if config.name == "muon" else config.name]
        wide = any(flat.dtype == torch.float64 for flat in flats.values())
        self.narrow_state = config.state_dtype == "bfloat16" and not wide
        self._chunked = self.narrow_state or config.offload
        self._rows: dict[tuple[int, int, int], Rows] = {}
        self.state: dict[int, list[dict[str, Tensor]]] = {
            stage: [self.empty_state(segment, master) for segment, master in zip(flat.segments, own, strict=True)]
            for (stage, flat), own in zip(flats.items(), self.masters.values(), strict=True)
        }

    def empty_state(self, segment: Segment, master: Tensor) -> dict[str, Tensor]:
        """The state of a segment before the first step, so that a checkpoint finds its places."""
        names = self.state_of(segment)
        dtype = torch.bfloat16 if self.narrow_state else master.dtype
        pinned = self.config.offload and torch.cuda.is_available()
        return {n: torch.zeros(master.shape, dtype=dtype, device=master.device, pin_memory=pinned) for n in names}

    def state_of(self, segment: Segment) -> tuple[str, ...]:
        """The names of what is kept for a segment."""
        return () if self.config.name == "sgd" and not self.config.momentum else self.rule.state

    def step_at(self, lr: float) -> None:
        """One update with this learning rate, from the gradients in the flat buffers."""
        with torch.no_grad():
            for stage, flat in self.flats.items():
                for index, segment in enumerate(flat.segments):
                    if not segment.kind.startswith("hidden"):
                        decay = self.config.weight_decay if segment.kind == "decay" else 0.0
                        self._update(stage, flat, index, Update(self.config, self.num_steps, lr, decay))
        self.num_steps += 1

    def _update(self, stage: int, flat: FlatBuffers, index: int, update: Update) -> None:
        segment, master = flat.segments[index], self.masters[stage][index].data
        state, values = self.state[stage][index], flat.values_of(segment)
        for chunk, grad in self._chunks(flat.grads_of(segment), master):
            here = {name: kept[chunk] for name, kept in state.items()}
            wide = {name: kept.to(master.dtype) for name, kept in here.items()}  # the very same where it is wide
            self.rule.apply(master[chunk], grad, wide, update)
            if self.narrow_state:
                self._store(stage, index, here, wide, chunk)
            if self.apart:
                values[chunk].copy_(master[chunk], non_blocking=True)

    def _chunks(self, grads: Tensor, master: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk and its gradient where the master lives, fetched while the one before is worked on."""
        at_once = ON_A_GPU if master.is_cuda else CHUNK
        size = at_once if self._chunked else max(1, grads.numel())
        cuts = [slice(at, min(at + size, grads.numel())) for at in range(0, grads.numel(), size)]
        if grads.device == master.device:
            for cut in cuts:
                yield cut, grads[cut].to(master.dtype)
            return
        # Note: fetching. Two pinned buffers and a stream of its own: the copy of the next gradient runs beside the
        # update of this one. The stream waits for the backward; the host waits for the copy alone.
        stream = torch.cuda.Stream(grads.device)
        stream.wait_stream(torch.cuda.current_stream(grads.device))
        buffers = [torch.empty(size, dtype=grads.dtype, pin_memory=True) for _ in cuts[:2]]
        done: list[torch.cuda.Event] = []

        def fetch(number: int) -> None:
            with torch.cuda.stream(stream):
                part = grads[cuts[number]]
                buffers[number % 2][: part.numel()].copy_(part, non_blocking=True)
                done.append(torch.cuda.Event())
                done[-1].record(stream)

        fetch(0)
        for number, cut in enumerate(cuts):
            if number + 1 < len(cuts):
                fetch(number + 1)
            done[number].synchronize()
            yield cut, buffers[number % 2][: cut.stop - cut.start].to(master.dtype)

    def _store(self, stage: int, index: int, kept: dict[str, Tensor], wide: dict[str, Tensor], chunk: slice) -> None:
        pieces = [piece for piece in self.flats[stage].pieces if piece.segment == index]
        draw = self._drawing(stage, index, pieces, chunk)
        for name, tensor in kept.items():
            bits = draw([derive_key(self.seed, self.num_steps, name, piece.spec.name) for piece in pieces])
            tensor.copy_(round_stochastically(wide[name], bits))

    def _drawing(self, stage: int, index: int, pieces: list[Piece], chunk: slice) -> Callable[[list[int]], Tensor]:
        """What makes the bits of a chunk from its pieces' keys, in the way that suits the device."""
        size, device, where = chunk.stop - chunk.start, self.masters[stage][index].device, (stage, index, chunk.start)
        if device.type != "cuda":
            return partial(bits_by_box, places_of(pieces, chunk), size=size)
        if where not in self._rows:
            self._rows[where] = Rows(places_of(pieces, chunk), size, device)
        return self._rows[where].bits

    def set_step(self, step: int) -> None:
        """Resume the bias correction at this many steps done."""
        self.num_steps = step

    def flat_state(self, stage: int) -> dict[str, list[Tensor | None]]:
        """What a checkpoint holds of a stage, by kind: a tensor, or nothing, for each of the stage's segments."""
        found: dict[str, list[Tensor | None]] = {"parameters": [m.detach() for m in self.masters[stage]]}
        kinds = sorted({name for state in self.state[stage] for name in state})
        return found | {kind: [state.get(kind) for state in self.state[stage]] for kind in kinds}
