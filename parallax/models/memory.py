"""What a stage takes on one rank, in bytes: predicted before anything is built. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from parallax.config import Config, resolve_batch
from parallax.config_fields import LOSSY
from parallax.models.costs import LOGITS_ON_A_GPU, fuses_loss, keeps_probabilities, unit_activations
from parallax.pipeline.split import Span, Unit

__all__ = ["MemoryModel", "StageMemory"]

MOMENTS = {"adamw": 2, "sgd": 1, "lion": 1, "muon": 1}


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes. optimizer: master weights and moments. activations: of all microbatches in flight."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations

    def __add__(self, other: StageMemory) -> StageMemory:
        return StageMemory(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class MemoryModel:
    """What ZeRO cuts counts by its part; gradients that are reduced once a step are whole until then. What lives in the
    host's memory (optimizer.offload) does not count. in_flight: by stage, the most microbatches at once.
    """

    def __init__(self, config: Config, units: Sequence[Unit], in_flight: Sequence[int]) -> None:
        self.config, self.units, self.in_flight = config, units, in_flight
        shape, data = config.mesh_shape, config.data
        self.size = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8": 2}[config.dtype]
        self.parts = (data.shard_size or shape.data * shape.context) if data.zero else 1
        batch = resolve_batch(config)
        self.tokens = batch.microbatch_size * config.corpus.sequence_length
        self.reduced_at_once = data.reduce == "microbatch" or batch.num_microbatches == 1
        length, dropout = config.corpus.sequence_length, config.model.dropout
        kept = keeps_probabilities(length, config.device != "cuda", config.dtype) and not dropout
        self.elements = unit_activations(
            config.model,
            kept_length=length if kept else 0,
            tensor=shape.tensor,
            sequence_parallel=config.tensor.sequence_parallel and shape.tensor > 1,
            recompute=config.recompute,
        )

    def of(self, stage: int, span: Span) -> StageMemory:
        """The memory of a stage that holds the units [first, last)."""
        data, (first, last) = self.config.data, span
        params = sum(unit.params for unit in self.units[first:last]) / self.config.mesh_shape.tensor
        grad: float = self.size if self.size == 8 or data.grad_dtype == "parameter" else 4
        if data.zero >= 2 and self.reduced_at_once:
            grad /= self.parts
        if data.compression in LOSSY:  # what is owed, before and after the step
            grad += 2 * max(4, self.size)
        values = self.size / self.parts if data.zero == 3 and data.gather == "block" else self.size
        activations = self.in_flight[stage] * sum(self._activations(unit) for unit in range(first, last))
        if last == len(self.units) and self.config.device == "cuda":
            activations += self._loss()
        return StageMemory(params * values, params * grad, params * self._state() / self.parts, activations)

    def _loss(self) -> float:
        """What a GPU has of the loss for a moment: probabilities, and logits that are not held; without those that are
        widened on their way to the softmax, 64 MB at most.
        """
        logits = self.tokens * self.config.model.vocab / self.config.mesh_shape.tensor
        wide = max(4, self.size)
        if not fuses_loss(self.tokens, logits / self.tokens):
            return logits * wide
        return min(logits, LOGITS_ON_A_GPU) * (self.size + wide)

    def _state(self) -> float:
        """Bytes of masters and moments for each parameter that a rank updates."""
        optimizer = self.config.optimizer
        if optimizer.offload and self.config.device != "cpu":
            return 0.0
        master = 4 if self.size == 2 or optimizer.offload else 0
        moment = 2 if optimizer.state_dtype == "bfloat16" and self.size < 8 else max(4, self.size)
        return master + MOMENTS[optimizer.name] * moment

    def _activations(self, unit: int) -> float:
        width = self.config.model.vocab / self.config.mesh_shape.tensor
        held = self.elements[unit] * self.tokens
        if unit == len(self.units) - 1 and fuses_loss(self.tokens, width):
            held += (self.config.model.hidden - width) * self.tokens  # the gradient of its input for the logits
            return held * self.size + width * self.config.model.hidden * max(4, self.size)  # and that of its weight
        return held * self.size
