"""The rules between keys, each with the keys that it reads. `config.check` runs them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable

from parallax.config_batch import divisors, listed, resolve_batch
from parallax.config_fields import LOSSY, Config, keys
from parallax.errors import ConfigError, ScheduleError

__all__ = ["RULES", "schedule_names"]


def _cut_by_tensor(config: Config, name: str, number: int) -> str | None:
    """The problem of a size that the tensor ranks cannot share evenly."""
    tensor = config.mesh_shape.tensor
    if number % tensor == 0:
        return None
    return (
        f"{name}={number} does not divide by tensor={tensor} (mesh={config.mesh}); set {name} to a multiple of "
        f"{tensor}, or the tensor size to one of {listed(divisors(number))}"
    )


def _heads_by_tensor(config: Config) -> str | None:
    return _cut_by_tensor(config, "model.heads", config.model.heads)


def _ffn_by_tensor(config: Config) -> str | None:
    return _cut_by_tensor(config, "model.ffn", config.model.ffn_size)


def _hidden_by_heads(config: Config) -> str | None:
    model = config.model
    hidden, heads = model.hidden, model.heads
    if model.head_dim is None and hidden % heads:
        return (
            f"model.hidden={hidden} does not divide by model.heads={heads}; set model.hidden to a multiple of {heads}, "
            f"or model.heads to one of {listed(divisors(hidden))}, or model.head_dim"
        )
    if model.positions == "rotary" and model.head_size % 2:
        if model.head_dim is not None:
            return (
                f"rotary positions turn pairs of features, but model.head_dim={model.head_dim} is odd; set it to "
                f"{model.head_dim + 1}, or model.positions=learned"
            )
        return (
            f"rotary positions turn pairs of features, but the head size model.hidden {hidden} / model.heads {heads} = "
            f"{model.head_size} is odd; choose an even one (model.hidden={2 * hidden}), or model.positions=learned"
        )
    return None


def _heads_by_kv_heads(config: Config) -> str | None:
    heads, kv_heads = config.model.heads, config.model.num_kv_heads
    if heads % kv_heads == 0:
        return None
    return (
        f"model.heads={heads} does not divide by model.kv_heads={kv_heads}; "
        f"set model.kv_heads to one of {listed(divisors(heads))}"
    )


def _kv_heads_by_tensor(config: Config) -> str | None:
    kv_heads, tensor = config.model.kv_heads, config.mesh_shape.tensor
    if kv_heads is None or kv_heads % tensor == 0 or tensor % kv_heads == 0:
        return None
    return (
        f"model.kv_heads={kv_heads} and tensor={tensor} (mesh={config.mesh}): neither divides the other, so ranks "
        f"cannot share or repeat key/value heads evenly; set model.kv_heads to a multiple or a divisor of {tensor}"
    )


def _max_positions(config: Config) -> str | None:
    most, length = config.model.max_positions, config.corpus.sequence_length
    if most is None:
        return None
    if config.model.positions != "learned":
        return f"model.max_positions={most} is for model.positions=learned, not {config.model.positions}; leave it out"
    if most < length:
        return (
            f"model.max_positions={most}: the model has {most} learned positions, corpus.sequence_length is {length}; "
            f"set corpus.sequence_length to at most {most}"
        )
    return None


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
    from parallax.pipeline.table import get_schedule, is_file

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
    except ScheduleError as error:  # which begins with the file's name, where it is about a file
        return f"pipeline.schedule={error}" if is_file(pipeline.schedule) else str(error)
    return None


def _zero(config: Config) -> str | None:
    data, shape = config.data, config.mesh_shape
    copies = shape.data * shape.context
    if data.shard_size is not None:
        if data.zero == 0:
            return (
                f"data.shard_size={data.shard_size} cuts what data.zero says, and data.zero is 0; set it to 1, 2 or 3"
            )
        if copies % data.shard_size:
            return (
                f"data.shard_size={data.shard_size} does not divide the {copies} data ranks of mesh={config.mesh}; "
                f"choose one of {', '.join(str(n) for n in range(1, copies + 1) if copies % n == 0)}"
            )
    if data.gather != "block" and data.zero < 3:
        return f"data.gather={data.gather} is for data.zero=3, which cuts parameters; leave it out, or set data.zero=3"
    if data.reduce != "step" and data.zero < 2:
        return (
            f"data.reduce={data.reduce} is for data.zero=2 and 3, which cut gradients; leave it out, or set data.zero"
        )
    return None


def _compression(config: Config) -> str | None:
    data, shown = config.data, f"data.compression={config.data.compression}"
    if data.compression in LOSSY and data.zero:
        return (
            f"{shown} keeps what whole gradients are owed, and data.zero={data.zero} cuts them; set data.zero=0, or "
            "data.compression=bfloat16"
        )
    if data.compression != "none" and config.precision.reduce_dtype != "gradient":
        return (
            f"{shown} and precision.reduce_dtype={config.precision.reduce_dtype} both say how gradients travel; leave "
            "one of them out"
        )
    for name, of in (("data.compression_rank", "powersgd"), ("data.compression_ratio", "topk")):
        value = getattr(data, name.partition(".")[2])
        if data.compression != of and value != keys()[name].default:
            return f"{name}={value} is for data.compression={of}, not {data.compression}; leave it out, or take {of}"
    if data.compression_ratio > 1:
        return f"data.compression_ratio={data.compression_ratio} is more than all elements; choose at most 1"
    return None


def _reduction(config: Config) -> str | None:
    data, shape = config.data, config.mesh_shape
    copies, shown = shape.data * shape.context, f"data.reduction={config.data.reduction}"
    if data.reduction == "sum":
        return None
    if data.zero:
        return f"{shown} needs whole gradients, and data.zero={data.zero} cuts them; set data.zero=0"
    if copies & (copies - 1):
        return (
            f"{shown} joins ranks in pairs, and mesh={config.mesh} has {copies} data ranks; choose a power of two, "
            f"such as {1 << copies.bit_length() - 1}"
        )
    if data.compression != "none" or config.precision.reduce_dtype != "gradient":
        return (
            f"{shown} takes dot products of the gradients as they are; leave out data.compression and "
            "precision.reduce_dtype"
        )
    return None


def _recompute(config: Config) -> str | None:
    if config.recompute in ("none", "selective", "full") or re.fullmatch("every-[1-9][0-9]*", config.recompute):
        return None
    return (
        f"recompute={config.recompute} is unknown; choose none, selective (the core of attention), full (every layer) "
        "or every-N, as in every-2 (one layer of two)"
    )


def _resume(config: Config) -> str | None:
    if config.resume == "auto" and config.output == "auto" and config.checkpoint.directory is None:
        return (
            "resume=auto looks in output, but output=auto is a new directory each time; set output=DIRECTORY or "
            "checkpoint.directory"
        )
    return None


def _float8(config: Config) -> str | None:
    if config.dtype != "float8" or _batch(config):
        return None
    model, tensor = config.model, config.mesh_shape.tensor
    tokens = resolve_batch(config).microbatch_size * config.corpus.sequence_length
    sizes = {
        "model.hidden": model.hidden,
        "model.ffn / tensor": model.ffn_size / tensor,
        "the width of the heads of a rank": model.heads * model.head_size / tensor,
        "the tokens of a microbatch": tokens,
    }
    wrong = [f"{name} = {size:g}" for name, size in sizes.items() if size % 16]
    return f"dtype=float8 multiplies sizes that are multiples of 16, and {' and '.join(wrong)} not" if wrong else None


def _on_nan(config: Config) -> str | None:
    if config.on_nan != "rollback":
        return None
    if config.dtype == "float16":
        return (
            "on_nan=rollback is not for dtype=float16, where an overflow now and then is normal and the step is skipped"
        )
    if config.checkpoint.every == 0:
        return "on_nan=rollback goes back to a checkpoint, and checkpoint.every=0 makes none; set checkpoint.every"
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


def _decay_start(config: Config) -> str | None:
    optimizer = config.optimizer
    if optimizer.decay_start is None:
        return None
    if optimizer.schedule != "wsd":
        return f"optimizer.decay_start is for optimizer.schedule=wsd, not {optimizer.schedule}; leave it out"
    end = config.steps if optimizer.decay_steps is None else optimizer.decay_steps
    if optimizer.decay_start <= end:
        return None
    return f"optimizer.decay_start={optimizer.decay_start} is after the decay's end at step {end}; choose one before it"


def _trace(config: Config) -> str | None:
    # A resumed run may begin after that step, or may not: only what no run of so many steps comes to is refused.
    if config.trace is None or config.trace <= config.steps:
        return None
    return (
        f"trace={config.trace} is after the last step, steps={config.steps}, so nothing would be recorded; set trace "
        f"to at most {config.steps}, or steps to at least {config.trace}"
    )


# The keys that a rule reads, and the rule.
RULES: tuple[tuple[str, Callable[[Config], str | None]], ...] = (
    ("mesh model.heads", _heads_by_tensor),
    ("mesh model.heads model.kv_heads", _kv_heads_by_tensor),
    ("mesh model.hidden model.ffn model.activation", _ffn_by_tensor),
    ("model.hidden model.heads model.head_dim model.positions", _hidden_by_heads),
    ("model.heads model.kv_heads", _heads_by_kv_heads),
    ("model.max_positions model.positions corpus.sequence_length", _max_positions),
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
    ("mesh data.zero data.shard_size data.gather data.reduce", _zero),
    (
        "data.zero data.compression data.compression_rank data.compression_ratio precision.reduce_dtype",
        _compression,
    ),
    ("mesh data.zero data.reduction data.compression precision.reduce_dtype", _reduction),
    ("recompute", _recompute),
    ("resume output checkpoint.directory", _resume),
    ("on_nan dtype checkpoint.every", _on_nan),
    (
        "dtype mesh model.hidden model.ffn model.heads model.activation corpus.sequence_length "
        "batch.global_size batch.microbatch_size batch.num_microbatches",
        _float8,
    ),
    ("optimizer.lr optimizer.min_lr", _min_lr),
    ("optimizer.decay_steps optimizer.warmup_steps", _decay_steps),
    ("steps optimizer.decay_start optimizer.decay_steps optimizer.schedule", _decay_start),
    ("steps trace", _trace),
)
