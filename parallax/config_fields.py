"""The fields of the configuration: frozen dataclasses with their defaults, bounds and help, and the table of keys.

Import them from config.py, which adds the rules between them. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from parallax.mesh import MeshShape

__all__ = [
    "DEFAULT_GLOBAL_SIZE",
    "LOSSY",
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "Key",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "PrecisionConfig",
    "TensorConfig",
    "ValidationConfig",
    "keys",
    "kind_name",
    "sections",
    "value_fits",
]

T = TypeVar("T")
DEFAULT_GLOBAL_SIZE = 24
WIDE_LIMIT = 2**63
LOSSY = ("powersgd", "onebit", "topk")
"""Compression with error feedback; the others of data.compression only cast."""


def key(
    default: T, help: str, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> T:
    """A documented field. `least` is allowed, `above` and `below` are not; for a tuple they bound each entry."""
    return field(default=default, metadata={"help": help, "least": least, "above": above, "below": below})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    layers: int = key(6, "transformer layers", least=1)
    hidden: int = key(128, "width of the residual stream", least=1)
    heads: int = key(8, "attention heads", least=1)
    kv_heads: int | None = key(None, "key/value heads; none = heads", least=1)
    head_dim: int | None = key(None, "width of an attention head; none = hidden/heads", least=1)
    ffn: int | None = key(None, "width of the MLP; none = 4*hidden (gelu), 8/3*hidden up to a 64 (swiglu)", least=1)
    vocab: int = key(256, "vocabulary size", least=2)
    tie_embeddings: bool = key(False, "one matrix for the embedding and the output head")
    dropout: float = key(0.0, "dropout probability", least=0, below=1)
    positions: Literal["learned", "rotary"] = key("rotary", "position encoding")
    max_positions: int | None = key(None, "learned positions; none = corpus.sequence_length", least=1)
    norm: Literal["layernorm", "rmsnorm"] = key("rmsnorm", "normalisation")
    activation: Literal["gelu", "swiglu"] = key("swiglu", "activation of the MLP")
    qk_norm: bool = key(False, "rmsnorm of each query and key head before the rotation, as in Qwen3")
    bias: bool = key(False, "biases in the linear layers and in layernorm")
    rope_theta: float = key(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = key(1e-5, "epsilon of the normalisation", above=0)
    init_std: float = key(0.02, "standard deviation of the initial weights", above=0)
    vocab_multiple: int = key(1, "each rank's vocabulary rows are padded to a multiple of this", least=1)

    def num_positions(self, sequence_length: int) -> int:
        """Rows of the table of learned positions; 0 without one."""
        return (self.max_positions or sequence_length) if self.positions == "learned" else 0

    @property
    def num_kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def ffn_size(self) -> int:
        if self.ffn is not None:
            return self.ffn
        return 4 * self.hidden if self.activation == "gelu" else 64 * math.ceil(8 * self.hidden / (3 * 64))

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    source: str = key("stdlib", "text to train on")
    sequence_length: int = key(128, "tokens per sample", least=1)
    validation_fraction: float = key(0.05, "share of the corpus held out for validation", above=0, below=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig:
    """global_size = data x microbatch_size x num_microbatches; see `resolve_batch` for what is left out."""

    global_size: int | None = key(
        None,
        f"samples per step: data x microbatch_size x num_microbatches; none = derived, else {DEFAULT_GLOBAL_SIZE}",
        least=1,
    )
    microbatch_size: int | None = key(None, "samples per microbatch and data rank; none = derived", least=1)
    num_microbatches: int | None = key(None, "microbatches per step; none = derived", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineConfig:
    schedule: str = key("1f1b", "pipeline schedule by its paper's name, auto, or a FILE.csv")
    stages_per_rank: int | None = key(None, "stages of each rank (interleaved); none = the schedule's own", least=1)
    memory_cap: float | None = key(None, "auto: microbatches a rank may hold; none = as many as 1f1b", above=0)
    max_memory_bytes: int | None = key(None, "no stage split that needs more on a rank", least=1, below=WIDE_LIMIT)
    split: tuple[int, ...] | None = key(None, "layers of each stage, as in 3,5; none = balanced", least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorConfig:
    sequence_parallel: bool = key(False, "cut norms and dropout along the sequence over tensor ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    zero: int = key(
        0, "ZeRO: 1 cuts the optimizer's state over data ranks, 2 gradients too, 3 parameters too", least=0, below=4
    )
    shard_size: int | None = key(None, "zero: neighbouring ranks that share one copy; none = all", least=1)
    gather: Literal["block", "step"] = key("block", "zero=3: parameters are gathered for each block, or once a step")
    reduce: Literal["step", "microbatch"] = key("step", "zero=2, 3: when gradients are summed and cut")
    compression: Literal["none", "float16", "bfloat16", "powersgd", "onebit", "topk"] = key(
        "none", "of gradients over data ranks; the last three send less and owe the rest to the next step"
    )
    compression_rank: int = key(4, "compression=powersgd: rank of the two factors of a matrix", least=1)
    compression_ratio: float = key(0.01, "compression=topk: share of the elements sent; 1 pays all", above=0)
    reduction: Literal["sum", "adasum"] = key("sum", "how data ranks join gradients: their sum, or Adasum")
    bucket_bytes: int = key(25 * 2**20, "size of a gradient bucket", least=1, below=WIDE_LIMIT)
    grad_dtype: Literal["float32", "parameter"] = key("float32", "dtype of gradients; float64 parameters keep float64")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionConfig:
    reduce_dtype: Literal["gradient", "float32", "bfloat16", "float16"] = key(
        "gradient", "dtype in which gradients travel over data ranks; gradient = as they are added up"
    )
    loss_scale: float = key(65536.0, "float16: first factor on the loss", least=1)
    loss_scale_window: int = key(1000, "float16: steps without overflow until the factor doubles", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    name: Literal["adamw", "sgd", "lion", "muon"] = key(
        "adamw", "optimizer; muon has adamw for what is no hidden matrix"
    )
    lr: float = key(1e-3, "peak learning rate", above=0)
    weight_decay: float = key(0.1, "weight decay, decoupled but for sgd; norms and biases have none", least=0)
    no_decay: tuple[str, ...] | None = key(None, "more parameters without weight decay, as in *embedding*,head.*")
    betas: tuple[float, float] = key((0.9, 0.95), "decay of the moments of adamw and lion", least=0, below=1)
    eps: float = key(1e-8, "epsilon of adamw", above=0)
    momentum: float = key(0.95, "Nesterov momentum of sgd and muon", least=0, below=1)
    state_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "dtype of the moments; bfloat16 is rounded by chance; float64 parameters keep float64"
    )
    offload: bool = key(False, "keep master weights and moments in the host's memory and update there")
    warmup_steps: int = key(20, "steps of linear warm-up", least=0)
    decay_steps: int | None = key(None, "step at which min_lr is reached; none = steps", least=1)
    min_lr: float | None = key(None, "learning rate after the decay; none = lr/10", least=0)
    schedule: Literal["cosine", "linear", "wsd", "constant"] = key(
        "cosine", "the learning rate after the warm-up; wsd = constant, then linear from decay_start"
    )
    decay_start: int | None = key(None, "wsd: step at which the decay begins; none = after 4/5 of decay_steps", least=0)
    max_grad_norm: float = key(1.0, "gradient norm above which gradients are clipped; 0 = no clipping", least=0)

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of the 0-based `step` in a run of `steps`.

        Warm-up: lr * (step + 1) / warmup_steps, so that no step is wasted at 0. Then lr at step warmup_steps, falling
        to min_lr at step decay_steps and staying there. If the warm-up outlasts decay_steps, min_lr follows it at once.
        wsd (arXiv:2404.06395) stays at lr until decay_start.
        """
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        low = self.lr / 10 if self.min_lr is None else self.min_lr
        end = steps if self.decay_steps is None else self.decay_steps
        if step >= end:
            return low
        begin = self.warmup_steps
        if self.schedule == "wsd":
            begin = max(begin, end * 4 // 5 if self.decay_start is None else self.decay_start)
        done = max(0, step - begin) / max(1, end - begin)
        left = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return low + (self.lr - low) * left


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    every: int = key(100, "steps between checkpoints; 0 = never, not even at the end", least=0)
    keep: int = key(2, "newest checkpoints to keep; 0 = all", least=0)
    background: bool = key(False, "save beside the training, which waits for a copy in the host's memory alone")
    directory: str | None = key(None, "where they go: a path, or a URL as s3://bucket/run; none = OUTPUT/checkpoints")
    keep_every: int = key(0, "checkpoints of a multiple of so many steps are kept too; 0 = none", least=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    every: int = key(50, "steps between validations; 0 = never", least=0)
    batches: int = key(4, "global batches per validation", least=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    mesh: str = key("1x1x1", "data x tensor x pipeline, or named as data2xtensor4xpipeline2")
    steps: int = key(200, "optimizer steps", least=1)
    time_limit: float | None = key(
        None, "seconds from the start of the process after which the run saves and ends", above=0
    )
    seed: int = key(1234, "seed of weights, dropout and sample order", least=0, below=WIDE_LIMIT)
    device: Literal["auto", "cpu", "cuda"] = key("auto", "where to compute; auto = cuda if there is one")
    dtype: Literal["float32", "float64", "bfloat16", "float16", "float8"] = key(
        "float32", "dtype of parameters and activations; float8 = bfloat16, the layers' products in 8 bits"
    )
    offload_activations: bool = key(False, "keep the layers' activations in the host's memory until the backward")
    compile: bool = key(False, "torch.compile for what is elementwise: norms, activations, rotary positions")
    on_nan: Literal["stop", "skip", "rollback"] = key(
        "stop",
        "a gradient that is not finite: stop, skip the step, or go back to a checkpoint",
    )
    check_replicas_every: int = key(100, "steps between checks that copies are equal; 0 = never", least=0)
    recompute: str = key("none", "activations computed again in the backward: none, selective, full or every-N")
    output: str = key("auto", "directory of this run; auto = the next free runs/NNN")
    init_from: str = key("none", "Hugging Face model directory to begin from, which sets model.*; none = by the seed")
    resume: str = key("none", "none, auto (the latest checkpoint in output), or a checkpoint directory")
    log_every: int = key(1, "steps between log lines", least=1)
    trace: int | None = key(None, "step whose pipeline is recorded and drawn in OUTPUT/trace", least=1)
    model: ModelConfig = field(default_factory=ModelConfig)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    tensor: TensorConfig = field(default_factory=TensorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def mesh_shape(self) -> MeshShape:
        """The sizes of the axes. Raises MeshError if `mesh` does not parse."""
        return MeshShape.parse(self.mesh)


@dataclass(frozen=True, slots=True)
class Key:
    """One key that a user can set, such as model.layers. `kind` is the declared type."""

    name: str
    kind: Any
    default: Any
    help: str
    least: float | None
    above: float | None
    below: float | None


@functools.cache
def keys() -> Mapping[str, Key]:
    """Every key by its dotted name, in the order of the fields: top level first, then by section."""
    found: dict[str, Key] = {}
    sections = [("", Config)]
    for prefix, cls in sections:
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if dataclasses.is_dataclass(kind := hints[f.name]):
                sections.append((f"{f.name}.", typing.cast(Any, kind)))
            else:
                found[prefix + f.name] = Key(prefix + f.name, kind, f.default, **f.metadata)
    return types.MappingProxyType(found)


def sections() -> tuple[str, ...]:
    """The names of the sections."""
    return tuple(dict.fromkeys(name.partition(".")[0] for name in keys() if "." in name))


def kind_name(kind: Any) -> str:
    """How messages and --help name a declared type: `integer|none`, `auto|cpu|cuda`, `number,number`."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(args)
    if typing.get_origin(kind) is tuple:
        return ",".join("..." if arg is Ellipsis else kind_name(arg) for arg in args)
    if args:
        return "|".join(map(kind_name, args))
    return {bool: "true|false", int: "integer", float: "number", str: "text", type(None): "none"}[kind]


def value_fits(value: object, kind: Any) -> bool:
    """Whether a value has the declared type. A number is finite, an integer may stand for it, a bool for neither."""
    args = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return isinstance(value, str) and value in args
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        args = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(args) == len(value) and all(map(value_fits, value, args))
    if args:
        return any(value_fits(value, arg) for arg in args)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, kind) and not (kind is int and isinstance(value, bool))
