"""Randomness keyed by what, not where: the same numbers on any mesh.

Initial weights are a function of (seed, canonical name, global element), dropout of (seed, step, layer, global
position). Neither uses a generator whose state depends on what a rank did before.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import torch
from torch import Tensor

__all__ = ["bits_at", "derive_key", "fill_normal", "keep_mask", "kept", "mask_seeds", "random_bits", "threshold"]

TILE = 256
MASK = 0xFFFFFFFF
SIGN = -(2**31)
CACHED_ELEMENTS = 1 << 16


def derive_key(*what: object) -> int:
    """A 63-bit key from any sequence of numbers and names (BLAKE2b of their text)."""
    text = "\x1f".join(map(str, what)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser on int64 tensors in [0, 2^32), in place: multiply and shift, as in murmur3."""
    x = x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(MASK)
    x = x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16)


def keep_mask(rows: Tensor, num_columns: int, key: int, drop: float) -> Tensor:
    """Which elements dropout keeps, each with probability 1 - drop.

    rows: int64 of any shape, the global position of each row (below 2^62). Returns bool of shape
    (*rows.shape, num_columns). Element (row, column) depends on (key, row, column) alone, so any slice of the
    rows gives that slice of the mask.
    """
    seeds, columns = mask_seeds(rows, num_columns, key)
    keep = torch.empty(seeds.shape[0], num_columns, dtype=torch.bool, device=rows.device)
    step = max(1, CACHED_ELEMENTS // max(1, num_columns))  # runs of rows that stay in a CPU's cache
    for start in range(0, seeds.shape[0], max(1, step)):
        part = slice(start, start + step)
        keep[part] = kept(seeds[part], columns, threshold(drop))
    return keep.view(*rows.shape, num_columns)


def mask_seeds(rows: Tensor, num_columns: int, key: int) -> tuple[Tensor, Tensor]:
    """What `kept` takes for these rows and columns: int32 [number of rows, 1] and [num_columns]."""
    return _seeds(rows, key), _column_seeds(0, num_columns, rows.device)


def threshold(drop: float) -> int:
    """What `kept` takes for a probability. The numbers are unsigned: with the highest bit flipped a signed comparison
    orders them so.
    """
    return round(drop * 2**32) + SIGN


def kept(seeds: Tensor, columns: Tensor, least: int) -> Tensor:
    """The mask: elementwise, so that a compiler makes one kernel of it."""
    return _mix32(seeds + columns).bitwise_xor_(SIGN) >= least


def random_bits(rows: Tensor, columns: tuple[int, int], key: int) -> Tensor:
    """32 random bits for each element (row, column) of rows x [start, stop): int32 of shape (len(rows), stop - start).

    A function of (key, row, column) alone, as in `keep_mask`.
    """
    return _mix32(_seeds(rows, key) + _column_seeds(*columns, rows.device))


def bits_at(rows: Tensor, keys: Tensor, row_at: Tensor, columns: Tensor) -> Tensor:
    """`random_bits` of single elements: the row_at-th of the rows, whose keys are given (both int64 [R]), at a column.

    row_at, columns: int32 of any one shape, which the result has.
    """
    seeds = _seeds(rows, keys).view(-1).index_select(0, row_at)
    return _mix32(seeds.add_((columns.long() * 0x9E3779B9 & MASK).to(torch.int32)))


def _seeds(rows: Tensor, key: int | Tensor) -> Tensor:
    low, high = rows & MASK, (rows >> 32) & MASK
    return _mix((_mix(low ^ (key & MASK)) + high + (key >> 32)).bitwise_and_(MASK)).to(torch.int32).view(-1, 1)


def _column_seeds(start: int, stop: int, device: torch.device) -> Tensor:
    return (torch.arange(start, stop, device=device) * 0x9E3779B9 & MASK).to(torch.int32)


def _mix32(x: Tensor) -> Tensor:
    """`_mix` on the same 32 bits in int32, in place: half the memory. Products wrap; shifts must bring in zeros."""
    x = x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x = x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def fill_normal(
    out: Tensor, box: tuple[tuple[int, int], ...], global_shape: tuple[int, ...], key: int, mean: float, std: float
) -> None:
    """Fill `out` with this box of a global tensor of normal numbers that depend on (key, element) alone.

    The global tensor is cut into tiles of 256 along its first and last dims; each tile has a generator of its own and
    is drawn whole, in float32, so every rank that needs any of it draws the same bits (on CPUs of one vector width:
    torch's generator rounds otherwise where there is no AVX2). Peak memory: one tile.
    out: a tensor of the box's shape, any float dtype, any device. Tiles that miss the box are not drawn.
    """
    first = _tiles(global_shape[0], box[0])
    last = _tiles(global_shape[-1], box[-1]) if len(global_shape) > 1 else [(0, 1)]
    generator = torch.Generator(device="cpu")
    for (row, height), (column, width) in itertools.product(first, last):
        generator.manual_seed(derive_key(key, row, column))
        middle = math.prod(global_shape[1:-1])
        tile = torch.randn(height, middle, width, generator=generator, dtype=torch.float32)
        if len(global_shape) == 1:
            cut = _overlap(row, height, box[0])
            out[cut[0]] = (mean + std * tile[cut[1], 0, 0].double()).to(out)
            continue
        tile = tile.view(height, *global_shape[1:-1], width)
        rows, columns = _overlap(row, height, box[0]), _overlap(column, width, box[-1])
        inner = [slice(a, b) for a, b in box[1:-1]]
        drawn = tile[(rows[1], *inner, columns[1])].double()
        out[(rows[0], ..., columns[0])] = (mean + std * drawn).to(out)


def _tiles(size: int, wanted: tuple[int, int]) -> list[tuple[int, int]]:
    """(start, length) of each tile of `size` that meets the range."""
    first = wanted[0] // TILE * TILE
    return [(start, min(TILE, size - start)) for start in range(first, wanted[1], TILE)]


def _overlap(start: int, length: int, wanted: tuple[int, int]) -> tuple[slice, slice]:
    """Where a tile meets the wanted range: as a slice of the range, and as a slice of the tile."""
    begin, end = max(start, wanted[0]), min(start + length, wanted[1])
    return slice(begin - wanted[0], end - wanted[0]), slice(begin - start, end - start)
