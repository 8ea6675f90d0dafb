"""What a run leaves on disk and takes up again: its checkpoints, and the point that it had reached."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallax import checkpoint
from parallax.assemble import Run
from parallax.checkpoint import Entry, Place
from parallax.comm import gather_json
from parallax.config_io import to_dict
from parallax.errors import CheckpointError, DamagedCheckpoint, NewerCheckpoint, ParallaxError
from parallax.mesh import Mesh
from parallax.output import checkpoints_of, describe_run, prepare_output
from parallax.owed import Loading, holders, owed_entries
from parallax.same_run import refuse_another_run
from parallax.saved_state import read_counts
from parallax.step import TrainState

__all__ = ["Checkpoints", "prepare_output"]

END_S = 30.0
"""How long a run that fails waits for its save: torchrun gives ranks as long when another has gone."""
MOST_ROLLBACKS = 3
"""Times a run may go back to one checkpoint: the same mistake on any samples is not the samples'."""


def _warning(error: object) -> str:
    return f"WARNING: {error}; nothing is lost so far: the run goes on, the next save is tried as usual"


def _saved(path: Place, took_s: float, warning: str | None) -> str:
    return f"saved {path} in {took_s:.2f} s" + (f"\n{_warning(warning)}" if warning else "")


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
    """Saves a run into OUTPUT/checkpoints or checkpoint.directory and brings it back, on this mesh or another."""

    def __init__(self, run: Run, output: Path) -> None:
        self.run, self.output, self.directory = run, output, checkpoints_of(run.config, output)
        self._exchange = _Exchange(run.mesh)
        self._rollbacks: Counter[str] = Counter()
        self.locks: list[checkpoint.DirectoryLock] = []
        self._under_way: checkpoint.BackgroundSave | None = None
        self._told = False
        self._staging: checkpoint.Staging = {}

    def take_lock(self) -> None:
        """Keep other runs out of the directory as long as this one lives. Raises CheckpointError on every rank."""

        def lock() -> None:
            try:
                for directory in [] if self.locks else self._own_directories():
                    self.locks.append(checkpoint.DirectoryLock(directory))
                checkpoint.clear_leftovers(self.directory)
            except (ParallaxError, OSError):
                while self.locks:
                    self.locks.pop().release()
                raise

        self._by_rank_0(lock)

    def _by_rank_0(self, act: Callable[[], None]) -> None:
        """Have rank 0 do it; what it meets is a CheckpointError on every rank."""
        problem = None
        if self.run.mesh.rank == 0:
            try:
                act()
            except (ParallaxError, OSError) as error:
                problem = str(error)
        problem = self._exchange.gather_json(problem)[0]
        if problem is not None:
            raise CheckpointError(problem)

    def _own_directories(self) -> list[Path]:
        """What no other run may write into meanwhile: the output, and where the checkpoints are. A store that is no
        directory has no locks; there the output's keeps this machine's runs apart.
        """
        checkpoints = [self.directory] if isinstance(self.directory, Path) else []
        return list({path.resolve(): path for path in (self.output, *checkpoints)}.values())

    def save_or_warn(self, state: TrainState, *, last: bool) -> str:
        """Save; returns what to say. A save that fails leaves everything as it was: the run goes on and tries again
        when the next is due, but where it is the last it raises CheckpointError, on every rank alike.

        With checkpoint.background one save at a time goes on beside the training: what `news` tells later. The last one
        is waited for.
        """
        begun = time.perf_counter()
        said = self._wait()
        try:
            if self.run.config.checkpoint.background and not last:
                self._under_way = checkpoint.BackgroundSave(**self._what_to_save(state), staging=self._staging)
                stall = time.perf_counter() - begun
                return said + f"saving {self._under_way.target} in the background; the training waited {stall:.3f} s"
            told: list[str] = []
            path = checkpoint.save(**self._what_to_save(state), told=told)
        except CheckpointError as error:
            if last:
                raise CheckpointError(f"{said}{error}") from None
            return said + _warning(error)
        return said + _saved(path, time.perf_counter() - begun, told[0] if told else None)

    def news(self) -> list[str]:
        """What there is to say of a save in the background, on the rank that knows; not a collective."""
        save = self._under_way
        if save is None or self._told or not save.done:
            return []
        self._told = True
        return [_warning(save.error) if save.error else _saved(save.target, save.took_s, save.warning)]

    def _wait(self) -> str:
        """Return when no save is under way, with what was not said yet of the last. Collectives: its errors, twice."""
        save = self._under_way
        if save is None:
            return ""
        error = save.wait(self._exchange)
        told, self._told, self._under_way = self._told, False, None
        if told and error == save.error:
            return ""
        return (_warning(error) if error else _saved(save.target, save.took_s, save.warning)) + "\n"

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever ends the run: a save under way gets the time to complete, and what came of it is told."""
        save = self._under_way
        if save is None or self._told:
            return
        ended = save.end(END_S)
        if save.error or not ended:
            print(f"WARNING: {save.error or f'{save.target} was not complete after {END_S:g} s'}", flush=True)
        elif self.run.mesh.rank == 0:
            print(_saved(save.target, save.took_s, save.warning), flush=True)

    def how_to_go_on(self) -> str:
        """For the last line of a run that ends early."""
        if self.run.config.checkpoint.every:
            elsewhere = self.run.config.checkpoint.directory
            where = f" checkpoint.directory={elsewhere}" if elsewhere else ""
            return f"go on with config={self.output}/config.yaml output={self.output}{where} resume=auto"
        return "nothing was saved, as checkpoint.every=0 says"

    def save(self, state: TrainState) -> Place:
        """Write every rank's boxes; returns the new directory. Raises CheckpointError, on every rank alike."""
        return checkpoint.save(**self._what_to_save(state))

    def _what_to_save(self, state: TrainState) -> dict[str, Any]:
        counts: dict[str, Any] = {"step": state.step, "batches": state.batches, "tokens": state.tokens}
        counts["mesh"] = str(self.run.mesh.shape)
        counts |= state.loss_scale.state()
        counts["config"] = to_dict(self.run.config)
        counts["config"]["batch"]["global_size"] = self.run.batch.global_size
        wish = self.run.config.checkpoint
        return {
            "directory": self.directory,
            "step": state.step,
            "entries": [*self._entries(state, saving=True), *owed_entries(self.run)],
            "state": counts,
            "exchange": self._exchange,
            "keep": wish.keep,
            "keep_every": wish.keep_every,
        }

    def resume(self, state: TrainState) -> str:
        """Load what config.resume names into the state: `auto` the newest one that is sound, `none` nothing.

        Returns what to say: the directory that it came from, and those that were passed over and why. Raises
        CheckpointError on every rank alike; the state is then unchanged.
        """
        wish, name = self.run.config.resume, None
        passed: list[str] = []
        if wish == "auto":
            name, passed = self._load_newest(state)
        elif wish != "none":
            self._refuse_a_branch(checkpoint.place(wish))
            self._load(checkpoint.place(wish), state)
            name = wish
        if name is not None or self.run.config.init_from == "none":
            self._describe()
        if name is None:
            return ""
        steps = self.run.config.steps
        done = "" if state.step < steps else ": nothing is left to do; a larger steps goes on"
        return "\n".join([*passed, f"resumed from {name} at step {state.step} of {steps}{done}"])

    def _describe(self) -> None:
        """The run is accepted: the directory is this one's, and says so. Raises CheckpointError on every rank alike."""

        def describe() -> None:
            if self.locks:  # who took none has no directory of its own
                describe_run(self.run.config, self.output)

        self._by_rank_0(describe)

    def _found(self) -> list[str]:
        """The checkpoints in the directory, newest first. Rank 0 looks, so that all ranks take the same ones even while
        another run prunes.
        """
        answer: dict[str, Any] = {}
        if self.run.mesh.rank == 0:
            try:
                answer = {"found": [str(path) for path in reversed(checkpoint.find(self.directory))]}
            except OSError as error:
                answer = {"error": f"{self.directory} cannot be read: {error}"}
        answer = self._exchange.gather_json(answer)[0]
        if "error" in answer:
            raise CheckpointError(answer["error"])
        return list(answer["found"])

    def _refuse_a_branch(self, path: Place) -> None:
        """Raise CheckpointError where a run that goes on from here would save below what is there already."""
        step = self._read(path).step
        higher = [name for name in self._found() if checkpoint.step_of(checkpoint.place(name)) > step]
        if higher:
            raise CheckpointError(
                f"resume={path} is step {step}, and {self.directory} holds {higher[0]}: what this run saves would lie "
                "below it, and be passed over later; resume=auto goes on from the newest, another output (or "
                f"checkpoint.directory) begins a branch at step {step}"
            )

    def _load_newest(self, state: TrainState) -> tuple[str | None, list[str]]:
        """Load the newest checkpoint that is sound. Returns it, None where there are none at all, and what to say of
        those that were passed over. Raises CheckpointError, on every rank alike, where none is sound.
        """
        damaged: dict[str, str] = {}
        for name in self._found():
            try:
                self._load(checkpoint.place(name), state)
            except DamagedCheckpoint as error:
                damaged[name] = f"WARNING: passed over: {error}"
                continue
            return name, [text + self._set_aside(checkpoint.place(one)) for one, text in damaged.items()]
        if damaged:
            raise CheckpointError("\n".join([f"no checkpoint in {self.directory} is sound:", *damaged.values()]))
        return None, []

    def _set_aside(self, path: Place) -> str:
        """Give a damaged checkpoint another name, so that its step can be saved again; returns what to say of it."""
        if not self.locks:  # of rank 0
            return ""
        try:
            return f"; it is kept as {checkpoint.set_aside(path).name}"
        except (CheckpointError, OSError) as error:
            return f"; it stays, and its step cannot be saved again, since it cannot be renamed: {error}"

    def roll_back(self, state: TrainState) -> str:
        """Go back to the latest checkpoint that is sound, but on to samples not seen yet; returns what to say.

        Raises CheckpointError, on every rank alike, where there is none, or where the run was there often enough.
        """
        said = self._wait()
        gone, batches = state.step, state.batches
        path, passed = self._load_newest(state)
        if path is None:
            raise CheckpointError(
                f"{said}on_nan=rollback: step {gone} went wrong before there was a checkpoint in {self.directory}; a "
                "lower optimizer.lr or more optimizer.warmup_steps helps most often, or a smaller checkpoint.every"
            )
        self._rollbacks[path] += 1
        if self._rollbacks[path] > MOST_ROLLBACKS:
            raise CheckpointError(
                f"{said}on_nan=rollback: step {gone} went wrong, and the run has gone back to {path} "
                f"{MOST_ROLLBACKS} times already; look at what the log says of the first, or lower optimizer.lr"
            )
        state.batches = batches
        back = f"step {gone} went wrong: back at step {state.step}, {path}, with other samples from here on"
        return said + "\n".join([*passed, back])

    def _load(self, path: Place, state: TrainState) -> None:
        manifest = self._read(path)
        saved, counts = manifest.state, read_counts(manifest)
        refuse_another_run(path, saved, self.run.config, self.run.batch.global_size)
        loading = Loading(self.run, manifest)
        checkpoint.load(path, self._entries(state) + loading.entries, self._exchange, leaves=loading.leaves)
        loading.finish()
        state.step, state.tokens, state.batches = counts.step, counts.tokens, counts.batches
        state.loss_scale.load(saved)
        state.optimizer.set_step(state.step - state.loss_scale.skipped)
        self._publish(state)

    def begin(self, state: TrainState) -> str:
        """Give a new run the weights in config.init_from, if there are any; returns what to say.

        Raises CheckpointError or ConfigError on every rank alike.
        """
        if self.run.config.init_from == "none":
            return ""
        directory = Path(self.run.config.init_from)
        checkpoint.load_hf(directory, self._entries(state), self.run.config, self._exchange)
        self._publish(state)
        self._describe()
        return f"began with the weights of {directory}"

    def _publish(self, state: TrainState) -> None:
        """Let the model compute with what was loaded."""
        state.optimizer.publish()
        self.run.sync.publish()

    def _read(self, path: Place) -> checkpoint.Manifest:
        """Every rank reads it for itself, and all or none go on."""
        found, problem = None, None
        try:
            found = checkpoint.read_manifest(path)
            read_counts(found)
        except CheckpointError as error:
            problem = [str(error), isinstance(error, NewerCheckpoint)]
        problems = [one for one in self._exchange.gather_json(problem) if one is not None]
        if problems or found is None:
            text, newer = problems[0]
            raise NewerCheckpoint(text) if newer else DamagedCheckpoint(text)
        return found

    def _entries(self, state: TrainState, *, saving: bool = False) -> list[Entry]:
        """This rank's boxes of parameters and moments: views of the optimizer's flat buffers."""
        cut = self.run.shards.size > 1
        entries = []
        for stage, flat in self.run.flats.items():
            kinds = state.optimizer.flat_state(stage)
            for piece in flat.pieces:
                if cut and saving and piece.spec.tied:
                    continue  # the stage of the first use has it, cut elsewhere
                # Along mesh.grad all ranks hold the same, or with ZeRO those of one place in their shard group.
                same = range(self.run.shards.rank, self.run.mesh.grad.size, self.run.shards.size)
                replicas = holders(self.run, piece.spec, same)
                for box, start, stop in piece.boxes():
                    shape = [last - first for first, last in box]
                    entries += [
                        Entry(
                            f"{kind}/{piece.spec.name}",
                            piece.spec.global_shape,
                            box,
                            segment[start:stop].view(shape),
                            replicas,
                        )
                        for kind, segments in kinds.items()
                        if (segment := segments[piece.segment]) is not None
                    ]
        return entries
