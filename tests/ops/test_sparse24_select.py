"""Selection, packing, power-of-two scales and the conventions of the recipe, against loops over every case."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.ops import select_2to4
from sidlm.ops.sparse24.packed import pack, positions, unpack
from sidlm.ops.sparse24.quantize import FP8, LARGEST, power_of_two_scale, quantize_rows
from sidlm.ops.sparse24.recipe import dense_count, split, threshold, token_order

NAN, INF = math.nan, math.inf


def kept(group, by):
    """Positions of the two that stay, found by sorting Python's way."""

    def key(i):
        value = abs(group[i]) if by == "magnitude" else group[i]
        return (-INF if math.isnan(value) else -value, i)

    return set(sorted(range(4), key=key)[:2])


@pytest.mark.parametrize("by", ["value", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_pattern_of_four(dtype, by):
    """Ties, signed zeros, NaN and infinity included."""
    groups = list(itertools.product((-2.0, -1.0, -0.0, 0.0, 1.0, 2.0, NAN, INF, -INF), repeat=4))
    mask = select_2to4(torch.tensor(groups, dtype=dtype), by=by)
    expected = torch.tensor([[i in kept(group, by) for i in range(4)] for group in groups])
    assert torch.equal(mask, expected)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(width=32)] * 4), min_size=1, max_size=8), st.booleans())
def test_every_group_keeps_its_own(groups, magnitude):
    by = "magnitude" if magnitude else "value"
    mask = select_2to4(torch.tensor(groups).flatten(), by=by).unflatten(0, (-1, 4))
    for group, stays in zip(groups, mask, strict=True):
        assert set(stays.nonzero().flatten().tolist()) == kept(group, by)


def test_leading_axes():
    x = torch.randn(2, 3, 8)
    assert torch.equal(select_2to4(x)[1, 2], select_2to4(x[1, 2]))
    assert select_2to4(x[:0]).shape == (0, 3, 8)


def test_selection_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="takes groups of 4, but the last axis of x has 6 elements"):
        select_2to4(torch.zeros(3, 6))
    with pytest.raises(ValueError, match="by must be 'value' or 'magnitude', got 'size'"):
        select_2to4(torch.zeros(3, 8), by="size")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (5, 24), (64, 200)])
def test_packing_and_back(shape, dtype):
    x = torch.randn(shape).to(dtype)
    if len(x) > 1:
        x[1, 3:6] = NAN
    mask = select_2to4(x)
    packed = pack(x, mask)
    assert packed.values.shape == (shape[0], shape[1] // 2) and packed.values.dtype == dtype
    assert packed.metadata.shape == (shape[0], shape[1] // 8) and packed.metadata.dtype == torch.uint8
    torch.testing.assert_close(unpack(packed), x.masked_fill(~mask, 0), rtol=0, atol=0, equal_nan=True)
    scale = torch.rand(shape[0])
    scaled = unpack(packed._replace(scale=scale))
    expected = x.float().masked_fill(~mask, 0) * scale[:, None]
    torch.testing.assert_close(scaled, expected, rtol=0, atol=0, equal_nan=True)


def test_every_pattern_of_metadata():
    """A nibble is first | second << 2; the earlier group of a byte is in its low nibble."""
    pairs = list(itertools.combinations(range(4), 2))
    for low, high in itertools.product(pairs, repeat=2):
        x = torch.tensor([[float(i in low) for i in range(4)] + [2.0 * (i in high) for i in range(4)]])
        packed = pack(x, x > 0)
        assert packed.metadata.item() == low[0] | low[1] << 2 | high[0] << 4 | high[1] << 6
        assert packed.values.tolist() == [[1.0, 1.0, 2.0, 2.0]]
        assert positions(packed.metadata).tolist() == [[list(low), list(high)]]
        assert torch.equal(unpack(packed), x)


def test_values_keep_the_order_of_columns():
    x = torch.tensor([[5.0, 9.0, 7.0, 1.0, 0.0, 2.0, 1.0, 3.0]])
    assert pack(x, select_2to4(x)).values.tolist() == [[9.0, 7.0, 2.0, 3.0]]


def test_packing_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="packing takes a multiple of 8 columns, got 12"):
        pack(torch.zeros(2, 12), torch.zeros(2, 12, dtype=torch.bool))


def test_scale_is_the_smallest_power_of_two_that_fits():
    amax = [2.0**e * m for e in range(-126, 128) for m in (1.0, 1.5, 1.75, 1.7500001, 1.9999999)]
    for value, scale in zip(amax, power_of_two_scale(torch.tensor(amax)).tolist(), strict=True):
        value = torch.tensor(value).item()  # as float32 has it
        assert math.frexp(scale)[0] == 0.5
        assert value / scale <= LARGEST
        assert value / (scale / 2) > LARGEST or scale == 2.0**-126


def test_scale_of_zero_and_of_nothing_finite():
    scale = power_of_two_scale(torch.tensor([0.0, NAN, INF, 1e-44, 3e38]))
    assert scale[0] == 1 and scale[1:3].isnan().all() and scale[3] == 2.0**-126 and scale[4] == 2.0**120


def test_rows_are_rounded_to_e4m3():
    x = torch.randn(7, 64) * torch.logspace(-6, 6, 7)[:, None]
    values, scale = quantize_rows(x)
    assert values.dtype == FP8 and scale.shape == (7,)
    error = (values.float() * scale[:, None] - x).abs()
    # half a unit in the last of 3 bits; below the smallest normal number, 2^-6, half of 2^-9
    assert (error <= (x.abs() * 2.0**-4).clamp_min(scale[:, None] * 2.0**-10)).all()
    for power in (-40, 3):
        again, moved = quantize_rows(x * 2.0**power)
        assert torch.equal(again.float(), values.float()) and torch.equal(moved, scale * 2.0**power)


def test_rounding_again_changes_nothing():
    values, scale = quantize_rows(torch.randn(200, 64) * torch.logspace(-3, 3, 64))
    x = values.float() * scale[:, None]
    values, scale = quantize_rows(x)
    assert torch.equal(values.float() * scale[:, None], x)


def test_a_row_of_nan_stays_a_row():
    x = torch.randn(3, 8)
    x[1, 2], x[2, 1] = NAN, -INF
    values, scale = quantize_rows(x)
    assert (values[1:].float() * scale[1:, None]).isnan().all() and values[0].float().isfinite().all()


@pytest.mark.parametrize(
    ("features", "share", "expected"),
    [
        (14336, 0.05, 768),  # 717
        (1280, 0.05, 64),
        (1281, 0.05, 64),
        (1310, 0.05, 128),  # 65.5, to the even one, up
        (200, 0.05, 64),
        (200, 0.9, 192),
        (200, 0.97, 200),
        (24, 0.05, 24),
        (8, 0.05, 0),
        (8, 1.0, 8),
        (4096, 0.0, 0),
    ],
)
def test_number_of_dense_features(features, share, expected):
    assert dense_count(features, share) == expected


def test_split_of_the_features():
    counts = torch.randint(0, 9, (200,), generator=torch.Generator().manual_seed(0))
    by_hand = sorted(range(200), key=lambda f: (counts[f].item(), f))
    sparse, dense, _ = split(counts, 0.3)  # 60, up to 64
    assert sparse.tolist() == sorted(by_hand[:136]) and dense.tolist() == sorted(by_hand[136:])
    assert threshold(counts, 0.3) == counts[by_hand[136]]
    for share, lengths in ((0.0, (200, 0)), (1.0, (0, 200))):
        assert tuple(len(x) for x in split(counts, share)[:2]) == lengths
    assert threshold(counts, 0.0) is None and threshold(counts, 1.0) == counts.min()


def test_order_of_tokens():
    cpu = torch.device("cpu")
    order = token_order(1000, cpu, True)
    assert sorted(order.tolist()) == list(range(1000)) and token_order(1000, cpu, True) is order
    assert torch.equal(order, torch.randperm(1000, generator=torch.Generator().manual_seed(0)))
    assert token_order(7, cpu, False).tolist() == list(range(7))
    assert token_order(0, cpu, True).tolist() == []
