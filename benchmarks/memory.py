"""Peak memory of one training step on each rank: parallax beside its peers, and beside what it predicted.

    python benchmarks/memory.py [mesh=2x2x2,1x1x2] [peers=native,megatron] [sp=false|true|both]
                                [append=FILE] [+KEY=VALUE]

The model, meshes and peers of training.py. Resident memory, by the kernel's count: `peak` is the most that a rank held
during the third step, `step` is that without what its process held after a step of next to nothing, before anything
was built. The largest rank of each; the last column has `step` of every rank. Ratios are parallax over the peer.
`predicted` is parallax's own figure of parameters, gradients, optimizer and activations for the rank that has most,
which no peer makes; under the table is the line with its parts. A row whose losses differ by more than 1e-5 is void.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import sys
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

from deepspeed_peer import ENVIRONMENT
from harness import Team, asked, machine
from training import DEEPSPEED, KEYS, assembled, build_peer, candidates, missing, step_of

STEPS = 3
PARALLAX = ("parallax.assemble", "parallax.step", "parallax.config_io", "parallax.batches")
TORCH = ("torch.distributed.tensor.parallel", "torch.distributed.fsdp", "torch.distributed.pipelining")
MEGATRON = ("megatron.core.models.gpt", "megatron.core.distributed", "megatron.core.pipeline_parallel")


def imports(name: str) -> None:
    """What the candidate will use, so that the size of its code is not counted as memory of the step."""
    warnings.filterwarnings("ignore")  # what is not installed beside them
    if name in DEEPSPEED:
        os.environ |= ENVIRONMENT
    theirs = {"parallax": (), "deepspeed": ("deepspeed", "deepspeed.pipe"), "megatron": MEGATRON}
    family = next((key for key in theirs if name.startswith(key)), "")
    for module in (*PARALLAX, *theirs.get(family, TORCH)):
        importlib.import_module(module)


def tiny_step() -> None:
    """One step of next to nothing, which loads torch's code and the buffers of its products."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(1)
    model = nn.Sequential(nn.Embedding(8, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(approximate="tanh"))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = model(torch.zeros(1, 8, dtype=torch.long)).view(1, 2, 8, 32)
    logits = F.scaled_dot_product_attention(x, x, x, is_causal=True).flatten(0, 2)
    F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    optimizer.step()


def status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024


def settle() -> None:
    """Give back what nobody holds, and begin the peak anew."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure_rank(name: str, mesh: str, sequence_parallel: bool, extra: list[str]) -> dict[str, Any]:
    imports(name)
    tiny_step()
    settle()
    before = status("VmRSS")
    answer: dict[str, Any] = {"before": before, "losses": []}
    if name == "parallax":
        run, state = assembled(mesh, sequence_parallel, extra)
        step = step_of(run, state)
    else:
        step = build_peer(name, mesh, sequence_parallel)
    for number in range(STEPS):
        settle()
        answer["losses"].append(step(number))
    answer["peak"] = status("VmHWM")
    if name == "parallax":
        from parallax.memory_report import describe_memory
        from parallax.models.memory import StageMemory

        answer["predicted"] = reduce(StageMemory.__add__, (run.plan.memory[stage] for stage in run.stages)).total
        answer["line"] = describe_memory(run, state)
    return answer


def rank_main(arguments: list[str]) -> None:
    """Measure, and tell on standard output."""
    name, mesh, sequence_parallel, *extra = arguments
    try:
        answer = measure_rank(name, mesh, sequence_parallel == "true", extra)
    except Exception as error:  # noqa: BLE001 - whoever reads the table shall know why there is no row
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
    sys.stdin.read()
    os._exit(0)


def measure(name: str, mesh: str, sequence_parallel: bool, extra: list[str]) -> dict[str, Any]:
    """Of one candidate: the losses, what each rank held; or the error."""
    if missing(name):
        return {"error": "not installed"}
    arguments = [name, mesh, str(sequence_parallel).lower(), *(extra if name == "parallax" else [])]
    team = Team(name, math.prod(map(int, mesh.split("x"))), arguments, Path(__file__).resolve())
    try:
        if team.error:
            return {"error": team.error}
        told = [
            [loss for loss in each if loss is not None] for each in zip(*(r["losses"] for r in team.ready), strict=True)
        ]
        found: dict[str, Any] = {"losses": [sum(each) / len(each) for each in told]}
        found["peaks"] = [rank["peak"] for rank in team.ready]
        found["steps"] = [rank["peak"] - rank["before"] for rank in team.ready]
        if name == "parallax":
            found |= {"predicted": max(r["predicted"] for r in team.ready), "line": team.ready[0]["line"]}
        return found
    finally:
        team.end()


def row(label: str, name: str, found: dict[str, Any], ours: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {label} | {name} | {found['error']} |"
    peak, step = max(found["peaks"]), max(found["steps"])
    text = f"| {label} | {name} | {peak / 1e6:.0f} | {step / 1e6:.0f} |"
    each = " ".join(f"{one / 1e6:.0f}" for one in found["steps"])
    if found is ours:
        return f"{text} {ours['predicted'] / 1e6:.0f} | | | {each} |"
    apart = max(abs(a / b - 1) for a, b in zip(ours["losses"], found["losses"], strict=True))
    verdict = f" VOID: losses differ by {apart:.1e} |" if apart > 1e-5 else ""
    return f"{text} | {max(ours['peaks']) / peak:.2f} | {max(ours['steps']) / step:.2f} | {each} |{verdict}"


def rows(mesh: str, sequence_parallel: bool, peers: list[str], extra: list[str]) -> tuple[list[str], str]:
    """The lines of a mesh, and what parallax says of it."""
    label = f"{mesh}{' sp' if sequence_parallel else ''}"
    ours = measure("parallax", mesh, sequence_parallel, extra)
    lines = [row(label, "parallax", ours, ours)]
    if "error" in ours:
        return lines, ""
    for name in candidates(mesh, peers):
        lines.append(row(label, name, measure(name, mesh, sequence_parallel, []), ours))
    return lines, f"- {label}: {ours['line']}"


def main() -> None:
    asked_for = asked(KEYS, sys.argv[1:], plus=True)
    peers, wish, extra = asked_for.peers, asked_for.sp, asked_for.extra
    said = [f"`python {' '.join(sys.argv)}`: {machine()}", ""]
    said += ["| mesh | who | peak MB | step MB | predicted MB | peak | step | step MB of each rank |", "|" + "---|" * 8]
    print("\n".join(said), flush=True)
    own = [""]
    for mesh in asked_for.mesh:
        cut = int(mesh.split("x")[1]) > 1
        for sequence_parallel in (False, True) if cut and wish == "both" else (cut and wish == "true",):
            lines, line = rows(mesh, sequence_parallel, peers, extra)
            print("\n".join(lines), flush=True)
            said += lines
            own.append(line)
    print("\n".join(own), flush=True)
    if asked_for.append:
        with open(asked_for.append, "a") as file:
            print("\n" + "\n".join(said + own), file=file)


if __name__ == "__main__":
    rank_main(sys.argv[2:]) if sys.argv[1:2] == ["--rank"] else main()
