"""Runs one rank's program of a schedule. It knows what each op means and decides no order."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from parallax.errors import ScheduleError
from parallax.gradients import Accumulate, GradSink
from parallax.pipeline.schedule import COMPUTE, Action, Op, Schedule
from parallax.pipeline.transport import Message, Receipt, Transport, empty_like_boundary

__all__ = ["Executor", "StageModule", "run_together"]

GRADIENT_OPS = (Op.B, Op.I, Op.W)
Recorder = Callable[[Action, float, float], None]
"""Takes a compute action with its start and end on this process's time.perf_counter."""


class StageModule(Protocol):
    """A span of the model. On the last stage the result is the scaled loss, else the next stage's input."""

    dtype: torch.dtype

    def __call__(self, x: Tensor | None, microbatch: Any, scale: float | Tensor) -> Tensor: ...

    def boundary_shape(self, num_samples: int, sequence_length: int) -> tuple[int, ...]: ...


class Sync(Protocol):
    """The part of data.GradSync that a schedule drives."""

    def unshard(self, stage: int) -> None: ...
    def reshard(self, stage: int) -> None: ...
    def arm(self, stage: int) -> None: ...
    def reduce(self, stage: int) -> None: ...
    def finish(self) -> None: ...


class _Tail(torch.autograd.Function):
    """The end of a stage's graph that outlives the stage's output.

    The output is freed as soon as it is sent, so its gradient cannot come in through it. A tail is an empty tensor
    behind it in the graph; its backward hands on the gradient that was put into `arrived`.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, arrived: list[Tensor]) -> Tensor:
        ctx.arrived = arrived
        return output.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.arrived.pop(), None


class _InFlight:
    """One microbatch between its forward and its backward on one stage."""

    __slots__ = ("arrived", "input", "tail")

    def __init__(self, x: Tensor | None) -> None:
        self.input = x
        self.arrived: list[Tensor] = []
        self.tail: Tensor | None = None


class Executor:
    """Interprets the lowered schedule's program of one pipeline rank.

    stages, sinks: this rank's stages and the sinks of their layers, by stage. A schedule without backward
    runs forward only, without recording (evaluation). Collectives: the sends and receives of the schedule, one boundary
    activation each; whatever the stages and the sync do.
    """

    def __init__(
        self,
        stages: Mapping[int, StageModule],
        sinks: Mapping[int, GradSink],
        schedule: Schedule,
        rank: int,
        transport: Transport,
        sync: Sync,
        device: torch.device | str = "cpu",
    ) -> None:
        self.stages, self.sinks, self.schedule, self.rank = stages, sinks, schedule, rank
        self.transport, self.sync, self.device = transport, sync, torch.device(device)
        self.program = schedule.programs[rank]
        self.last_stage = schedule.num_stages - 1
        self.recorder: Recorder | None = None  # told of every compute action, where a step is traced
        self._waited_s = 0.0
        self.trains = any(action.op in GRADIENT_OPS for action in self.program)
        if set(stages) != set(schedule.stages_of(rank)):
            raise ScheduleError(
                f"pipeline rank {rank} has stages {sorted(stages)}, schedule {schedule.name} gives it "
                f"{sorted(schedule.stages_of(rank))}"
            )
        # What each op means is the method of its name.
        self._do: dict[Op, Callable[[Action], None]] = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.I: self._input_gradient,
            Op.W: self._weight_gradient,
            Op.SEND_F: partial(self._send, "F"),
            Op.SEND_B: partial(self._send, "B"),
            Op.RECV_F: partial(self._receive, "F"),
            Op.RECV_B: partial(self._receive, "B"),
            Op.UNSHARD: lambda action: self.sync.unshard(action.stage),
            Op.RESHARD: lambda action: self.sync.reshard(action.stage),
            Op.REDUCE_GRAD: lambda action: self.sync.reduce(action.stage),
        }

    def run(self, microbatches: Sequence[Any], *, scale: float | Tensor) -> Tensor:
        """Run the program. Returns scale times this rank's sum of losses: a float64 scalar, 0 off the last stage."""
        for waiting in self.steps(microbatches, scale=scale):
            if waiting is not None:
                raise ScheduleError(f"pipeline rank {self.rank} waits for {waiting} and nobody else runs")
        return self.loss

    def steps(self, microbatches: Sequence[Any], *, scale: float | Tensor) -> Iterator[Action | None]:
        """Run the program an action at a time: yields None after each, or the action that must wait."""
        self._begin(microbatches, scale)
        for action in self.program:
            while not self._inputs_ready(action):
                yield action
            if action.op in GRADIENT_OPS:
                self._left[action.stage] -= 1
                if self._left[action.stage] == 0:
                    self.sync.arm(action.stage)
            with torch.set_grad_enabled(self.trains):
                if self.recorder is None or action.op not in COMPUTE:
                    self._do[action.op](action)
                else:
                    self._record(action, self.recorder)
            yield None
        self.transport.flush()
        if self.trains:
            self.sync.finish()

    def _begin(self, microbatches: Sequence[Any], scale: float | Tensor) -> None:
        if len(microbatches) != self.schedule.num_microbatches:
            raise ScheduleError(
                f"{len(microbatches)} microbatches given, schedule {self.schedule.name} has "
                f"{self.schedule.num_microbatches}"
            )
        self._microbatches, self._scale = microbatches, scale
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._left = Counter(action.stage for action in self.program if action.op in GRADIENT_OPS)
        self._receipts: dict[Message, Receipt] = {}
        self._ready: dict[Message, Tensor] = {}  # made on this rank: to be sent, or used by the neighbour stage here
        self._in_flight: dict[tuple[int, int], _InFlight] = {}
        self._kept: dict[tuple[int, int], list[tuple[Any, Accumulate]]] = {}

    def _record(self, action: Action, recorder: Recorder) -> None:
        """Do an action and tell when it computed; what it waited for its message comes before."""
        self._waited_s = 0.0
        self._synchronize()
        begun = time.perf_counter()
        self._do[action.op](action)
        self._synchronize()
        recorder(action, begun + self._waited_s, time.perf_counter())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # --- messages -----------------------------------------------------------------------------

    def _rank_of(self, stage: int) -> int:
        return self.schedule.stage_to_rank[stage]

    def _needs(self, action: Action) -> Message | None:
        """The message that a compute action consumes."""
        stage, microbatch = action.stage, action.microbatch
        assert microbatch is not None or action.op not in (Op.F, *GRADIENT_OPS)
        if action.op == Op.F and stage > 0:
            return Message("F", stage, microbatch)  # type: ignore[arg-type]
        if action.op in (Op.B, Op.I) and stage < self.last_stage:
            return Message("B", stage, microbatch)  # type: ignore[arg-type]
        return None

    def _inputs_ready(self, action: Action) -> bool:
        message = self._needs(action)
        if message is None or message in self._ready:
            return True
        if message not in self._receipts:
            raise ScheduleError(f"{action} on pipeline rank {self.rank} runs before {message} was made or asked for")
        return self._receipts[message].ready()

    def _take(self, message: Message) -> Tensor:
        if message in self._ready:
            return self._ready.pop(message)
        begun = time.perf_counter()
        tensor = self._receipts.pop(message).wait()
        if self.recorder is not None:
            self._synchronize()
            self._waited_s += time.perf_counter() - begun
        return tensor

    def _send(self, kind: str, action: Action) -> None:
        stage = action.stage + (1 if kind == "F" else -1)
        message = Message(kind, stage, action.microbatch)  # type: ignore[arg-type]
        self.transport.send(self._ready.pop(message), message, self._rank_of(stage))

    def _receive(self, kind: str, action: Action) -> None:
        message = Message(kind, action.stage, action.microbatch)  # type: ignore[arg-type]
        source = self._rank_of(action.stage + (-1 if kind == "F" else 1))
        module = self.stages[action.stage]
        shape = module.boundary_shape(*self._microbatches[message.microbatch].tokens_BT.shape)
        empty = empty_like_boundary(shape, module.dtype, self.device)
        self._receipts[message] = self.transport.receive(empty, message, source)

    # --- compute ------------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        stage, index = action.stage, action.microbatch
        assert index is not None
        message = self._needs(action)
        x = None if message is None else self._take(message)
        if x is not None and self.trains:
            x.requires_grad_()
        output = self.stages[stage](x, self._microbatches[index], self._scale)
        state = _InFlight(x)
        if stage == self.last_stage:
            self.loss += output.detach()
            state.tail = output
        else:
            self._ready[Message("F", stage + 1, index)] = output.detach()
            state.tail = _Tail.apply(output, state.arrived) if self.trains else None
        if self.trains:
            self._in_flight[stage, index] = state

    def _backward(self, action: Action) -> None:
        stage, index = action.stage, action.microbatch
        assert index is not None
        state = self._in_flight.pop((stage, index))
        message = self._needs(action)
        if message is not None:
            state.arrived.append(self._take(message))
        assert state.tail is not None
        torch.autograd.backward(state.tail, torch.ones_like(state.tail))
        if state.input is not None:
            assert state.input.grad is not None
            self._ready[Message("B", stage - 1, index)] = state.input.grad

    def _input_gradient(self, action: Action) -> None:
        assert action.microbatch is not None
        sink = self.sinks[action.stage]
        sink.keep()
        try:
            self._backward(action)
        finally:
            self._kept[action.stage, action.microbatch] = sink.take()

    def _weight_gradient(self, action: Action) -> None:
        assert action.microbatch is not None
        self.sinks[action.stage].run(self._kept.pop((action.stage, action.microbatch)))


def run_together(executors: Sequence[Executor], batches: Sequence[Sequence[Any]], *, scale: float) -> list[Tensor]:
    """Run the executors of all pipeline ranks in this process, by turns, over one LocalTransport.

    Returns each rank's loss. Raises ScheduleError, naming who waits for what, where nobody can go on.
    """
    running = {e.rank: e.steps(b, scale=scale) for e, b in zip(executors, batches, strict=True)}
    while running:
        waiting: dict[int, Action] = {}
        for rank, steps in list(running.items()):
            try:
                action = next(steps)
            except StopIteration:
                del running[rank]
                continue
            if action is not None:
                waiting[rank] = action
        if running and len(waiting) == len(running):
            stuck = "; ".join(f"rank {rank} at {action}" for rank, action in waiting.items())
            raise ScheduleError(f"the pipeline is stuck: {stuck}")
    return [executor.loss for executor in executors]
