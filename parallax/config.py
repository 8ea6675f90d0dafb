"""The configuration: its sections, and `check` for every rule between them.

The fields are in config_fields.py, the rules in config_rules.py, the batch in config_batch.py; reading and printing
(YAML, key=value, --help) is in config_io.py. Imports no torch.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from parallax.config_batch import ResolvedBatch, resolve_batch
from parallax.config_fields import (
    BatchConfig,
    CheckpointConfig,
    Config,
    CorpusConfig,
    DataConfig,
    Key,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    PrecisionConfig,
    TensorConfig,
    ValidationConfig,
    keys,
    kind_name,
    sections,
    value_fits,
)
from parallax.config_rules import RULES, schedule_names

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
    "PrecisionConfig",
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
    for names, rule in RULES:
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
