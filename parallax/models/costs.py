"""What each unit of the transformer costs: the numbers that the stage split, MFU and the plan are made of."""

from __future__ import annotations

from parallax.config import ModelConfig
from parallax.processor import processor

__all__ = ["LOGITS_ON_A_GPU", "fuses_loss", "keeps_probabilities", "recomputes_layer", "unit_activations", "unit_costs"]

FUSE_ABOVE = 1 << 24
"""Logits of a microbatch on a rank above which they are not held: 64 MB in float32."""
LOGITS_ON_A_GPU = 1 << 26
"""Of those that are not held, how many a GPU makes at once: its products want many rows, and few kernels."""
SHORTEST, LONGEST, BLOCK = 65, 512, 128
"""Of sequences whose attention is written out on a CPU, in blocks of queries (models/blocked_attention.py)."""


def keeps_probabilities(length: int, on_cpu: bool, dtype: str) -> bool:
    """Whether attention keeps its probabilities, which is the faster way for short sequences on a CPU. In bfloat16 too,
    computed in float32, but where the processor multiplies bfloat16 in tiles (AMX): there torch's kernel does it so.
    """
    suits = dtype in ("float32", "float64") or dtype == "bfloat16" and "amx_bf16" not in processor().flags
    return on_cpu and suits and SHORTEST <= length <= LONGEST


def _kept_probabilities(length: int) -> float:
    """A query's and head's, on average: a block's queries keep one for each key up to the end of their block."""
    blocks, rest = divmod(length, BLOCK)
    return (BLOCK * BLOCK * blocks * (blocks + 1) / 2 + rest * length) / length


def fuses_loss(num_tokens: int, width: float) -> bool:
    """Whether the head computes its loss without holding the logits: num_tokens by this rank's `width` columns."""
    return num_tokens * width > FUSE_ABOVE


def recomputes_layer(mode: str, index: int) -> bool:
    """Whether layer `index` is recomputed as a whole: with `full` each, with `every-N` one of N."""
    if mode.startswith("every-"):
        return index % int(mode.removeprefix("every-")) == 0
    return mode == "full"


def unit_costs(config: ModelConfig, sequence_length: int) -> list[tuple[str, float, int]]:
    """(name, forward FLOPs a token, parameters) of embedding, layers and head.

    A multiply-add is two FLOPs. Attention counts the causal half of the scores: 2*2*D*T/2 a token. A tied head
    has no parameters of its own. Norms, biases and activations are counted as parameters, not as FLOPs.
    """
    hidden, head_dim = config.hidden, config.head_size
    norm = hidden * (2 if config.norm == "layernorm" and config.bias else 1)
    width, kv_width = config.heads * head_dim, config.num_kv_heads * head_dim
    num_up = 2 if config.activation == "swiglu" else 1
    products = hidden * (width + 2 * kv_width) + width * hidden + (num_up + 1) * hidden * config.ffn_size
    biases = (width + 2 * kv_width + num_up * config.ffn_size + 2 * hidden) if config.bias else 0
    qk_norms = 2 * head_dim if config.qk_norm else 0
    layer = (2.0 * products + 2.0 * width * sequence_length, products + biases + 2 * norm + qk_norms)
    table = config.vocab * hidden
    positions = config.num_positions(sequence_length) * hidden
    head = 0 if config.tie_embeddings else table
    return [
        ("embedding", 0.0, table + positions),
        *((f"layers.{i}", *layer) for i in range(config.layers)),
        ("head", 2.0 * table, head + norm),
    ]


def unit_activations(
    config: ModelConfig,
    *,
    tensor: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    kept_length: int = 0,
) -> list[float]:
    """Elements a token that embedding, layers and head keep on a rank from F to B, in this model's layers.

    Each norm keeps its input (those of queries and keys too), each column layer its (gathered) input, attention q, k, v
    and its output, which is the row layer's input, the MLP what its activation needs and the row layer's input; the
    head its logits. Dropout masks are recomputed from their keys but their products are kept. A layer that is
    recomputed keeps its input alone, and attention whose core is, no statistics of it. kept_length: the length of
    sequences whose probabilities are kept (models/blocked_attention.py), 0 for none.
    """
    hidden, head_dim = config.hidden, config.head_size
    width, kv_width = config.heads * head_dim, config.num_kv_heads * head_dim
    norm_inputs = 2 * hidden / (tensor if sequence_parallel else 1)
    statistics = config.heads * (_kept_probabilities(kept_length) if kept_length else 1)
    cut = 2 * width + 2 * kv_width + statistics + (3 if config.activation == "swiglu" else 2) * config.ffn_size
    if config.qk_norm:
        cut += width + kv_width
    layer = norm_inputs + 2 * hidden + cut / tensor
    if config.dropout:
        layer += 2 * hidden / (tensor if sequence_parallel else 1)
    if recompute == "selective":
        layer -= statistics / tensor
    layers = [norm_inputs / 2 if recomputes_layer(recompute, i) else layer for i in range(config.layers)]
    embedding = norm_inputs / 2 if config.dropout else 0.0
    return [embedding, *layers, norm_inputs / 2 + hidden + config.vocab / tensor]
