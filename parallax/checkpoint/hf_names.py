"""Which tensor of a Hugging Face model is which of ours: names, shapes, transposes, what is fused.

Linear weights are [out, in] on both sides, but for GPT-2's Conv1D, which stores [in, out] and has query, key and value
side by side in c_attn. The rotary layout of Llama, Mistral and Qwen3 (the first half of a head turns with the second)
is ours too, so that no row moves. Key/value heads are stored once each on both sides. Padding of a vocabulary that is
cut over ranks is no part of a global tensor here, so none is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from parallax.config import ModelConfig
from parallax.params import Box

__all__ = ["HfTensor", "IGNORED", "Part", "TIED_HEAD", "hf_tensors", "parts_of"]

IGNORED = r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)|(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
"""Buffers that old files carry: the causal mask and the rotary frequencies, which are computed here."""
TIED_HEAD = "lm_head.weight"

_LLAMA = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True)
class HfTensor:
    """One tensor of the Hugging Face side.

    shape: as it is stored there. parts: the canonical names of what lies in it, side by side along its last dim in
    equal widths; none where this model has no such parameter and zeros stand for it. transposed: each part is our
    tensor's transpose.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    transposed: bool = False

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The global shape of each of our tensors in it."""
        last = self.shape[-1] // max(1, len(self.parts))
        stored = (*self.shape[:-1], last)
        return stored[::-1] if self.transposed else stored


@dataclass(frozen=True, slots=True)
class Part:
    """Where one canonical tensor lies: columns (the last dim) from `start` of a tensor there."""

    tensor: HfTensor
    start: int

    def cut(self, box: Box) -> tuple[slice, ...]:
        """The slices of the stored tensor that hold a box of the canonical one."""
        stored = box[::-1] if self.tensor.transposed else box
        *first, (begin, end) = stored
        return (*(slice(a, b) for a, b in first), slice(begin + self.start, end + self.start))


def parts_of(tensors: list[HfTensor]) -> dict[str, Part]:
    """Canonical name -> where it lies."""
    return {
        name: Part(tensor, index * (tensor.shape[-1] // len(tensor.parts)))
        for tensor in tensors
        for index, name in enumerate(tensor.parts)
    }


def hf_tensors(model: ModelConfig, family: str, sequence_length: int) -> list[HfTensor]:
    """Every tensor of the model in that family, in order of use. A tied head is none of its own."""
    found = list(_gpt2(model, model.num_positions(sequence_length)) if family == "gpt2" else _llama(model))
    if not model.tie_embeddings:
        found.append(HfTensor(TIED_HEAD, (model.vocab, model.hidden), ("head.weight",)))
    return found


def _llama(model: ModelConfig) -> Iterator[HfTensor]:
    hidden, ffn = model.hidden, model.ffn_size
    width, kv_width = model.heads * model.head_size, model.num_kv_heads * model.head_size
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "attention.q": (width, hidden),
        "attention.k": (kv_width, hidden),
        "attention.v": (kv_width, hidden),
        "attention.q_norm": (model.head_size,),
        "attention.k_norm": (model.head_size,),
        "attention.out": (hidden, width),
        "mlp_norm": (hidden,),
        "mlp.gate": (ffn, hidden),
        "mlp.up": (ffn, hidden),
        "mlp.down": (hidden, ffn),
    }
    if not model.qk_norm:
        del shapes["attention.q_norm"], shapes["attention.k_norm"]
    yield HfTensor("model.embed_tokens.weight", (model.vocab, hidden), ("embedding.token.weight",))
    for index in range(model.layers):
        for ours, shape in shapes.items():
            names = f"model.layers.{index}.{_LLAMA[ours]}", f"layers.{index}.{ours}"
            yield HfTensor(f"{names[0]}.weight", shape, (f"{names[1]}.weight",))
            if model.bias and len(shape) == 2:
                yield HfTensor(f"{names[0]}.bias", shape[:1], (f"{names[1]}.bias",))
    yield HfTensor("model.norm.weight", (hidden,), ("final_norm.weight",))


def _gpt2(model: ModelConfig, num_positions: int) -> Iterator[HfTensor]:
    hidden, ffn = model.hidden, model.ffn_size

    def norm(theirs: str, ours: str) -> Iterator[HfTensor]:
        yield HfTensor(f"{theirs}.weight", (hidden,), (f"{ours}.weight",))
        yield bias(theirs, hidden, ours)

    def bias(theirs: str, size: int, *ours: str) -> HfTensor:
        return HfTensor(f"{theirs}.bias", (size,), tuple(f"{name}.bias" for name in ours) if model.bias else ())

    def linear(theirs: str, rows: int, columns: int, *ours: str) -> Iterator[HfTensor]:
        yield HfTensor(f"{theirs}.weight", (rows, columns), tuple(f"{name}.weight" for name in ours), transposed=True)
        yield bias(theirs, columns, *ours)

    yield HfTensor("transformer.wte.weight", (model.vocab, hidden), ("embedding.token.weight",))
    yield HfTensor("transformer.wpe.weight", (num_positions, hidden), ("embedding.position.weight",))
    for index in range(model.layers):
        theirs, ours = f"transformer.h.{index}", f"layers.{index}"
        yield from norm(f"{theirs}.ln_1", f"{ours}.attention_norm")
        yield from linear(f"{theirs}.attn.c_attn", hidden, 3 * hidden, *(f"{ours}.attention.{x}" for x in "qkv"))
        yield from linear(f"{theirs}.attn.c_proj", hidden, hidden, f"{ours}.attention.out")
        yield from norm(f"{theirs}.ln_2", f"{ours}.mlp_norm")
        yield from linear(f"{theirs}.mlp.c_fc", hidden, ffn, f"{ours}.mlp.up")
        yield from linear(f"{theirs}.mlp.c_proj", ffn, hidden, f"{ours}.mlp.down")
    yield from norm("transformer.ln_f", "final_norm")
