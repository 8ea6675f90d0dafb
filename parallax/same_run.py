"""What a run that goes on must have in common with the one that saved: its samples, its model, its optimizer's state.

The tensors of a checkpoint say part of it by their names and shapes. The rest is in the configuration that lies beside
them: weights of 4 heads have the shapes of weights of 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from parallax.config import Config, ModelConfig
from parallax.config_io import to_dict
from parallax.errors import CheckpointError, ConfigError

__all__ = ["refuse_another_run"]

SAMPLES = ("seed", "batch.global_size", "corpus.source", "corpus.sequence_length", "corpus.validation_fraction")
"""What decides which samples a step sees."""
FREE = ("dropout", "init_std", "vocab_multiple", "max_positions")
"""The keys under model that may differ: they change nothing of what the weights compute, or their shapes tell."""
STATE = ("optimizer.name",)
"""What decides which moments there are; of which dtype, they say themselves."""


def refuse_another_run(path: object, saved: Mapping[str, Any], config: Config, global_size: int) -> None:
    """Raise CheckpointError where the configuration in a checkpoint's state and this one do not go together. A key that
    the saved one does not have, since its parallax had not, is no difference.
    """
    before, now = saved.get("config"), to_dict(config)
    if not isinstance(before, dict):
        return
    now["batch"]["global_size"] = global_size
    if different := _differences(before, now, SAMPLES):
        raise CheckpointError(
            f"{path} was saved by a run that saw other samples ({different}), so going on would repeat some and skip "
            "others; set these keys as they were"
        )
    computes = [f"model.{key}" for key in now["model"] if key not in FREE]
    if different := _differences(_resolved(before), _resolved(now), computes):
        raise CheckpointError(
            f"{path} holds the weights of another model ({different}), which this one would misread; set these keys as "
            "they were"
        )
    if different := _differences(before, now, STATE):
        raise CheckpointError(f"{path} holds another optimizer's state ({different}); set these keys as they were")


def _resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's keys with what they leave to be derived, and without what it makes no use of."""
    saved = config.get("model")
    known = {field.name for field in fields(ModelConfig)}
    keys = {key: value for key, value in saved.items() if key in known} if isinstance(saved, Mapping) else {}
    if keys.get("positions") != "rotary":
        keys.pop("rope_theta", None)
    try:
        model = ModelConfig(**keys)
        derived = {"kv_heads": model.num_kv_heads, "head_dim": model.head_size, "ffn": model.ffn_size}
    except (ConfigError, TypeError, ValueError, ArithmeticError):  # damaged: what there is, is compared
        derived = {}
    return {"model": keys | {key: value for key, value in derived.items() if key in keys}}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], keys: Sequence[str]) -> str:
    found = []
    for key in keys:
        was, has = _get(before, key), _get(now, key)
        if was is not _get and has is not _get and was != has:
            found.append(f"{key} was {was}, is {has}")
    return "; ".join(found)


def _get(config: Any, key: str) -> Any:
    """The value, or this function where there is none."""
    for part in key.split("."):
        config = config.get(part, _get) if isinstance(config, Mapping) else _get
    return config
