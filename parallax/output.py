"""A run's directory: its name, what lies in it beside the checkpoints, and who may write there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from parallax import checkpoint
from parallax.checkpoint import Place
from parallax.comm import gather_json
from parallax.config import Config
from parallax.config_io import to_yaml
from parallax.errors import ConfigError, ParallaxError
from parallax.mesh import Mesh

__all__ = ["checkpoints_of", "describe_run", "prepare_output"]


def prepare_output(config: Config, mesh: Mesh) -> Path:
    """The run's directory, made by rank 0; nothing is written there before the run has the lock. Collectives: its name,
    once.

    output=auto is the next free runs/NNN. Raises ConfigError, on every rank, where it cannot be made, or where
    it holds checkpoints that a run with resume=none would mix with its own.
    """
    answer: dict[str, Any] = {}
    if mesh.rank == 0:
        try:
            if config.resume not in ("none", "auto"):  # so that a name that is none leaves no directory behind
                checkpoint.read_manifest(checkpoint.place(config.resume))
            if config.resume == "none":
                _refuse_to_mix(config)
            directory = _next_run(Path("runs")) if config.output == "auto" else Path(config.output)
            checkpoint.make_directories(directory, 0o777)
            answer = {"output": str(directory)}
        except (OSError, ParallaxError) as error:
            text = (
                str(error) if isinstance(error, ParallaxError) else f"output={config.output} cannot be written: {error}"
            )
            answer = {"error": text}
    answer = gather_json(answer, mesh.world, mesh.device)[0]
    if "error" in answer:
        raise ConfigError(answer["error"])
    return Path(answer["output"])


def _refuse_to_mix(config: Config) -> None:
    """Raise ConfigError where a run that begins anew would save beside another's checkpoints."""
    elsewhere = config.checkpoint.directory
    if elsewhere is None and config.output == "auto":  # a directory that is not there yet
        return
    found = checkpoint.latest(checkpoints_of(config, Path(config.output)))
    if found is not None:
        raise ConfigError(
            f"output={config.output} already holds {found}; resume=auto goes on from it, another output starts anew"
            if elsewhere is None
            else f"checkpoint.directory={elsewhere} already holds {found}; resume=auto goes on from it, another "
            "directory starts anew"
        )


def checkpoints_of(config: Config, output: Path) -> Place:
    """Where a run's checkpoints are."""
    wish = config.checkpoint.directory
    return output / "checkpoints" if wish is None else checkpoint.place(wish)


def describe_run(config: Config, output: Path) -> None:
    """Write the resolved config to OUTPUT/config.yaml, and what lies beside the weights of init_from to OUTPUT/hf.

    For the rank that has the lock. Raises OSError and ParallaxError.
    """
    checkpoint.make_directories(output, 0o777)
    part = output / "config.yaml.part"
    with open(part, "w") as file:
        file.write(to_yaml(config))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, output / "config.yaml")
    if config.init_from != "none":  # the tokenizer goes with the weights, into every export
        checkpoint.copy_companions(Path(config.init_from), output / "hf")


def _next_run(runs: Path) -> Path:
    checkpoint.make_directories(runs, 0o777)
    taken = [int(p.name) for p in runs.iterdir() if p.name.isdigit()]
    number = max(taken, default=0) + 1
    while True:  # another run may take the number at the same moment
        try:
            os.mkdir(runs / f"{number:03d}")
            checkpoint.sync_directory(runs)
            return runs / f"{number:03d}"
        except FileExistsError:
            number += 1
