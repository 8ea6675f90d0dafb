"""Token batches: which samples a step sees, and this rank's slice of them.

A stream is cut into windows of sequence_length tokens, so that an epoch has every token as a target exactly once.
Sample n of the run is position n % global_size of step n // global_size; it is the window that a permutation keyed by
(seed, epoch) puts at n. So a sample is a function of (seed, step, position in the global batch) alone: no state to
save, nothing lost or repeated when the mesh changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallax.corpus import TokenStream
from parallax.errors import ConfigError
from parallax.rng import derive_key
from parallax.transfer import to_device

__all__ = ["IGNORE", "Batch", "Microbatch", "batch_at", "sample_window", "token_batches", "validation_batches"]

IGNORE = -100
"""A target that does not count: there is no token after this one."""

ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Microbatch:
    """tokens_BT and targets_BT: int64, targets IGNORE where there is none. samples_B: int64, positions in the
    global batch, which key dropout together with step."""

    tokens_BT: Tensor
    targets_BT: Tensor
    samples_B: Tensor
    step: int


@dataclass(frozen=True, slots=True)
class Batch(Microbatch):
    """This rank's slice of a global batch."""

    @property
    def num_tokens(self) -> int:
        """Targets that count."""
        return int(self.count())

    def count(self) -> Tensor:
        """`num_tokens` where the batch lies: an int64 scalar that nobody has waited for."""
        return (self.targets_BT != IGNORE).sum()

    def split(self, num_microbatches: int) -> list[Microbatch]:
        """Equal runs of samples, in order. Raises ConfigError where it does not divide."""
        if len(self.samples_B) % num_microbatches:
            raise ConfigError(
                f"{len(self.samples_B)} samples of this rank do not divide into {num_microbatches} microbatches"
            )
        tokens, targets, samples = (
            t.chunk(num_microbatches) for t in (self.tokens_BT, self.targets_BT, self.samples_B)
        )
        return [Microbatch(*part, step=self.step) for part in zip(tokens, targets, samples, strict=True)]


def num_windows(stream: TokenStream, sequence_length: int) -> int:
    """Samples in an epoch; the last may be padded."""
    return -(-(len(stream) - 1) // sequence_length)


def sample_window(seed: int, count: int, sample: int) -> int:
    """The window that sample n of the run is: a bijection of each run of `count` samples onto 0..count-1.

    A four-round Feistel network on the smallest square that holds count, walked until it lands inside (Black and
    Rogaway, CT-RSA 2002): no table, so a corpus of any size costs nothing.
    """
    epoch, place = divmod(sample, count)
    side = math.isqrt(count - 1) + 1
    keys = [derive_key("window", seed, epoch, number) for number in range(ROUNDS)]
    while True:
        high, low = divmod(place, side)
        for key in keys:
            high, low = low, (high + _scramble(low, key)) % side
        place = high * side + low
        if place < count:
            return place


def _scramble(value: int, key: int) -> int:
    x = (value * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def _window(stream: TokenStream, window: int, length: int, out: np.ndarray) -> None:
    """Fill row 0 of `out` with the window's tokens and row 1 with the token after each; padded past the end."""
    tokens = stream.read(window * length, window * length + length + 1)
    if len(tokens) > 1:
        out[0, : len(tokens) - 1] = tokens[:-1]
        out[1, : len(tokens) - 1] = tokens[1:]


def _batch(
    stream: TokenStream, windows: list[int | None], length: int, first: int, step: int, device: torch.device | str
) -> Batch:
    rows = np.zeros((len(windows), 2, length), np.int64)
    rows[:, 1] = IGNORE
    for row, window in zip(rows, windows, strict=True):
        if window is not None:
            _window(stream, window, length, row)
    data = to_device(torch.from_numpy(rows), device)
    samples = torch.arange(first, first + len(windows), device=device)
    return Batch(data[:, 0].contiguous(), data[:, 1].contiguous(), samples, step)


def _slice(global_size: int, data_rank: int, data_size: int) -> range:
    if global_size % data_size:
        raise ConfigError(f"a global batch of {global_size} does not divide over data={data_size}; choose a multiple")
    each = global_size // data_size
    return range(data_rank * each, (data_rank + 1) * each)


def batch_at(
    stream: TokenStream,
    *,
    step: int,
    seed: int,
    global_size: int,
    sequence_length: int,
    data_rank: int = 0,
    data_size: int = 1,
    device: torch.device | str = "cpu",
) -> Batch:
    """This data rank's samples of one step: positions data_rank*b to (data_rank+1)*b - 1, b = global_size/data_size."""
    places = _slice(global_size, data_rank, data_size)
    count = num_windows(stream, sequence_length)
    windows: list[int | None] = [sample_window(seed, count, step * global_size + place) for place in places]
    return _batch(stream, windows, sequence_length, places[0], step, device)


def token_batches(
    stream: TokenStream,
    *,
    seed: int,
    global_size: int,
    sequence_length: int,
    data_rank: int = 0,
    data_size: int = 1,
    start_step: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """`batch_at` for start_step, start_step + 1, and so on without end."""
    step = start_step
    while True:
        yield batch_at(
            stream,
            step=step,
            seed=seed,
            global_size=global_size,
            sequence_length=sequence_length,
            data_rank=data_rank,
            data_size=data_size,
            device=device,
        )
        step += 1


def validation_batches(
    stream: TokenStream,
    *,
    num_batches: int,
    global_size: int,
    sequence_length: int,
    data_rank: int = 0,
    data_size: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """The same windows each time: the first num_batches*global_size of the stream; what it lacks counts nothing."""
    places = _slice(global_size, data_rank, data_size)
    count = num_windows(stream, sequence_length)
    for number in range(num_batches):
        numbers = [number * global_size + place for place in places]
        windows = [window if window < count else None for window in numbers]
        yield _batch(stream, windows, sequence_length, places[0], number, device)
