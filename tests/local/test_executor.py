"""Every schedule through the executor, all ranks in one process: bit for bit what plain gradient accumulation does."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from parallax.errors import ScheduleError
from parallax.gradients import GradSink
from parallax.pipeline.executor import Executor, run_together
from parallax.pipeline.lower import lower
from parallax.pipeline.schedule import Action, Op, Schedule
from parallax.pipeline.schedules import SCHEDULES, forward_only
from parallax.pipeline.transport import LocalTransport
from parallax.pipeline.validate import validate
from tests.cases import VARIANTS
from tests.local.pipelines import LocalPipeline, split_1f1b, two_stages_a_rank
from tests.pure.test_table import random_tables

STEPS = 3
NUM_MICROBATCHES = 6


@functools.cache
def alone(variant: str) -> Mapping[str, Tensor]:
    return LocalPipeline(SCHEDULES["1f1b"](1, NUM_MICROBATCHES), **VARIANTS[variant]).train(STEPS)


TABLES: dict[str, Any] = {name: make for name, make in SCHEDULES.items()}
TABLES |= {f"split-{d}": functools.partial(split_1f1b, delay=d) for d in (0, 1, 3)}
TABLES["two-stages-a-rank"] = two_stages_a_rank


@pytest.mark.parametrize("variant", ["gpt2-tied", "llama", "gpt2-dropout"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("table", TABLES)
def test_every_schedule_is_gradient_accumulation_bit_for_bit(table: str, ranks: int, variant: str):
    schedule = TABLES[table](ranks, NUM_MICROBATCHES)
    validate(lower(schedule))
    trained = LocalPipeline(schedule, **VARIANTS[variant]).train(STEPS)
    assert trained.keys() == alone(variant).keys()
    for name, values in alone(variant).items():
        assert torch.equal(values, trained[name]), name


def test_backward_in_another_order_is_seen():
    """Float32 sums depend on their order: the bit-for-bit test above can fail."""
    base = SCHEDULES["gpipe"](2, NUM_MICROBATCHES)
    programs = tuple(p[:NUM_MICROBATCHES] + p[NUM_MICROBATCHES:][::-1] for p in base.programs)
    backwards = Schedule("lifo", NUM_MICROBATCHES, base.stage_to_rank, programs)
    with pytest.raises(ScheduleError, match="microbatch order"):
        validate(backwards)
    trained = LocalPipeline(backwards, **VARIANTS["llama"]).train(STEPS)
    assert any(not torch.equal(values, trained[name]) for name, values in alone("llama").items())


def test_a_stage_s_output_is_freed_once_it_is_sent():
    """Only the graph stays between forward and backward: the output's memory goes with the message."""
    alive: list[weakref.ref[Tensor]] = []
    kept: list[int] = []

    class Watching(LocalTransport):
        def send(self, tensor: Tensor, message: Any, rank: int) -> None:
            super().send(tensor, message, rank)
            del tensor
            gc.collect()
            if message.kind == "F":
                kept.append(sum(ref() is not None for ref in alive))

    pipeline = LocalPipeline(SCHEDULES["gpipe"](2, NUM_MICROBATCHES), **VARIANTS["llama"])
    transport = Watching()
    for executor in pipeline.executors:
        executor.transport = transport
    pipeline.stages[0].register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    pipeline.run(0)
    assert len(kept) == NUM_MICROBATCHES
    assert max(kept) <= 1, "at most the output just being sent is alive"


def test_after_a_run_nothing_is_left_behind():
    pipeline = LocalPipeline(split_1f1b(3, NUM_MICROBATCHES, 2), **VARIANTS["gpt2-tied"])
    pipeline.run(0)
    for executor in pipeline.executors:
        left = (executor._ready, executor._receipts, executor._in_flight, executor._kept)
        assert not any(left)


def test_evaluation_records_no_graph():
    schedule = forward_only(SCHEDULES["1f1b"](2, NUM_MICROBATCHES))
    pipeline = LocalPipeline(schedule, **VARIANTS["llama"])
    loss = pipeline.run(0)
    assert not loss.requires_grad and float(loss) > 0
    assert all(not flat.grads.any() for flat in pipeline.flats.values())
    assert all(not executor._in_flight for executor in pipeline.executors)


def test_a_stuck_pipeline_says_who_waits_for_what():
    """Rank 0 wants the gradient before it has given the input."""
    programs = (
        (Action(0, Op.RECV_B, 0), Action(0, Op.F, 0), Action(0, Op.B, 0), Action(0, Op.SEND_F, 0)),
        (Action(1, Op.RECV_F, 0), Action(1, Op.F, 0), Action(1, Op.B, 0), Action(1, Op.SEND_B, 0)),
    )
    stuck = Schedule("stuck", 1, (0, 1), programs)
    with pytest.raises(ScheduleError, match=r"rank 0, column 2 \(0B0\) waits for 1SEND_B0.*rank 1, column 1 \(1F0\)"):
        validate(stuck)
    pipeline = LocalPipeline(SCHEDULES["gpipe"](2, 1), **VARIANTS["llama"])
    transport = LocalTransport()
    executors = [
        Executor({e.rank: pipeline.stages[e.rank]}, e.sinks, stuck, e.rank, transport, e.sync)
        for e in pipeline.executors
    ]
    from tests.cases import make_batch

    batch = make_batch(pipeline.config, pipeline.mesh, 0).split(1)
    with pytest.raises(ScheduleError, match="stuck: rank 0 at 0B0; rank 1 at 1F0"):
        run_together(executors, [batch, batch], scale=1.0)


def test_the_wrong_number_of_microbatches_or_stages_is_refused():
    pipeline = LocalPipeline(SCHEDULES["gpipe"](1, 2), **VARIANTS["llama"])
    with pytest.raises(ScheduleError, match="3 microbatches given, schedule gpipe has 2"):
        pipeline.executors[0].run([None] * 3, scale=1.0)
    two = lower(SCHEDULES["gpipe"](2, 2))
    with pytest.raises(ScheduleError, match=r"has stages \[0\], schedule gpipe gives it \[1\]"):
        Executor({0: pipeline.stages[0]}, {}, two, 1, LocalTransport(), pipeline.sync)


class Sums:
    """A stage that adds its number to what comes in: what arrives at the end tells which way it took."""

    dtype = torch.float64

    def __init__(self, stage: int, last: bool) -> None:
        self.last, self.sink = last, GradSink()
        self.weight = torch.nn.Parameter(torch.full((1,), float(stage + 1), dtype=torch.float64))
        self.buffer = torch.zeros(1, dtype=torch.float64)
        self.sink.buffer_of = lambda parameter: self.buffer

    def __call__(self, x: Tensor | None, microbatch: Any, scale: float) -> Tensor:
        x = microbatch.tokens_BT if x is None else x
        y = _AddWeight.apply(x, self.weight, self.sink)
        return y.sum() * microbatch.weight if self.last else y

    def boundary_shape(self, num_samples: int, sequence_length: int) -> tuple[int, ...]:
        return (num_samples, sequence_length)


class _AddWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: torch.nn.Parameter, sink: GradSink) -> Tensor:
        ctx.weight, ctx.sink = weight, sink
        return x + weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.sink.add(ctx.weight, lambda out: out.add_(grad.sum()))
        return grad, None, None


class NoSync:
    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


@given(random_tables())
@settings(max_examples=200)
def test_a_random_table_runs_or_is_refused(table: Schedule):
    try:
        validate(table)
    except ScheduleError:
        return
    lowered, last = lower(table), table.num_stages - 1
    transport, executors, stages = LocalTransport(), [], {}
    for rank in range(table.num_ranks):
        mine = {s: Sums(s, s == last) for s in table.stages_of(rank)}
        stages |= mine
        sinks = {s: stage.sink for s, stage in mine.items()}
        executors.append(Executor(mine, sinks, lowered, rank, transport, NoSync()))
    batch = [
        SimpleNamespace(tokens_BT=torch.full((1, 2), float(i), dtype=torch.float64), weight=i + 1.0)
        for i in range(table.num_microbatches)
    ]
    losses = run_together(executors, [batch] * table.num_ranks, scale=1.0)
    path = (last + 1) * (last + 2) / 2
    assert float(sum(losses)) == sum(2 * (i + path) * (i + 1) for i in range(table.num_microbatches))
    for stage in stages.values():
        assert float(stage.buffer) == sum(2 * (i + 1) for i in range(table.num_microbatches))
