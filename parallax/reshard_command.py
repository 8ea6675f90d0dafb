"""`parallax checkpoint reshard`: the files of a checkpoint as the ranks of another mesh would have written them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from parallax import checkpoint
from parallax.arguments import take_options
from parallax.assemble import build_stage
from parallax.checkpoint.manifest import Manifest
from parallax.checkpoint.reshard import rewrite
from parallax.checkpoint.save import pick
from parallax.config import Config, check, keys, resolve_batch
from parallax.config_io import from_dict, to_dict, with_overrides
from parallax.errors import CheckpointError, ConfigError, DamagedCheckpoint
from parallax.mesh import planned_mesh
from parallax.params import Box, ParamSpec, collect
from parallax.pipeline.table import is_file
from parallax.stage_plan import plan_stages

__all__ = ["USAGE", "run_reshard"]

USAGE = """parallax checkpoint reshard CHECKPOINT --mesh DATAxTENSORxPIPELINE OUT [key=value ...]
  Writes OUT/checkpoints/step-N: the same tensors bit for bit, cut as the ranks of that mesh hold them. Any mesh loads
  any checkpoint without it; it saves them reading around in files that were cut otherwise.
  key=value: what must change with the mesh, such as pipeline.schedule=1f1b; never what the model is"""

PARAMETERS = "parameters/"
MOST_MICROBATCHES = 1 << 14
CUT = (
    "mesh",
    "batch.microbatch_size",
    "batch.num_microbatches",
    "data.zero",
    "data.shard_size",
    "data.gather",
    "data.reduce",
    "data.reduction",
    "model.vocab_multiple",
    "pipeline.schedule",
    "pipeline.stages_per_rank",
    "pipeline.memory_cap",
    "pipeline.max_memory_bytes",
    "pipeline.split",
    "tensor.sequence_parallel",
)
"""What says how ranks share a model, or may have to follow the mesh: no name and no global shape depends on it."""


def run_reshard(argv: Sequence[str]) -> tuple[Any, list[str], int]:
    """Returns what was done as data, as lines, and the exit code."""
    words, overrides = _parse(argv)
    manifest = checkpoint.read_manifest(checkpoint.place(words[0]))
    config = _config(manifest, overrides)
    files = _files(manifest, config)
    state = {**manifest.state, "mesh": str(config.mesh_shape), "config": to_dict(config)}
    directory = checkpoint.place(words[1]) / "checkpoints"
    try:  # no run may be writing there
        lock = checkpoint.DirectoryLock(directory) if isinstance(directory, Path) else contextlib.nullcontext()
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error}") from None
    with lock:
        target = rewrite(manifest, directory, state, files)
    written = checkpoint.read_manifest(target)
    size = sum(file.bytes for file in written.files.values())
    data = {"path": str(target), "mesh": str(config.mesh_shape), "files": len(written.files), "bytes": size}
    return data, [f"{target}: mesh {config.mesh_shape}, {len(written.files)} files, {size:,} bytes"], 0


def _parse(argv: Sequence[str]) -> tuple[list[str], dict[str, object]]:
    options, rest = take_options(argv, "reshard", ("--mesh",), ("--json",))
    words: list[str] = []
    overrides: dict[str, object] = {}
    for word in rest:
        name, equals, value = word.partition("=")
        if not equals or "/" in name:  # a path, or a URL, may have an = in it
            words.append(word)
        elif name in overrides:
            raise ConfigError(f"{name} is given twice; keep one")
        else:
            overrides[name] = value
    if "mesh" in overrides:
        raise ConfigError(f"reshard takes the mesh as --mesh {overrides['mesh']}")
    if len(words) != 2 or "--mesh" not in options:
        raise ConfigError(f"reshard takes CHECKPOINT --mesh MESH OUT, and got {' '.join(argv) or 'nothing'}\n{USAGE}")
    return words, overrides | {"mesh": options["--mesh"]}


def _config(manifest: Manifest, overrides: Mapping[str, object]) -> Config:
    saved = manifest.state.get("config")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{manifest.path} holds no configuration, so its model is unknown; train with the recipe")
    before = from_dict(saved)
    config = with_overrides(before, overrides)
    _refuse_another_run(before, config)
    # What follows believes the configuration, and the checkpoint may be a stranger's.
    if config.model.layers > len(manifest.tensors):
        raise DamagedCheckpoint(f"{manifest.path} has {len(manifest.tensors)} tensors for {config.model.layers} layers")
    if is_file(config.pipeline.schedule) and "pipeline.schedule" not in overrides:
        raise CheckpointError(
            f"{manifest.path} has the schedule {config.pipeline.schedule}, a file outside of the checkpoint; add "
            f"pipeline.schedule={config.pipeline.schedule} if that is meant, or another"
        )
    if (number := resolve_batch(config).num_microbatches) > MOST_MICROBATCHES:
        raise CheckpointError(
            f"{manifest.path} has {number} microbatches, and a schedule of more than {MOST_MICROBATCHES} takes long; "
            "add batch.num_microbatches and batch.microbatch_size, which change nothing in the files"
        )
    # Whether that mesh can multiply in 8 bits is for the run that loads the files: they are the same in any dtype. And
    # what is traced is no matter of theirs.
    if problems := check(config, unread=("dtype", "trace")):
        raise ConfigError("; ".join(problems))
    return config


def _refuse_another_run(before: Config, after: Config) -> None:
    """Raise ConfigError where more than the cut would change: the tensors stay, and would be another model's."""
    changed = [
        f"{name}={value(after)} (it is {value(before)})"
        for name, value in ((name, attrgetter(name)) for name in keys())
        if name not in CUT and value(after) != value(before)
    ]
    if changed:
        raise ConfigError(
            f"reshard keeps the run as it is and cannot set {', '.join(changed)}; "
            f"what may change with the mesh: {', '.join(CUT[1:])}"
        )


def _files(manifest: Manifest, config: Config) -> list[list[tuple[str, Box]]]:
    """The boxes of each rank's file. Of ranks that hold the same box one has it, chosen as a save chooses."""
    shape = config.mesh_shape
    kinds: dict[str, list[str]] = {}
    for name in manifest.tensors:
        kinds.setdefault(name.partition("/")[2], []).append(name)
    holders: dict[tuple[str, Box], set[int]] = {}
    plan = plan_stages(config)
    for rank in range(shape.size):
        mesh = planned_mesh(shape, rank)
        for stage in plan.schedule.stages_of(mesh.pipeline.rank):
            for spec in collect(build_stage(config, mesh, range(*plan.spans[stage])), mesh):
                for name in _held(manifest, kinds, spec):
                    holders.setdefault((name, spec.box), set()).add(rank)
    held = {name for name, _ in holders}
    if extra := sorted(name for name in manifest.tensors if name.startswith(PARAMETERS) and name not in held):
        raise CheckpointError(
            f"{manifest.path} holds {', '.join(extra[:5])}{' and more' * (len(extra) > 5)}, which the model of its "
            "configuration does not have; it was saved by another model"
        )
    for name, saved in manifest.tensors.items():  # what is no parameter and of no parameter's shape stays cut as it is
        if name not in held:
            for part in saved.boxes:
                holders[name, part.box] = set(range(shape.size))
    files: list[list[tuple[str, Box]]] = [[] for _ in range(shape.size)]
    for (name, box), ranks in sorted(holders.items()):
        files[sorted(ranks)[pick(name, box, len(ranks))]].append((name, box))
    return files


def _held(manifest: Manifest, kinds: Mapping[str, Sequence[str]], spec: ParamSpec) -> list[str]:
    """The saved tensors of a parameter: itself, its moments."""
    parameter = manifest.tensors.get(PARAMETERS + spec.name)
    if parameter is None:
        raise CheckpointError(f"{manifest.path} has no {PARAMETERS}{spec.name}; it was saved by another model")
    if parameter.global_shape != spec.global_shape:
        raise CheckpointError(
            f"{manifest.path} has {PARAMETERS}{spec.name} of shape {parameter.global_shape}, the model of its "
            f"configuration one of {spec.global_shape}; it was saved by another model"
        )
    return [name for name in kinds[spec.name] if manifest.tensors[name].global_shape == spec.global_shape]
