"""The configuration: its sections, `check` for every rule between them, and the batch derived from it.

The fields are in config_fields.py; reading and printing (YAML, key=value, --help) is in config_io.py. Imports no torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from parallax.config_fields import (
    DEFAULT_GLOBAL_SIZE,
    BatchConfig,
    CheckpointConfig,
    Config,
    CorpusConfig,
    DataConfig,
    Key,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    TensorConfig,
    ValidationConfig,
    keys,
    kind_name,
    sections,
    value_fits,
)
from parallax.errors import ConfigError, ScheduleError

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "CorpusConfig",
    "DataConfig",
    "Key",
    "ModelConfig",
    "OptimizerConfig",
    "PipelineConfig",
    "ResolvedBatch",
    "TensorConfig",
    "ValidationConfig",
    "check",
    "keys",
    "kind_name",
    "resolve_batch",
    "schedule_names",
    "sections",
    "value_fits",
]

COUNT_LIMIT = 2**31  # of an integer without a limit of its own: keeps products within 64 bits


@dataclass(frozen=True, slots=True)
class ResolvedBatch:
    """The three sizes of a global batch, and the data size that ties them."""

    data: int
    global_size: int
    microbatch_size: int
    num_microbatches: int

    @property
    def equation(self) -> str:
        return (
            f"global_size {self.global_size} = data {self.data} x microbatch_size {self.microbatch_size} "
            f"x num_microbatches {self.num_microbatches}"
        )


def resolve_batch(config: Config) -> ResolvedBatch:
    """Derive what the user left out of global_size = data x microbatch_size x num_microbatches.

    Of two given, the third. global_size is 24 unless it is given or follows from the other two. Of global_size alone:
    num_microbatches is the smallest divisor of global_size/data that is at least 2*pipeline (1F1B then idles for less
    than a third of the time), or all of global_size/data, in microbatches of one sample, if there is none.
    Raises ConfigError if the sizes contradict each other or do not divide, MeshError if the mesh does not parse.
    """
    batch, shape = config.batch, config.mesh_shape
    micro, num, data = batch.microbatch_size, batch.num_microbatches, shape.data
    for name in ("global_size", "microbatch_size", "num_microbatches"):
        if (given := getattr(batch, name)) is not None and given < 1:
            raise ConfigError(f"batch.{name}={given} is too small; choose at least 1")
    if micro is not None and num is not None:
        product = data * micro * num
        if batch.global_size not in (None, product):
            raise ConfigError(
                f"batch.global_size={batch.global_size}, but data {data} x batch.microbatch_size {micro} x "
                f"batch.num_microbatches {num} = {product}; set batch.global_size={product}, or leave one of the three "
                "out (=none)"
            )
        return ResolvedBatch(data, product, micro, num)
    size = DEFAULT_GLOBAL_SIZE if batch.global_size is None else batch.global_size
    known = f"batch.global_size={size}" + (" (the default)" if batch.global_size is None else "")
    if size % data:
        raise ConfigError(f"{known} does not divide by data={data} (mesh={config.mesh}); {_multiples(data)}")
    per_rank = size // data
    name, value = ("microbatch_size", micro) if micro is not None else ("num_microbatches", num)
    if value is None:
        chosen = next((d for d in _divisors(per_rank) if d >= 2 * shape.pipeline), per_rank)
        return ResolvedBatch(data, size, per_rank // chosen, chosen)
    if per_rank % value:
        raise ConfigError(
            f"{known} does not divide by data {data} x batch.{name} {value} = {data * value}; set batch.global_size to "
            f"a multiple of {data * value}, or batch.{name} to one of {_listed(_divisors(per_rank))}"
        )
    other = per_rank // value
    return ResolvedBatch(data, size, *((value, other) if micro is not None else (other, value)))


def check(config: Config, *, unread: Collection[str] = ()) -> list[str]:
    """Every problem of a configuration at once, each with the numbers and the fix; empty if it can run.

    unread: keys whose values could not be read and hold a stand-in; rules that need them stay silent.
    """
    problems: list[str] = []
    bad = set(unread)
    for name, known in keys().items():
        found = [] if name in bad else _value_problems(known, operator.attrgetter(name)(config))
        problems += found
        if found:
            bad.add(name)
    if "mesh" not in bad:
        try:
            shape = config.mesh_shape
        except ValueError as error:
            problems.append(str(error) if "mesh=" in str(error) else f"mesh={config.mesh}: {error}")
            bad.add("mesh")
        else:
            problems += [
                f"mesh={config.mesh}: {axis}={shape.axis_size(axis)} is not supported yet; leave {axis} at 1"
                for axis in ("context", "expert")
                if shape.axis_size(axis) > 1
            ]
    for names, rule in _RULES:
        if bad.isdisjoint(names.split()) and (problem := rule(config)):
            problems.append(problem)
    return problems


def _value_problems(known: Key, value: Any) -> list[str]:
    """What is wrong with one value on its own: its type and its bounds."""
    shown = f"{known.name}={value!r}"
    if not value_fits(value, known.kind):
        return [f"{shown} has the wrong type; expected {kind_name(known.kind)}"]
    if value == "":
        return [f"{known.name} is empty; leave the key out for its default, {known.default}"]
    problems: list[str] = []
    for item in value if isinstance(value, tuple) else (value,):
        if item is None or isinstance(item, bool | str):
            continue
        below = COUNT_LIMIT if known.below is None and isinstance(item, int) else known.below
        if known.least is not None and item < known.least:
            problems.append(f"{shown} is too small; choose at least {known.least}")
        if known.above is not None and item <= known.above:
            problems.append(f"{shown} is too small; choose more than {known.above}")
        if below is not None and item >= below:
            problems.append(f"{shown} is too large; choose less than {below}")
    return problems[:1]


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def _listed(numbers: Collection[int]) -> str:
    shown = ", ".join(map(str, list(numbers)[:12]))
    return shown + (", ..." if len(numbers) > 12 else "")


def _multiples(of: int) -> str:
    return f"choose a multiple of {of}, such as {of}, {2 * of} or {3 * of}"


def _cut_by_tensor(config: Config, name: str, number: int) -> str | None:
    """The problem of a size that the tensor ranks cannot share evenly."""
    tensor = config.mesh_shape.tensor
    if number % tensor == 0:
        return None
    return (
        f"{name}={number} does not divide by tensor={tensor} (mesh={config.mesh}); set {name} to a multiple of "
        f"{tensor}, or the tensor size to one of {_listed(_divisors(number))}"
    )


def _heads_by_tensor(config: Config) -> str | None:
    return _cut_by_tensor(config, "model.heads", config.model.heads)


def _ffn_by_tensor(config: Config) -> str | None:
    return _cut_by_tensor(config, "model.ffn", config.model.ffn_size)


def _hidden_by_heads(config: Config) -> str | None:
    hidden, heads = config.model.hidden, config.model.heads
    if hidden % heads:
        return (
            f"model.hidden={hidden} does not divide by model.heads={heads}; set model.hidden to a multiple of {heads}, "
            f"or model.heads to one of {_listed(_divisors(hidden))}"
        )
    head_dim = hidden // heads
    if config.model.positions == "rotary" and head_dim % 2:
        return (
            f"rotary positions turn pairs of features, but the head size model.hidden {hidden} / model.heads {heads} = "
            f"{head_dim} is odd; choose an even one (model.hidden={2 * hidden}), or model.positions=learned"
        )
    return None


def _heads_by_kv_heads(config: Config) -> str | None:
    heads, kv_heads = config.model.heads, config.model.num_kv_heads
    if heads % kv_heads == 0:
        return None
    return (
        f"model.heads={heads} does not divide by model.kv_heads={kv_heads}; "
        f"set model.kv_heads to one of {_listed(_divisors(heads))}"
    )


def _kv_heads_by_tensor(config: Config) -> str | None:
    kv_heads, tensor = config.model.kv_heads, config.mesh_shape.tensor
    if kv_heads is None or kv_heads % tensor == 0 or tensor % kv_heads == 0:
        return None
    return (
        f"model.kv_heads={kv_heads} and tensor={tensor} (mesh={config.mesh}): neither divides the other, so ranks "
        f"cannot share or repeat key/value heads evenly; set model.kv_heads to a multiple or a divisor of {tensor}"
    )


def _batch(config: Config) -> str | None:
    try:
        resolve_batch(config)
    except ConfigError as error:
        return str(error)
    return None


def _sequence_by_tensor(config: Config) -> str | None:
    if not config.tensor.sequence_parallel or _batch(config):
        return None
    tensor, micro, length = (
        config.mesh_shape.tensor,
        resolve_batch(config).microbatch_size,
        config.corpus.sequence_length,
    )
    if micro * length % tensor == 0:
        return None
    return (
        f"tensor.sequence_parallel=true cuts a microbatch of {micro} x corpus.sequence_length {length} = "
        f"{micro * length} tokens over tensor={tensor} (mesh={config.mesh}), which does not divide; "
        f"set corpus.sequence_length to a multiple of {tensor}"
    )


def _layers_by_pipeline(config: Config) -> str | None:
    layers, stages = config.model.layers, _num_stages(config)
    if layers + 2 >= stages:
        return None
    each = stages // config.mesh_shape.pipeline
    of = f"pipeline={stages}" if each == 1 else f"the {stages} stages of pipeline.schedule={config.pipeline.schedule}"
    return (
        f"model.layers={layers} is too few for {of} (mesh={config.mesh}): with the embedding and the head "
        f"that is {layers + 2} units, and a stage needs at least one; "
        f"set model.layers to at least {stages - 2}, or pipeline to at most {(layers + 2) // each}"
    )


def _split(config: Config) -> str | None:
    split, layers, stages = config.pipeline.split, config.model.layers, _num_stages(config)
    if split is None:
        return None
    shown = f"pipeline.split={','.join(map(str, split))}"
    if len(split) != stages:
        return f"{shown} has {len(split)} entries for {stages} stages (mesh={config.mesh}); give one per stage"
    if sum(split) != layers:
        return f"{shown} sums to {sum(split)}, model.layers={layers}; make the entries sum to {layers}"
    # The first stage always holds the embedding and the last one the head: those two may have no layer.
    if 0 in split[1:-1]:
        return f"{shown} leaves stage {split.index(0, 1)} empty; give it at least 1 of the {layers} layers"
    return None


def schedule_names() -> tuple[str, ...]:
    """The schedules that pipeline.schedule can name."""
    # Only here, so that whoever reads a configuration does not pay for the schedules.
    from parallax.pipeline.schedules import SCHEDULES

    return tuple(SCHEDULES)


def _num_stages(config: Config) -> int:
    """Pipeline stages of the whole mesh; that of a schedule which is itself a problem is the pipeline size."""
    from parallax.pipeline.table import get_schedule

    pipeline, ranks = config.pipeline, config.mesh_shape.pipeline
    try:
        # A table's stages do not depend on its microbatches; a file has its own number.
        num = 1 if pipeline.schedule in schedule_names() else resolve_batch(config).num_microbatches
        return get_schedule(pipeline.schedule, ranks, num, pipeline.stages_per_rank).num_stages
    except ValueError:
        return ranks


def _schedule(config: Config) -> str | None:
    from parallax.pipeline.table import get_schedule

    pipeline = config.pipeline
    if pipeline.schedule == "auto":
        for name in ("split", "stages_per_rank", "max_memory_bytes"):
            if getattr(pipeline, name) is not None:
                return f"pipeline.schedule=auto takes no pipeline.{name}; leave it out, or name a schedule"
        return None
    if pipeline.split is not None and pipeline.max_memory_bytes is not None:
        return "pipeline.split is given, so pipeline.max_memory_bytes has nothing to choose; leave one of them out"
    if pipeline.memory_cap is not None:
        return f"pipeline.memory_cap is for pipeline.schedule=auto, not {pipeline.schedule}; leave it out, or take auto"
    if _batch(config):
        return None
    num_microbatches = resolve_batch(config).num_microbatches
    try:
        get_schedule(pipeline.schedule, config.mesh_shape.pipeline, num_microbatches, pipeline.stages_per_rank)
    except ScheduleError as error:
        return str(error)
    return None


def _resume(config: Config) -> str | None:
    if config.resume == "auto" and config.output == "auto":
        return "resume=auto looks in output, but output=auto is a new directory each time; set output=DIRECTORY"
    return None


def _min_lr(config: Config) -> str | None:
    low, lr = config.optimizer.min_lr, config.optimizer.lr
    if low is None or low <= lr:
        return None
    return f"optimizer.min_lr={low} is above optimizer.lr={lr}; set it to at most {lr}, or none for {lr / 10}"


def _decay_steps(config: Config) -> str | None:
    end, warmup = config.optimizer.decay_steps, config.optimizer.warmup_steps
    if end is None or end >= warmup:
        return None
    return (
        f"optimizer.decay_steps={end} ends before optimizer.warmup_steps={warmup}; both count from step 0, so set "
        f"decay_steps to at least {warmup}"
    )


# The keys that a rule reads, and the rule.
_RULES: tuple[tuple[str, Callable[[Config], str | None]], ...] = (
    ("mesh model.heads", _heads_by_tensor),
    ("mesh model.heads model.kv_heads", _kv_heads_by_tensor),
    ("mesh model.hidden model.ffn model.activation", _ffn_by_tensor),
    ("model.hidden model.heads model.positions", _hidden_by_heads),
    ("model.heads model.kv_heads", _heads_by_kv_heads),
    ("mesh batch.global_size batch.microbatch_size batch.num_microbatches", _batch),
    (
        "mesh batch.global_size batch.microbatch_size batch.num_microbatches corpus.sequence_length "
        "tensor.sequence_parallel",
        _sequence_by_tensor,
    ),
    ("mesh model.layers pipeline.schedule pipeline.stages_per_rank", _layers_by_pipeline),
    ("mesh model.layers pipeline.split pipeline.schedule pipeline.stages_per_rank", _split),
    (
        "mesh pipeline.schedule pipeline.stages_per_rank pipeline.memory_cap pipeline.split "
        "pipeline.max_memory_bytes "
        "batch.global_size batch.microbatch_size batch.num_microbatches",
        _schedule,
    ),
    ("resume output", _resume),
    ("optimizer.lr optimizer.min_lr", _min_lr),
    ("optimizer.decay_steps optimizer.warmup_steps", _decay_steps),
)
