"""The batch: what is left out of global_size = data x microbatch_size x num_microbatches. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from parallax.config_fields import DEFAULT_GLOBAL_SIZE, Config
from parallax.errors import ConfigError

__all__ = ["ResolvedBatch", "divisors", "listed", "resolve_batch"]


@dataclass(frozen=True, slots=True)
class ResolvedBatch:
    """The three sizes of a global batch, and the data size that ties them."""

    data: int
    global_size: int
    microbatch_size: int
    num_microbatches: int

    @property
    def equation(self) -> str:
        return (
            f"global_size {self.global_size} = data {self.data} x microbatch_size {self.microbatch_size} "
            f"x num_microbatches {self.num_microbatches}"
        )


def resolve_batch(config: Config) -> ResolvedBatch:
    """Derive what the user left out of global_size = data x microbatch_size x num_microbatches.

    Of two given, the third. global_size is 24 unless it is given or follows from the other two. Of global_size alone:
    num_microbatches is the smallest divisor of global_size/data that is at least 2*pipeline (1F1B then idles for less
    than a third of the time), or all of global_size/data, in microbatches of one sample, if there is none.
    Raises ConfigError if the sizes contradict each other or do not divide, MeshError if the mesh does not parse.
    """
    batch, shape = config.batch, config.mesh_shape
    micro, num, data = batch.microbatch_size, batch.num_microbatches, shape.data
    for name in ("global_size", "microbatch_size", "num_microbatches"):
        if (given := getattr(batch, name)) is not None and given < 1:
            raise ConfigError(f"batch.{name}={given} is too small; choose at least 1")
    if micro is not None and num is not None:
        product = data * micro * num
        if batch.global_size not in (None, product):
            raise ConfigError(
                f"batch.global_size={batch.global_size}, but data {data} x batch.microbatch_size {micro} x "
                f"batch.num_microbatches {num} = {product}; set batch.global_size={product}, or leave one of the three "
                "out (=none)"
            )
        return ResolvedBatch(data, product, micro, num)
    size = DEFAULT_GLOBAL_SIZE if batch.global_size is None else batch.global_size
    known = f"batch.global_size={size}" + (" (the default)" if batch.global_size is None else "")
    if size % data:
        raise ConfigError(f"{known} does not divide by data={data} (mesh={config.mesh}); {_multiples(data)}")
    per_rank = size // data
    name, value = ("microbatch_size", micro) if micro is not None else ("num_microbatches", num)
    if value is None:
        chosen = next((d for d in divisors(per_rank) if d >= 2 * shape.pipeline), per_rank)
        return ResolvedBatch(data, size, per_rank // chosen, chosen)
    if per_rank % value:
        raise ConfigError(
            f"{known} does not divide by data {data} x batch.{name} {value} = {data * value}; set batch.global_size to "
            f"a multiple of {data * value}, or batch.{name} to one of {listed(divisors(per_rank))}"
        )
    other = per_rank // value
    return ResolvedBatch(data, size, *((value, other) if micro is not None else (other, value)))


def divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return low + [number // d for d in reversed(low) if d * d != number]


def listed(numbers: Collection[int]) -> str:
    shown = ", ".join(map(str, list(numbers)[:12]))
    return shown + (", ..." if len(numbers) > 12 else "")


def _multiples(of: int) -> str:
    return f"choose a multiple of {of}, such as {of}, {2 * of} or {3 * of}"
