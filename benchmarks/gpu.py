"""Tokens/s and MFU on one GPU: parallax beside a plain torch loop, eager and compiled, at 124 M, 350 M and 1.5 B.

    python benchmarks/gpu.py [model=124M,350M,1.5B] [steps=20] [batch=8] [dtype=bfloat16] [device=cuda] [append=FILE]

GPT-2 shapes, 1024 tokens, AdamW; float32 masters in parallax, autocast over float32 weights in the plain loop, as
nanoGPT has it. Same weights to begin with, same batches; the first losses are printed side by side. One after the
other, so that each has the memory to itself. device=cpu with model=tiny tries the script out.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import asked, count, listed, machine, one_of, refuse, text
from torch import Tensor
from torch_native import Stage

from parallax.assemble import DTYPES, assemble
from parallax.batches import Batch
from parallax.config_io import load
from parallax.errors import ConfigError
from parallax.mesh import init_mesh
from parallax.metrics import peak_flops
from parallax.step import train_step

MODELS = {
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "vocab": 512, "length": 64},
    "124M": {"layers": 12, "hidden": 768, "heads": 12, "vocab": 50304, "length": 1024},
    "350M": {"layers": 24, "hidden": 1024, "heads": 16, "vocab": 50304, "length": 1024},
    "1.5B": {"layers": 48, "hidden": 1600, "heads": 25, "vocab": 50304, "length": 1024},
}
WARM_UP = 5
Step = Callable[[Tensor, Tensor], Any]


class Weights(dict[str, Tensor]):
    """Of a model, on the host. flops: of a token."""

    flops = 0.0


def batch_of(shape: dict[str, int], size: int, number: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, shape["vocab"], (size, shape["length"] + 1), generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def ours(
    shape: dict[str, int], size: int, dtype: str, device: torch.device, compiled: bool = False
) -> tuple[Step, dict[str, Tensor], float]:
    """The step, the weights it begins with (on the host), the FLOPs of a token."""
    keys = [f"model.{key}={shape[key]}" for key in ("layers", "hidden", "heads", "vocab")]
    keys += ["model.positions=learned", "model.norm=layernorm", "model.activation=gelu", "model.bias=true"]
    keys += [f"corpus.sequence_length={shape['length']}", f"batch.global_size={size}", f"batch.microbatch_size={size}"]
    keys += [f"dtype={dtype}", f"device={device.type}", "optimizer.schedule=constant", "optimizer.warmup_steps=0"]
    keys += ["optimizer.max_grad_norm=0", "optimizer.lr=1e-4", f"compile={str(compiled).lower()}"]
    config = load(keys)
    run, state = assemble(config, init_mesh("1x1x1", device_type=device.type))
    named = dict(run.stages[0].named_parameters())
    weights = {spec.name: spec.view(named[spec.parameter].detach()).float().cpu().clone() for spec in run.specs[0]}
    numbers = iter(range(1 << 30))

    def step(tokens: Tensor, targets: Tensor) -> float:
        samples = torch.arange(size, device=device)
        return train_step(run, state, Batch(tokens, targets, samples, next(numbers))).loss

    return step, weights, run.plan.flops_per_token


def plain(shape: dict[str, int], weights: dict[str, Tensor], dtype: str, device: torch.device, compiled: bool) -> Step:
    model = Stage(shape, 0, 1).to(device)
    model.fill(weights)
    forward: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    wide = DTYPES[dtype] in (torch.float32, torch.float64)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        cast = contextlib.nullcontext() if wide else torch.autocast(device.type, DTYPES[dtype])
        with cast:
            loss = F.cross_entropy(forward(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def measure(step: Step, shape: dict[str, int], size: int, steps: int, device: torch.device) -> tuple[float, float]:
    """(median seconds, first loss)."""
    seconds, first = [], 0.0
    for number in range(WARM_UP + steps):
        data = batch_of(shape, size, number, device)
        _wait(device)
        begun = time.perf_counter()
        loss = step(*data)
        _wait(device)
        seconds.append(time.perf_counter() - begun)
        first = first or float(loss)
    return statistics.median(seconds[WARM_UP:]), first


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(
    model: str, who: str, compiled: bool, size: int, steps: int, dtype: str, device: torch.device, weights: Weights
) -> str:
    """One line of the table. weights: filled by parallax, which comes first, and taken by the plain loop."""
    shape, name = MODELS[model], f"{who}, compiled" if compiled else who
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        if who == "parallax":
            step, own, weights.flops = ours(shape, size, dtype, device, compiled)
            weights.update(own)
        else:
            step = plain(shape, weights, dtype, device, compiled)
        took, loss = measure(step, shape, size, steps, device)
    except (ConfigError, RuntimeError) as error:  # out of memory, no compiler
        return f"| {model} | {name} | {str(error).splitlines()[0][:80]} |"
    tokens, peak = size * shape["length"] / took, peak_flops(device, DTYPES[dtype])
    mfu = f"{tokens * weights.flops / peak:.1%}" if peak else ""
    held = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return f"| {model} | {name} | {1000 * took:.1f} | {tokens:,.0f} | {mfu} | {loss:.4f} | {held:.1f} |"


def main() -> None:
    wish = asked(
        {
            "model": ("124M,350M,1.5B", listed(one_of(*MODELS))),
            "steps": ("20", count),
            "batch": ("8", count),
            "dtype": ("bfloat16", one_of(*DTYPES)),
            "device": ("cuda", one_of("cuda", "cpu")),
            "append": (None, text),
        },
        sys.argv[1:],
    )
    if wish.device == "cuda" and not torch.cuda.is_available():
        refuse("device=cuda: torch sees no GPU here; device=cpu model=tiny tries the script out")
    device, dtype, size, steps = torch.device(wish.device), wish.dtype, wish.batch, wish.steps
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    said = [f"{name}, {dtype}, batch {size}; {machine()}", ""]
    said += ["| model | who | ms | tokens/s | MFU | first loss | peak GB |", "|" + "---|" * 7]
    print("\n".join(said), flush=True)
    for model in wish.model:
        weights = Weights()
        for who, compiled in itertools.product(("parallax", "torch"), (False, True)):
            said.append(row(model, who, compiled, size, steps, dtype, device, weights))
            print(said[-1], flush=True)
            gc.collect()  # the next has the memory to itself
    if wish.append:
        with open(wish.append, "a") as file:
            print("\n" + "\n".join(said), file=file)


if __name__ == "__main__":
    main()
