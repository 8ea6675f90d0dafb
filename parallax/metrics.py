"""One line a step from one rank, and the same numbers in full precision in OUTPUT/metrics.jsonl."""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from parallax.memory import format_bytes, peak_memory_bytes
from parallax.mesh import Mesh
from parallax.step import StepResult

__all__ = ["Metrics", "peak_flops"]

PEAK_FLOPS = {
    # Dense bfloat16 tensor-core peaks from the vendors' data sheets, FLOP/s.
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
}
TF32_SHARE = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 0.5}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device at this dtype (float32 as TF32: half), None where it is not known: a CPU, float64."""
    if device.type != "cuda" or dtype not in TF32_SHARE:
        return None
    name = torch.cuda.get_device_name(device)
    known = next((key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)), None)
    if known is None or known == "V100" and dtype == torch.float32:  # it has no TF32
        return None
    return PEAK_FLOPS[known] * TF32_SHARE[dtype]


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


class Metrics:
    """Writes what happens on rank 0; silent elsewhere, at the same cost in collectives: none.

    flops_per_token: of forward and backward of the whole model. num_steps: where ETA counts to.
    """

    def __init__(
        self,
        mesh: Mesh,
        output: Path | None,
        *,
        num_steps: int,
        flops_per_token: float,
        dtype: torch.dtype,
        log_every: int = 1,
        clock: Callable[[], float] = time.perf_counter,
        stream: TextIO | None = None,
    ) -> None:
        self.mesh, self.num_steps, self.flops_per_token = mesh, num_steps, flops_per_token
        self.log_every, self._clock, self._stream = log_every, clock, stream
        self.speaks = mesh.rank == 0
        self._peak = peak_flops(mesh.device, dtype)
        self._file: TextIO | None = None
        if self.speaks and output is not None:
            output.mkdir(parents=True, exist_ok=True)
            self._file = open(output / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._times: list[float] = []
        self._skipped = 0
        self._last = clock()
        self._lap: float | None = None

    def say(self, text: str) -> None:
        """One message from one rank."""
        if self.speaks:
            print(text, file=self._stream or sys.stdout, flush=True)

    def lap(self) -> None:
        """The step is done; what comes before `record` (validation) is not part of its time."""
        self._lap = self._clock()

    def record(self, result: StepResult, **extra: float) -> None:
        """Log a finished step; its time is that from the last `record` or `resume` to `lap`, or to now.

        extra: more columns, as val_loss.
        """
        now = self._clock() if self._lap is None else self._lap
        step_s, self._last, self._lap = max(now - self._last, 1e-9), self._clock(), None
        if not self.speaks:
            return
        # The first step pays for start-up; ETA comes from the median of the recent ones.
        self._times = [*self._times, step_s][-21:]
        row: dict[str, Any] = {
            "step": result.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": result.tokens,
            "tokens_per_s": result.tokens / step_s,
            "step_s": step_s,
            "peak_memory_bytes": peak_memory_bytes(self.mesh.device),
            "mfu": self._mfu(result.tokens / step_s),
            "skipped": int(bool(result.skipped)),
            **extra,
        }
        if self._file is not None:
            # JSON has no NaN: a validation without a target is null.
            finite = {k: v if v is None or math.isfinite(v) else None for k, v in row.items()}
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
        self._skipped += bool(result.skipped)
        if result.skipped:
            self.say(f"step {result.step} is skipped, the {_ordinal(self._skipped)} of this start: {result.skipped}")
        if result.step % self.log_every == 0 or result.step in (1, self.num_steps):
            self.say(self._line(row, extra))

    def resume(self) -> None:
        """What ran since the last record (start-up, a checkpoint) is not part of a step's time."""
        self._last = self._clock()

    def _mfu(self, tokens_per_s: float) -> float | None:
        if self._peak is None:
            return None
        return tokens_per_s * self.flops_per_token / (self._peak * self.mesh.shape.size)

    def _line(self, row: dict[str, Any], extra: dict[str, float]) -> str:
        recent = sorted(self._times[1:] or self._times)
        eta = recent[len(recent) // 2] * (self.num_steps - row["step"])
        mfu = "n/a" if row["mfu"] is None else f"{100 * row['mfu']:.1f}%"
        columns = [
            f"step {row['step']:>{len(str(self.num_steps))}}/{self.num_steps}",
            f"loss {row['loss']:.4f}",
            f"grad_norm {row['grad_norm']:.4f}",
            f"lr {row['lr']:.2e}",
            f"{row['tokens_per_s']:,.0f} tokens/s",
            f"{row['step_s'] * 1000:.0f} ms",
            f"memory {format_bytes(row['peak_memory_bytes'])}",
            f"MFU {mfu}",
            f"ETA {format_duration(eta)}",
            *(f"{name} {value:.4f}" for name, value in extra.items()),
        ]
        return " | ".join(columns)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
