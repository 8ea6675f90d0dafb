"""What the tests run in a process with the simulated device. Each takes the device first, and gives JSON."""

from __future__ import annotations

from typing import Any

from tests.simulated.device import Device


def train(
    device: Device, changes: dict[str, Any], steps: int = 3, mesh: str = "1x1x1", again: bool = False
) -> dict[str, Any]:
    """Loss and gradient norm of each step, how often the host waited in it, and the kernels of the last step.

    again: the same batch in every step.
    """
    from parallax.step import train_step
    from tests.cases import make_batch, start

    run, state = start(mesh, on="cuda", **changes)
    rows, waits = [], []
    for step in range(steps):
        batch = make_batch(run.config, run.mesh, 0 if again else step)
        kernels, waited = device.kernels(), device.waits
        result = train_step(run, state, batch)
        rows.append((result.loss, result.grad_norm))
        waits.append(device.waits - waited)
    return {"rows": rows, "waits": waits, "kernels": device.kernels() - kernels}


def train_several(device: Device, every: list[dict[str, Any]], *options: Any) -> list[dict[str, Any]]:
    return [train(device, changes, *options) for changes in every]


def same_moments(device: Device, changes: dict[str, Any]) -> float:
    """The share of the optimizer's moments that are on the device, bit for bit, what they are on the CPU."""
    import torch

    from tests.cases import advance, start

    moments = []
    for kind in ("cuda", "cpu"):
        run, state = start("1x1x1", on=kind, **changes)
        advance(run, state, 1)
        found = state.optimizer.flat_state(0)
        moments.append(torch.cat([t.cpu() for name in ("exp_avg", "exp_avg_sq") for t in found[name]]))
    used = moments[1] != 0
    return float((moments[0] == moments[1])[used].double().mean())


def copies_are_there(device: Device) -> bool:
    """Whether a save in the background has its copies when the training goes on."""
    import torch

    from parallax.checkpoint.background import _copies
    from parallax.checkpoint.save import Entry

    tensors = {name: torch.randn(5, 3, device="cuda") for name in ("a", "b")}
    copies = _copies([Entry(name, (5, 3), ((0, 5), (0, 3)), tensor, (0,)) for name, tensor in tensors.items()], {})
    return all(copy.tensor.is_pinned() and not copy.tensor.isnan().any() for copy in copies)


def read_batches(device: Device) -> int:
    """How often the host waits for the batches of a corpus."""
    from parallax.batches import token_batches
    from parallax.corpus import corpus_for
    from tests.cases import make_config

    corpus = corpus_for(make_config("1x1x1", **{"model.vocab": 256}))
    batches = token_batches(corpus.train, seed=0, global_size=4, sequence_length=16, device="cuda")
    first = next(batches)
    waited = device.waits
    second = next(batches)
    told = device.waits - waited
    again = next(token_batches(corpus.train, seed=0, global_size=4, sequence_length=16, start_step=1))
    assert first.tokens_BT.is_cuda and second.tokens_BT.cpu().equal(again.tokens_BT)
    return told


def evaluate(device: Device, changes: dict[str, Any], num_batches: int) -> int:
    """How often the host waits for the validation loss of some batches."""
    import parallax.step
    from tests.cases import make_batch, start

    run, _ = start("1x1x1", on="cuda", **changes)
    batches = [make_batch(run.config, run.mesh, step) for step in range(num_batches)]
    waited = device.waits
    parallax.step.evaluate(run, batches)
    return device.waits - waited


def loss_kernels(device: Device, num_tokens: int, vocab: int) -> dict[str, Any]:
    """Kernels that the output layer with its loss launches, forward and backward, and the most bytes it holds."""
    import torch

    from parallax.mesh import Axis
    from parallax.models.costs import fuses_loss
    from parallax.tensor.fused_loss import linear_cross_entropy
    from parallax.tensor.layers import ColumnParallelLinear

    layer = ColumnParallelLinear(8, vocab, Axis("tensor"), bias=False, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(num_tokens, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, vocab, (num_tokens,), device="cuda")
    device.forget_peak()
    before, held = device.kernels(), device.held
    loss = linear_cross_entropy(x, layer, targets, vocab_range=(0, vocab))
    peak = device.peak - held
    loss.backward()
    kernels = sum((device.kernels() - before).values())
    return {"fused": fuses_loss(num_tokens, vocab), "kernels": kernels, "peak": peak}


def hazards(device: Device) -> dict[str, Any]:
    """That the device tells what it is there to tell."""
    import torch

    here, there = torch.arange(4.0), torch.arange(4.0, device="cuda")
    found: dict[str, Any] = {}
    try:
        here + there
    except RuntimeError as error:
        found["mixed"] = str(error)
    pinned = torch.zeros(4, pin_memory=True)
    waited = device.waits
    pinned.copy_(there, non_blocking=True)
    found["before"], found["quiet"] = bool(pinned.isnan().all()), device.waits - waited
    torch.cuda.current_stream().synchronize()
    found["after"] = pinned.equal(here)
    torch.zeros(4).copy_(there, non_blocking=True)
    there.sum().item()
    here.to("cuda")
    found["waits"] = device.waits - waited
    held = device.held
    kept = torch.empty(1000, device="cuda")
    found["bytes"] = device.held - held
    kept.untyped_storage().resize_(0)
    found["freed"] = device.held - held
    return found
