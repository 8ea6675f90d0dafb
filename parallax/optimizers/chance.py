"""The random bits by which a chunk of state is rounded: of each element a function of its parameter's key and of its
place in the whole parameter, so that neither mesh nor chunks show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from parallax.data.layout import Box, Piece
from parallax.rng import bits_at, random_bits
from parallax.transfer import to_device

__all__ = ["Place", "Rows", "bits_by_box", "places_of"]


class Place(NamedTuple):
    """Elements [start, stop) of a chunk are this box of the global tensor of that piece."""

    piece: int
    box: Box
    shape: tuple[int, ...]
    start: int
    stop: int

    def rows(self) -> Tensor:
        """The global numbers of the box's rows: int64."""
        rows = torch.zeros(1, dtype=torch.int64)
        for (start, stop), size in zip(self.box[:-1], self.shape[:-1], strict=True):
            rows = (rows[:, None] * size + torch.arange(start, stop)).view(-1)
        return rows

    @property
    def columns(self) -> tuple[int, int]:
        return self.box[-1] if self.box else (0, 1)


def places_of(pieces: Sequence[Piece], chunk: slice) -> list[Place]:
    """What elements [chunk.start, chunk.stop) of a segment with these pieces are, in order; padding is left out."""
    places = [
        Place(index, box, piece.spec.global_shape, start - chunk.start, stop - chunk.start)
        for index, piece in enumerate(pieces)
        for box, start, stop in piece.boxes(chunk.start, chunk.stop)
    ]
    return sorted(places, key=lambda place: place.start)


def bits_by_box(places: Sequence[Place], keys: Sequence[int], size: int) -> Tensor:
    """int32 [size], 0 in padding. A box after the other, each of which a cache may hold: a CPU's way."""
    bits = torch.zeros(size, dtype=torch.int32)
    for place in places:
        bits[place.start : place.stop] = random_bits(place.rows(), place.columns, keys[place.piece]).view(-1)
    return bits


def _without_gaps(places: Sequence[Place], size: int) -> Iterator[Place]:
    """The places, and rows of padding between them."""
    at = 0
    for place in [*places, Place(0, (), (), size, size)]:
        if gap := place.start - at:
            yield Place(0, ((0, gap),), (gap,), at, place.start)
        if place.start < size:
            yield place
        at = place.stop


class Rows:
    """The rows of all boxes of a chunk, for a GPU: some forty kernels draw the bits of the chunk, where by box it would
    be as many for each. Keeps 20 bytes a row.
    """

    def __init__(self, places: Sequence[Place], size: int, device: torch.device) -> None:
        numbers, lengths, shifts, owners = [], [], [], []
        for place in _without_gaps(places, size):
            rows, (first, last) = place.rows(), place.columns
            starts = place.start + (last - first) * torch.arange(len(rows), dtype=torch.int32)
            numbers.append(rows)
            lengths.append(torch.full((len(rows),), last - first, dtype=torch.int32))
            shifts.append(first - starts)
            owners.append(torch.full((len(rows),), place.piece, dtype=torch.int32))
        self.size, self.device = size, device
        self.numbers, self.lengths, self.shifts, self.owners = (
            to_device(torch.cat(parts), device) for parts in (numbers, lengths, shifts, owners)
        )

    def bits(self, keys: Sequence[int]) -> Tensor:
        """int32 [size], anything in padding: what `bits_by_box` gives for these keys."""
        own = to_device(torch.tensor(keys, dtype=torch.int64), self.device).index_select(0, self.owners)
        row_at = torch.repeat_interleave(self.lengths, output_size=self.size)
        columns = torch.arange(self.size, dtype=torch.int32, device=self.device) + self.shifts.index_select(0, row_at)
        return bits_at(self.numbers, own, row_at, columns)
