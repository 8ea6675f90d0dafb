"""The data axis: flat buffers, and buckets that leave while the last backward still runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from parallax.data.buckets import FlatBuffers
from parallax.data.replicate import Replicate
from parallax.mesh import init_mesh
from parallax.params import collect
from tests.cases import GPT2, LLAMA, TIED, advance, start


def launches(mesh: str, changes: dict[str, Any]) -> list[list[str]]:
    """For each of three steps what happened, in order: F/B with the microbatch, and buckets on the data axis."""
    events: list[str] = []
    honest_launch = Replicate.launch
    Replicate.launch = lambda sync, flat, b: (events.append("bucket"), honest_launch(sync, flat, b))[1]  # type: ignore

    run, state = start(mesh, **changes)
    for letter, name in (("F", "_forward"), ("B", "_backward")):
        op = next(op for op in run.pipeline._do if op.value == letter)
        honest = getattr(run.pipeline, name)

        def watched(action: Any, honest: Any = honest) -> None:
            events.append(f"{action} begins")
            honest(action)
            events.append(f"{action} ends")

        run.pipeline._do[op] = watched
    found = []
    for _ in range(3):
        events.clear()
        advance(run, state, 1)
        found.append(list(events))
    return found


@pytest.mark.parametrize("mesh", ["2x1x1", "2x1x2"])
@pytest.mark.parametrize("changes", [GPT2, LLAMA | TIED], ids=["gpt2", "llama-tied"])
def test_buckets_leave_during_the_last_backward_and_never_before(ranks, mesh: str, changes: dict[str, Any]):
    options = changes | {"batch.num_microbatches": 3, "data.bucket_bytes": 40000}
    for rank, steps in enumerate(ranks(4 if mesh == "2x1x2" else 2, launches, mesh, options)):
        stage = rank // 2
        last = f"{stage}B2 begins"
        for number, events in enumerate(steps):
            begins = events.index(last)
            assert "bucket" not in events[:begins], "nothing is sent in the other microbatches"
            during = events[begins : events.index(f"{stage}B2 ends")].count("bucket")
            after = events[events.index(f"{stage}B2 ends") :].count("bucket")
            if number == 0:
                assert during == 0, "the first step learns how often each parameter is used"
            else:
                assert during >= 2, "most buckets are under way before the backward ends"
                assert after == 1, "what is late goes in one message"


class Shared(nn.Module):
    """One weight used twice in a forward, and a layer that torch's autograd serves."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.once = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.once(self.twice(self.twice(x)))


def plain_module() -> None:
    """Any torch module's gradients are summed: they come through autograd into the views."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    torch.manual_seed(0)
    model, reference = Shared().double(), Shared().double()
    reference.load_state_dict(model.state_dict())
    flat = FlatBuffers(model, collect(model, mesh), bucket_bytes=64, grad_dtype=torch.float64)
    sync = Replicate(mesh, {0: flat}, {})
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64)  # [rank, microbatch, sample, feature]
        sync.zero()
        for number, mine in enumerate(x[mesh.data.rank]):
            if number == 2:
                sync.arm(0)
            model(mine).square().sum().backward()
        sync.reduce(0)
        sync.finish()
        reference.zero_grad()
        reference(x.flatten(0, 2)).square().sum().backward()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert ours.grad is not None and ours.grad.untyped_storage().data_ptr() == flat.grads.data_ptr()
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_a_plain_module_s_gradients_are_summed_in_place(ranks):
    ranks(2, plain_module)


def late_gradient() -> str:
    """In the second step a parameter is used once more than in the first, after its bucket has gone."""
    mesh = init_mesh("2x1x1", device_type="cpu")
    model = nn.Linear(4, 4)
    flat = FlatBuffers(model, collect(model, mesh), bucket_bytes=64, grad_dtype=torch.float32)
    sync = Replicate(mesh, {0: flat}, {})
    try:
        for uses in (1, 2):
            sync.zero()
            sync.arm(0)
            for _ in range(uses):
                model(torch.ones(1, 4)).sum().backward()
            sync.reduce(0)
            sync.finish()
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_gradient_after_its_bucket_is_an_error_not_a_wrong_sum(ranks):
    for text in ranks(2, late_gradient):
        assert "used more often in this backward" in text


def test_flat_buffers_hold_every_parameter_once_and_aligned():
    run, state = start("1x1x1", **GPT2 | TIED)
    advance(run, state, 1)
    (flat,) = run.flats.values()
    ranges = sorted((placed.start, placed.stop) for placed in flat.placed)
    assert all(start % 64 == 0 for start, _ in ranges)
    assert all(stop <= start for (_, stop), (start, _) in zip(ranges, ranges[1:], strict=False))
    assert [b.start for b in flat.early][1:] == [b.stop for b in flat.early][:-1], "buckets are contiguous"
    assert flat.early[0].start == 0 and flat.early[-1].stop == flat.early_stop
    order = [placed.name for placed in flat.placed if placed.start < flat.early_stop]
    layers = [int(name.split(".")[1]) for name in order if name.startswith("layers.")]
    assert layers == sorted(layers, reverse=True), "buckets in reverse order of use"
    for placed in flat.placed:
        assert placed.parameter.grad is not None
        assert placed.parameter.grad.data_ptr() == placed.of(flat.grads).data_ptr(), "param.grad is a view"
    decays = {
        p.name: segment.kind == "decay"
        for segment in flat.segments
        for p in flat.placed
        if segment.start <= p.start < segment.stop
    }
    assert len(decays) == sum(p.start < flat.stop for p in flat.placed)
    assert all(decays[name] == (not name.endswith("bias") and "norm" not in name) for name in decays)


@pytest.mark.parametrize(("dtype", "grad_dtype", "expected"), [
    ("bfloat16", "float32", torch.float32),
    ("bfloat16", "parameter", torch.bfloat16),
    ("float32", "parameter", torch.float32),
    ("float64", "float32", torch.float64),
])  # fmt: skip
def test_gradients_are_summed_in_the_dtype_that_was_asked_for(dtype: str, grad_dtype: str, expected: torch.dtype):
    run, state = start("1x1x1", **LLAMA | {"dtype": dtype, "data.grad_dtype": grad_dtype})
    assert {flat.grads.dtype for flat in run.flats.values()} == {expected}
    (loss, norm), (later, _) = advance(run, state, 2)
    assert 4 < loss < 5.5 and 0 < norm < 10 and later != loss
