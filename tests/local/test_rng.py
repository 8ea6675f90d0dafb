"""Random numbers keyed by what, not where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.rng import _mix, _mix32, derive_key, fill_normal, keep_mask

SHAPES = st.one_of(
    st.tuples(st.integers(1, 600)),
    st.tuples(st.integers(1, 520), st.sampled_from([1, 3, 255, 256, 257, 300])),
    st.tuples(st.integers(1, 300), st.integers(1, 3), st.integers(1, 270)),
    st.tuples(st.integers(1, 40), st.integers(1, 3), st.integers(1, 3), st.integers(1, 270)),
)


def drawn(shape: tuple[int, ...], key: int = 7, mean: float = 0.0, std: float = 1.0) -> torch.Tensor:
    out = torch.empty(shape)
    fill_normal(out, tuple((0, n) for n in shape), shape, key, mean, std)
    return out


@given(SHAPES, st.data())
@settings(max_examples=60, deadline=None)
def test_any_box_is_that_box_of_the_whole(shape: tuple[int, ...], data: st.DataObject):
    whole = drawn(shape)
    box = []
    for size in shape:
        start = data.draw(st.integers(0, size - 1))
        box.append((start, data.draw(st.integers(start + 1, size))))
    part = torch.empty([b - a for a, b in box])
    fill_normal(part, tuple(box), shape, 7, 0.0, 1.0)
    assert torch.equal(part, whole[tuple(slice(a, b) for a, b in box)])


@pytest.mark.parametrize("rows", [(0, 520), (3, 260), (255, 257), (256, 512), (511, 520)])
@pytest.mark.parametrize("columns", [(0, 300), (1, 299), (255, 257), (256, 300), (299, 300)])
def test_boxes_across_the_borders_of_tiles(rows: tuple[int, int], columns: tuple[int, int]):
    part = torch.empty(rows[1] - rows[0], columns[1] - columns[0])
    fill_normal(part, (rows, columns), (520, 300), 7, 0.0, 1.0)
    assert torch.equal(part, drawn((520, 300))[slice(*rows), slice(*columns)])


def test_it_is_normal():
    x = drawn((700, 600), mean=3.0, std=0.5).double()
    n = x.numel()
    assert abs(x.mean() - 3) < 4 * 0.5 / n**0.5
    z = (x - 3) / 0.5
    assert abs(z.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    # No tile repeats another, nor do rows correlate across the border of two tiles.
    assert not torch.equal(x[:256, :256], x[256:512, :256]) and not torch.equal(x[:256, :256], x[:256, 256:512])
    assert abs((z[255] * z[256]).mean()) < 0.2 and abs((z[:, 255] * z[:, 256]).mean()) < 0.2


def test_keys_differ_and_stay():
    assert not torch.equal(drawn((30, 30), derive_key(0, "a")), drawn((30, 30), derive_key(0, "b")))
    assert derive_key(0, "a") != derive_key(1, "a") != derive_key("0a")
    # A change of the scheme would change every run: it must be noticed.
    assert derive_key(1234, "layers.0.attention.q.weight") == 4291044807831645168


def test_lower_dtypes_round_the_same_numbers():
    out = torch.empty(10, 10, dtype=torch.bfloat16)
    fill_normal(out, ((0, 10), (0, 10)), (10, 10), 7, 0.0, 1.0)
    assert torch.equal(out, drawn((10, 10)).bfloat16())


@given(st.integers(0, 2**62), st.integers(1, 50), st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_a_slice_of_the_rows_is_that_slice_of_the_mask(first: int, count: int, key: int):
    rows = torch.arange(first, first + count) if first + count < 2**62 else torch.arange(count)
    mask = keep_mask(rows, 33, key, 0.3)
    cut = count // 2
    assert torch.equal(mask[cut:], keep_mask(rows[cut:], 33, key, 0.3))
    assert torch.equal(mask.view(count, 1, 33)[:, 0], keep_mask(rows.view(count, 1), 33, key, 0.3)[:, 0])


def test_elements_are_dropped_at_the_rate_and_independently():
    rows, columns, drop = 1000, 400, 0.3
    x = keep_mask(torch.arange(rows), columns, derive_key("k"), drop).double()
    sigma = (drop * (1 - drop) / x.numel()) ** 0.5
    assert abs(x.mean() - (1 - drop)) < 4 * sigma
    z = (x - (1 - drop)) / (drop * (1 - drop)) ** 0.5
    other = keep_mask(torch.arange(rows), columns, derive_key("k2"), drop).double()
    far = keep_mask(torch.arange(rows) + 2**40, columns, derive_key("k"), drop).double()
    bound = 4.5 / x.numel() ** 0.5
    for pair in (z[1:] * z[:-1], z[:, 1:] * z[:, :-1], z * (other - 0.7) / 0.21**0.5, z * (far - 0.7) / 0.21**0.5):
        assert abs(pair.mean()) < bound
    assert x.mean(1).std() < 3 * (0.21 / columns) ** 0.5, "no row is dropped whole"


def test_nothing_is_dropped_at_rate_zero():
    assert keep_mask(torch.arange(10), 10, 3, 0.0).all()


def test_a_vector_has_its_mean_and_deviation():
    x = drawn((100_000,), mean=-2.0, std=0.1).double()
    n = x.numel()
    assert abs(x.mean() + 2) < 4 * 0.1 / n**0.5
    assert abs(((x + 2) / 0.1).square().mean() - 1) < 4 * (2 / n) ** 0.5


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 33, 62])
def test_every_bit_of_the_key_changes_the_mask(bit: int):
    rows, key = torch.arange(500), derive_key("k")
    one, other = (keep_mask(rows, 400, k, 0.5).double() - 0.5 for k in (key, key ^ (1 << bit)))
    assert abs((4 * one * other).mean()) < 4.5 / one.numel() ** 0.5


def test_the_mask_stays_the_one_it_was():
    """A change of the scheme would change every run with dropout: it must be noticed."""
    mask = keep_mask(torch.arange(100) + 2**33, 64, derive_key("pin"), 0.25)
    assert int(mask.sum()) == 4803
    assert int((mask.long() * torch.arange(6400).view(100, 64)).sum() % 1000003) == 418725


def test_both_widths_of_the_mixer_are_the_same_numbers():
    x = torch.cat([torch.randint(0, 2**32, (5000,)), torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 1])])
    assert torch.equal(_mix32(x.to(torch.int32)).long() & 0xFFFFFFFF, _mix(x.clone()))
