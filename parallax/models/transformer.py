"""One decoder-only transformer, GPT-2 or Llama shaped by configuration, built from parallax layers.

A `Transformer` is a contiguous span of the model's units: unit 0 is the embedding, 1 to L are the layers, L + 1 is the
final norm with the head and the loss. Names are canonical whatever the span: layer 3 is `layers.3` on every stage.
Activations between units are [N, D], N = B*T tokens of one microbatch, sample after sample; with sequence
parallelism each tensor rank holds N/tensor of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from parallax.batches import IGNORE, Microbatch
from parallax.compiled import pick
from parallax.config import ModelConfig
from parallax.mesh import Mesh
from parallax.models.activation import gelu, swiglu
from parallax.models.attention import Attention, rotary_table
from parallax.models.costs import fuses_loss, recomputes_layer
from parallax.models.offload import offloaded
from parallax.models.recompute import recomputed
from parallax.params import Init, Layout
from parallax.rng import derive_key
from parallax.tensor.float8 import quantize
from parallax.tensor.fused_loss import linear_cross_entropy
from parallax.tensor.layers import (
    ColumnParallelLinear,
    ParallelLinear,
    Piece,
    RowParallelLinear,
    VocabParallelEmbedding,
    shown_to_others,
    vocab_layout,
    vocab_range,
)
from parallax.tensor.loss import vocab_parallel_cross_entropy
from parallax.tensor.norms import LayerNorm, RMSNorm, keyed_dropout
from parallax.tensor.ops import token_range

__all__ = ["TIED", "Transformer", "num_units"]

TIED = ("embedding.token.weight", "head.weight")
"""The embedding, and the head that shares it where `tie_embeddings` is set."""


def num_units(config: ModelConfig) -> int:
    """Embedding, layers, head."""
    return config.layers + 2


def make_norm(config: ModelConfig, mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype) -> nn.Module:
    options = {"sequence_parallel": sequence_parallel, "eps": config.norm_eps, "device": "meta", "dtype": dtype}
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden, mesh.tensor, **options)  # type: ignore[arg-type]
    return LayerNorm(config.hidden, mesh.tensor, bias=config.bias, **options)  # type: ignore[arg-type]


class TokenRows:
    """Which global tokens this rank's rows of a microbatch are: what dropout and positions are keyed by."""

    def __init__(self, microbatch: Microbatch, mesh: Mesh, sequence_parallel: bool) -> None:
        num_samples, length = microbatch.tokens_BT.shape
        positions = torch.arange(length, device=microbatch.tokens_BT.device)
        rows = (microbatch.samples_B[:, None] * length + positions).view(-1)
        if sequence_parallel:
            rows = rows[slice(*token_range(rows.numel(), mesh.tensor))]
        self.rows_n = rows
        self.positions_n = rows % length
        self.samples_B = microbatch.samples_B
        self.shape = (num_samples, length)
        self.step = microbatch.step


class Embedding(nn.Module):
    """Token embedding, plus learned positions where the config asks for them. ids_BT -> x_nD."""

    is_block = True

    def __init__(
        self, config: ModelConfig, mesh: Mesh, sequence_length: int, sequence_parallel: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.token = VocabParallelEmbedding(
            config.vocab,
            config.hidden,
            mesh.tensor,
            sequence_parallel=sequence_parallel,
            multiple=config.vocab_multiple,
            init_std=config.init_std,
            device="meta",
            dtype=dtype,
        )
        self.position: PositionEmbedding | None = None
        if config.positions == "learned":
            length = config.num_positions(sequence_length)
            self.position = PositionEmbedding(length, config, mesh, sequence_parallel, dtype)

    def forward(self, tokens_BT: Tensor, rows: TokenRows) -> Tensor:
        x = self.token(tokens_BT.reshape(-1))
        return x if self.position is None else x + self.position(rows.positions_n)


class PositionEmbedding(VocabParallelEmbedding):
    """Learned positions, replicated on tensor: an embedding over an axis of one rank.

    With sequence parallelism a rank looks up its own tokens only, so the gradient is a partial sum over tensor.
    """

    def __init__(
        self, length: int, config: ModelConfig, mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(length, config.hidden, mesh.expert, init_std=config.init_std, device="meta", dtype=dtype)
        self.layouts = {
            "weight": Layout(
                (length, config.hidden),
                sum_over=("tensor",) if sequence_parallel else (),
                owned=mesh.tensor.rank == 0,
                init=Init(std=config.init_std),
            )
        }


class MLP(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) with gate and up in one product. x_nD -> x_nD."""

    compiled = False

    def __init__(self, config: ModelConfig, mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.gated = config.activation == "swiglu"
        names = ("gate", "up") if self.gated else ("up",)
        self.up = ColumnParallelLinear(
            config.hidden,
            config.ffn_size * len(names),
            mesh.tensor,
            bias=config.bias,
            sequence_parallel=sequence_parallel,
            pieces=[Piece(name, config.ffn_size) for name in names],
            init_std=config.init_std,
            device="meta",
            dtype=dtype,
        )
        self.down = RowParallelLinear(
            config.ffn_size,
            config.hidden,
            mesh.tensor,
            bias=config.bias,
            sequence_parallel=sequence_parallel,
            init_std=config.init_std / (2 * config.layers) ** 0.5,
            device="meta",
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            return self.down(swiglu(h, self.compiled))
        return self.down(gelu(h, self.compiled, overwrite=not shown_to_others(self.up)))


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x_nD -> x_nD."""

    compiled = False

    def __init__(
        self, index: int, config: ModelConfig, mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.index, self.dropout = index, config.dropout
        self.attention_norm = make_norm(config, mesh, sequence_parallel, dtype)
        self.attention = Attention(index, config, mesh, sequence_parallel, dtype)
        self.mlp_norm = make_norm(config, mesh, sequence_parallel, dtype)
        self.mlp = MLP(config, mesh, sequence_parallel, dtype)

    def forward(self, x: Tensor, rows: TokenRows, rotary: Tensor | None, dropout_seed: int | None) -> Tensor:
        y = self.attention(self.attention_norm(x), rows, rotary, dropout_seed)
        x = x + self._drop(y, rows, dropout_seed, "attention")
        return x + self._drop(self.mlp(self.mlp_norm(x)), rows, dropout_seed, "mlp")

    def _drop(self, y: Tensor, rows: TokenRows, seed: int | None, where: str) -> Tensor:
        if seed is None or self.dropout == 0:
            return y
        key = derive_key(seed, rows.step, self.index, where)
        return keyed_dropout(y, rows.rows_n, key, self.dropout, self.compiled)


class Head(ColumnParallelLinear):
    """Vocabulary-parallel output layer and loss. x_nD, targets_N -> scale times the sum of the losses, float64.

    Where the logits would take too much they are never all there (tensor/fused_loss.py).

    With `tie_embeddings` its weight is the embedding's: the same canonical parameter, a gradient of its own.
    """

    is_block = True

    def __init__(self, config: ModelConfig, mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype) -> None:
        start, stop, rows = vocab_range(config.vocab, mesh.tensor, config.vocab_multiple)
        super().__init__(
            config.hidden,
            rows * mesh.tensor.size,
            mesh.tensor,
            bias=False,
            sequence_parallel=sequence_parallel,
            device="meta",
            dtype=dtype,
        )
        self.vocab_range = (start, stop)
        layout = vocab_layout(config.vocab, config.hidden, mesh.tensor, (start, stop), config.init_std)
        self.layouts = {"weight": (replace(layout, tied_to=TIED[0] if config.tie_embeddings else None),)}

    def forward(self, x: Tensor, targets_N: Tensor | None = None, scale: float | Tensor = 1.0) -> Tensor:
        """Logits [N, v]; the loss where there are targets."""
        if targets_N is None:
            return super().forward(x)
        options: dict[str, Any] = {"vocab_range": self.vocab_range, "ignore_index": IGNORE, "scale": scale}
        if fuses_loss(targets_N.numel(), self.weight.shape[0]):
            return linear_cross_entropy(x, self, targets_N, **options)
        return vocab_parallel_cross_entropy(super().forward(x), targets_N, self.tensor, overwrite=True, **options)


class Transformer(nn.Module):
    """Units [first, last) of the model, on the meta device until its buffers are made.

    forward takes the activations of the stage before (None on the first stage), the microbatch, and the loss scale. It
    returns the activations for the next stage, or on the last stage scale times the sum of the token losses (float64).
    seed: keys dropout; training alone drops. recompute: none, selective (the core of attention), full (every layer) or
    every-N (one layer of N). float8: the products of the layers' linear layers are in 8 bits. offload: what the layers
    keep for the backward lives in the host's memory. compiled: what is elementwise goes through torch.compile.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        units: Sequence[int],
        *,
        sequence_length: int,
        sequence_parallel: bool = False,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        recompute: str = "none",
        float8: bool = False,
        offload: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.mesh, self.seed, self.dtype = config, mesh, seed, dtype
        self.recompute, self.offload, self.compiled = recompute, offload, compiled
        self.sequence_parallel = sequence_parallel and mesh.tensor.size > 1
        self._rotary: Tensor | None = None
        args = (config, mesh, self.sequence_parallel, dtype)
        self.embedding = self.final_norm = self.head = None
        if 0 in units:
            self.embedding = Embedding(config, mesh, sequence_length, self.sequence_parallel, dtype)
        self.layers = nn.ModuleDict({str(u - 1): Layer(u - 1, *args) for u in units if 1 <= u <= config.layers})
        for module in self.layers.modules():
            if isinstance(module, ParallelLinear):
                module.narrow = pick(quantize, compiled) if float8 else None
        if config.layers + 1 in units:
            self.final_norm = make_norm(*args)
            self.head = Head(*args)
        for module in self.modules():
            if hasattr(module, "compiled"):
                module.compiled = compiled  # type: ignore[assignment]

    def boundary_shape(self, num_samples: int, sequence_length: int) -> tuple[int, int]:
        """Shape of the activations that a microbatch sends between stages, on this rank."""
        tokens = num_samples * sequence_length
        return (tokens // (self.mesh.tensor.size if self.sequence_parallel else 1), self.config.hidden)

    def forward(self, x: Tensor | None, microbatch: Microbatch, scale: float | Tensor) -> Tensor:
        rows = TokenRows(microbatch, self.mesh, self.sequence_parallel)
        drop_seed = self.seed if self.training and self.config.dropout > 0 else None
        if self.embedding is not None:
            x = embedded = self.embedding(microbatch.tokens_BT, rows)
            if drop_seed is not None:
                key = derive_key(drop_seed, rows.step, "embedding")
                x = keyed_dropout(embedded, rows.rows_n, key, self.config.dropout, self.compiled)
        rotary = self._rotary_for(rows.shape[1], microbatch.tokens_BT.device)
        with offloaded() if self.offload and self.training else nullcontext():
            for layer in self.layers.values():
                assert isinstance(layer, Layer)
                layer.attention.recompute_core = self.recompute == "selective"
                again = self.training and recomputes_layer(self.recompute, layer.index)
                x = recomputed(layer, x, rows, rotary, drop_seed) if again else layer(x, rows, rotary, drop_seed)
        if self.head is None or self.final_norm is None:
            assert x is not None
            return x
        return self.head(self.final_norm(x), microbatch.targets_BT.reshape(-1), scale)

    def _rotary_for(self, length: int, device: torch.device) -> Tensor | None:
        if self.config.positions != "rotary":
            return None
        if self._rotary is None or self._rotary.shape[0] != length:
            self._rotary = rotary_table(length, self.config.head_size, self.config.rope_theta, device, self.dtype)
        return self._rotary
