"""Causal self-attention with the heads cut along tensor; grouped key/value heads; norms of queries and keys; rotary
positions; keyed dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallax.compiled import pick
from parallax.config import ModelConfig
from parallax.mesh import Mesh
from parallax.models.blocked_attention import blocked_attention, suits
from parallax.models.recompute import recomputed
from parallax.rng import derive_key
from parallax.tensor.layers import ColumnParallelLinear, Piece, RowParallelLinear
from parallax.tensor.norms import RMSNorm, keyed_dropout

if TYPE_CHECKING:
    from parallax.models.transformer import TokenRows

__all__ = ["Attention", "rotary_table"]


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """cos and sin of position times frequency (arXiv:2104.09864): [T, 2, K/2]. Computed in float64."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()], dim=1).to(dtype)


class _Rotary(torch.autograd.Function):
    """In one pass, into memory of its own: the rest of the heads is copied along, so that all stay side by side."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, num_heads: int, compiled: bool) -> Tensor:
        ctx.num_heads, ctx.compiled = num_heads, compiled
        ctx.save_for_backward(table)
        return _rotation(compiled)(x, table[:, 0, None], table[:, 1, None], num_heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (table,) = ctx.saved_tensors
        rotated = _rotation(ctx.compiled)
        return rotated(grad, table[:, 0, None], -table[:, 1, None], ctx.num_heads), None, None, None


def _rotation(compiled: bool) -> Callable[..., Tensor]:
    return pick(_rotated, compiled, each_shape=True)  # torch 2.13 fails to compile it once for all shapes


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """cos, sin: [T, 1, K/2], broadcast over heads."""
    out = torch.empty_like(x)
    out[..., num_heads:, :] = x[..., num_heads:, :]
    first, second = x[..., :num_heads, :].chunk(2, dim=-1)
    to_first, to_second = out[..., :num_heads, :].chunk(2, dim=-1)
    torch.mul(first, cos, out=to_first)
    to_first.addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=to_second)
    to_second.addcmul_(first, sin)
    return out


def apply_rotary(x_BTHK: Tensor, table: Tensor, num_heads: int, compiled: bool = False) -> Tensor:
    """Rotate the pairs (k, k + K/2) of the first `num_heads` heads by the angle of their position: the half-split
    layout of Llama. The other heads (values) stay as they are.
    """
    return _Rotary.apply(x_BTHK, table, num_heads, compiled)


class Attention(nn.Module):
    """Query, key and value in one column-parallel product, SDPA over this rank's heads, a row-parallel output.

    x_nD -> x_nD. H/tensor query heads a rank; G/tensor key/value heads, or one that tensor/G ranks
    share where tensor > G. Collectives: those of the two layers.
    """

    compiled = False

    def __init__(
        self, index: int, config: ModelConfig, mesh: Mesh, sequence_parallel: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.index, self.dropout, self.head_dim = index, config.dropout, config.head_size
        self.num_heads, kv_heads, size = config.heads, config.num_kv_heads, mesh.tensor.size
        self.heads = config.heads // size
        self.kv_heads = max(1, kv_heads // size)
        self.first_head = mesh.tensor.rank * self.heads
        self.recompute_core = False
        kv_shards = min(size, kv_heads)
        width, kv_width = config.heads * self.head_dim, kv_heads * self.head_dim
        self.qkv = ColumnParallelLinear(
            config.hidden,
            width + 2 * kv_width,
            mesh.tensor,
            bias=config.bias,
            sequence_parallel=sequence_parallel,
            pieces=[Piece("q", width), Piece("k", kv_width, kv_shards), Piece("v", kv_width, kv_shards)],
            init_std=config.init_std,
            device="meta",
            dtype=dtype,
        )
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm, self.k_norm = (self._head_norm(config, mesh, dtype) for _ in range(2))
        self.out = RowParallelLinear(
            width,
            config.hidden,
            mesh.tensor,
            bias=config.bias,
            sequence_parallel=sequence_parallel,
            init_std=config.init_std / (2 * config.layers) ** 0.5,
            device="meta",
            dtype=dtype,
        )

    def _head_norm(self, config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> RMSNorm:
        """A norm whose one weight [K] serves every head. A rank sees its own heads only, and of key heads that
        several ranks share only its own queries' part of the gradient: so the gradient is a partial sum over tensor,
        with sequence parallelism and without.
        """
        return RMSNorm(
            self.head_dim, mesh.tensor, sequence_parallel=True, eps=config.norm_eps, device="meta", dtype=dtype
        )

    def forward(self, x: Tensor, rows: TokenRows, rotary: Tensor | None, dropout_seed: int | None) -> Tensor:
        num_samples, length = rows.shape
        h, g = self.heads, self.kv_heads
        qkv = self.qkv(x).view(num_samples, length, h + 2 * g, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split([h, g, g], dim=2)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], dim=2)
        if rotary is not None:
            qkv = apply_rotary(qkv, rotary, h + g, self.compiled)
        if self.recompute_core and self.training:  # arXiv:2205.05198, section 5: cheap to run, large to keep
            y = recomputed(self._core, qkv, rows, dropout_seed)
        else:
            y = self._core(qkv, rows, dropout_seed)
        return self.out(y.reshape(num_samples * length, h * self.head_dim))

    def _core(self, qkv: Tensor, rows: TokenRows, seed: int | None) -> Tensor:
        """[B, T, h + 2g, K] -> [B, T, h, K]."""
        if seed is None and suits(qkv, self.heads):
            return blocked_attention(qkv, self.heads)
        q, k, v = (x.transpose(1, 2) for x in qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=2))
        if seed is not None:
            return self._with_dropout(q, k, v, rows, seed).transpose(1, 2)
        grouped = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

    def _with_dropout(self, q: Tensor, k: Tensor, v: Tensor, rows: TokenRows, seed: int) -> Tensor:
        """The same attention written out, with dropout on the probabilities keyed by (sample, head, query, key)."""
        num_samples, length = rows.shape
        repeat = self.heads // self.kv_heads
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
        probabilities = scores.masked_fill_(future, -torch.inf).softmax(-1)
        heads = torch.arange(self.first_head, self.first_head + self.heads, device=q.device)
        row = rows.samples_B[:, None] * self.num_heads + heads
        row = row[:, :, None] * length + torch.arange(length, device=q.device)
        key = derive_key(seed, rows.step, self.index, "probabilities")
        return keyed_dropout(probabilities, row, key, self.dropout, self.compiled) @ v
