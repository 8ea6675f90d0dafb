"""What a run leaves on disk and takes up again: its output directory, its checkpoints, the point it had reached."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax import checkpoint
from parallax.assemble import Run
from parallax.checkpoint import Entry
from parallax.comm import gather_json
from parallax.config import Config
from parallax.config_io import to_dict, to_yaml
from parallax.errors import CheckpointError, ConfigError, ParallaxError
from parallax.mesh import Mesh
from parallax.params import ParamSpec
from parallax.step import TrainState

__all__ = ["Checkpoints", "prepare_output"]

SAME = ("seed", "batch.global_size", "corpus.source", "corpus.sequence_length", "corpus.validation_fraction")
"""What decides which samples a step sees: a resumed run must agree with the saved one."""


def prepare_output(config: Config, mesh: Mesh) -> Path:
    """The run's directory, made by rank 0, with the resolved config in config.yaml. Collectives: its name, once.

    output=auto is the next free runs/NNN. Raises ConfigError, on every rank, where it cannot be made, or where
    it holds checkpoints that a run with resume=none would mix with its own.
    """
    answer: dict[str, Any] = {}
    if mesh.rank == 0:
        try:
            directory = _next_run(Path("runs")) if config.output == "auto" else Path(config.output)
            if config.resume == "none" and checkpoint.latest(directory / "checkpoints"):
                found = checkpoint.latest(directory / "checkpoints")
                raise ConfigError(
                    f"output={directory} already holds {found}; resume=auto goes on from it, another output starts anew"
                )
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.yaml").write_text(to_yaml(config))
            if config.init_from != "none":  # the tokenizer goes with the weights, into every export
                checkpoint.copy_companions(Path(config.init_from), directory / "hf")
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


def _next_run(runs: Path) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name) for p in runs.iterdir() if p.name.isdigit()]
    number = max(taken, default=0) + 1
    while True:  # another run may take the number at the same moment
        try:
            os.mkdir(runs / f"{number:03d}")
            return runs / f"{number:03d}"
        except FileExistsError:
            number += 1


@dataclass(frozen=True, slots=True)
class _Exchange:
    """How the checkpoint room talks to the other ranks: JSON over the world group."""

    mesh: Mesh

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def size(self) -> int:
        return self.mesh.shape.size

    def gather_json(self, value: Any) -> list[Any]:
        return gather_json(value, self.mesh.world, self.mesh.device)


class Checkpoints:
    """Saves a run into OUTPUT/checkpoints/step-N and brings it back, on this mesh or another."""

    def __init__(self, run: Run, output: Path) -> None:
        self.run, self.directory = run, output / "checkpoints"
        self._exchange = _Exchange(run.mesh)

    def save(self, state: TrainState) -> Path:
        """Write every rank's boxes; returns the new directory. Raises CheckpointError, on every rank alike."""
        counts: dict[str, Any] = {"step": state.step, "tokens": state.tokens, "mesh": str(self.run.mesh.shape)}
        counts |= state.loss_scale.state()
        counts["config"] = to_dict(self.run.config)
        counts["config"]["batch"]["global_size"] = self.run.batch.global_size
        keep = self.run.config.checkpoint.keep
        return checkpoint.save(
            self.directory, state.step, self._entries(state, saving=True), counts, self._exchange, keep=keep
        )

    def resume(self, state: TrainState) -> Path | None:
        """Load what config.resume names into the state: `auto` the latest one if there is any, `none` nothing.

        Returns the directory that it came from. Raises CheckpointError on every rank alike; the state is then
        unchanged.
        """
        wish = self.run.config.resume
        if wish == "none":
            return None
        # Rank 0 looks, so that all ranks take the same one even while another run prunes.
        path = checkpoint.latest(self.directory) if wish == "auto" else Path(wish)
        name = self._exchange.gather_json(str(path) if path else None)[0]
        if name is None:
            return None
        saved = checkpoint.read_manifest(Path(name)).state
        self._check_same(Path(name), saved)
        checkpoint.load(Path(name), self._entries(state), self._exchange)
        state.step, state.tokens = int(saved["step"]), int(saved["tokens"])
        state.loss_scale.load(saved)
        state.optimizer.set_step(state.step - state.loss_scale.skipped)
        self._publish(state)
        return Path(name)

    def begin(self, state: TrainState) -> Path | None:
        """Give a new run the weights in config.init_from, if there are any; returns where they came from.

        Raises CheckpointError or ConfigError on every rank alike.
        """
        if self.run.config.init_from == "none":
            return None
        directory = Path(self.run.config.init_from)
        checkpoint.load_hf(directory, self._entries(state), self.run.config, self._exchange)
        self._publish(state)
        return directory

    def _publish(self, state: TrainState) -> None:
        """Let the model compute with what was loaded."""
        state.optimizer.publish()
        self.run.sync.publish()

    def _check_same(self, path: Path, saved: Any) -> None:
        now: dict[str, Any] = to_dict(self.run.config)
        now["batch"]["global_size"] = self.run.batch.global_size
        different = []
        for key in SAME:
            before: Any = saved.get("config", {})
            after: Any = now
            for part in key.split("."):
                before, after = before.get(part, {}), after[part]
            if before != after:
                different.append(f"{key} was {before}, is {after}")
        if different:
            raise CheckpointError(
                f"{path} was saved by a run that saw other samples ({'; '.join(different)}), so going on would repeat "
                "some and skip others; set these keys as they were"
            )

    def _entries(self, state: TrainState, *, saving: bool = False) -> list[Entry]:
        """This rank's boxes of parameters and moments: views of the optimizer's flat buffers."""
        cut = self.run.shards.size > 1
        entries = []
        for stage, flat in self.run.flats.items():
            kinds = state.optimizer.flat_state(stage)
            for piece in flat.pieces:
                if cut and saving and piece.spec.tied:
                    continue  # the stage of the first use has it, cut elsewhere
                replicas = self._replicas(piece.spec)
                for box, start, stop in piece.boxes():
                    shape = [last - first for first, last in box]
                    entries += [
                        Entry(
                            f"{kind}/{piece.spec.name}",
                            piece.spec.global_shape,
                            box,
                            segments[piece.segment][start:stop].view(shape),
                            replicas,
                        )
                        for kind, segments in kinds.items()
                    ]
        return entries

    def _replicas(self, spec: ParamSpec) -> tuple[int, ...]:
        """The global ranks that hold the very box."""
        mesh, schedule = self.run.mesh, self.run.schedule
        pipeline: Sequence[int] = (mesh.pipeline.rank,)
        if spec.name in {tie.name for tie in self.run.sync.ties} and self.run.shards.size == 1:
            pipeline = sorted({schedule.stage_to_rank[0], schedule.stage_to_rank[-1]})
        shape = mesh.shape
        # Along mesh.grad all ranks hold the same, or with ZeRO those of one place in their shard group.
        same = range(self.run.shards.rank, mesh.grad.size, self.run.shards.size)
        grad = [divmod(place, shape.context) for place in same]
        return tuple(
            sorted(
                shape.rank_at({"pipeline": p, "data": d, "context": c, "tensor": t})
                for p in pipeline
                for d, c in grad
                for t in spec.tensor_ranks
            )
        )
