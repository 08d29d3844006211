"""Orders of 2:4 metadata: round trips, that nothing overlaps, and each order by its description."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.ops.sparse24.layouts import LAYOUTS, from_layout, layout_for, to_layout


def random_metadata(M: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (M, K // 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_round_trip(name, tall, wide, seed):
    M, K = tall * LAYOUTS[name].rows, wide * LAYOUTS[name].columns
    plain = random_metadata(M, K, seed)
    other = to_layout(plain, name)
    assert other.shape == plain.shape and torch.equal(from_layout(other, name, M, K), plain)
    assert torch.equal(from_layout(other.flatten(), name, M, K), plain)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_nibble_has_a_place_of_its_own(name):
    M, K = 3 * LAYOUTS[name].rows, 5 * LAYOUTS[name].columns
    places = LAYOUTS[name].offset(torch.arange(M)[:, None], torch.arange(K // 4), M, K)
    assert torch.equal(places.flatten().sort().values, torch.arange(M * K // 4))


def nibble(metadata: torch.Tensor, row: int, group: int) -> int:
    return int(metadata[row, group // 2]) >> group % 2 * 4 & 15


def test_plain_is_plain():
    plain = random_metadata(3, 40)
    assert torch.equal(to_layout(plain, "plain"), plain)


def test_cutlass_8bit():
    M, K = 128, 384
    plain = random_metadata(M, K)
    other = to_layout(plain, "cutlass_8bit").flatten()
    for row, c in ((0, 0), (5, 3), (127, 16), (64, 33), (77, 47)):
        column = 8 * c
        assert other[row * 16 + column // 128 * M * 16 + column % 128 // 8] == plain[row, c]


def test_cusparselt_8bit():
    """Of every 64 rows by 64 columns, bytes 0 .. 7 of rows r and r + 8: 0 of r, 0 of r + 8, 4 of r, 4 of r + 8, 1 .."""
    M, K = 128, 192
    plain = random_metadata(M, K)
    other = to_layout(plain, "cusparselt_8bit").view(2, 3, 4, 8, 16)  # 64 rows, 64 columns, 16 rows, 8 pairs of rows
    for block, tile, band, r in ((0, 0, 0, 0), (1, 2, 3, 5)):
        row = block * 64 + band * 16 + r
        one, two = plain[row, 8 * tile : 8 * tile + 8], plain[row + 8, 8 * tile : 8 * tile + 8]
        expected = [x[i + half] for i in range(4) for half in (0, 4) for x in (one, two)]
        assert other[block, tile, band, r].tolist() == [int(x) for x in expected]


def test_cusparselt_16bit():
    """Of every 64 rows by 32 columns, groups 0 4 1 5 2 6 3 7 of rows r (low nibbles) and r + 8 (high nibbles)."""
    M, K = 128, 96
    plain = random_metadata(M, K)
    other = to_layout(plain, "cusparselt_16bit").view(2, 3, 4, 8, 8)  # 64 rows, 32 columns, 16 rows, 8 pairs of rows
    for block, tile, band, r in ((0, 0, 0, 0), (1, 2, 3, 5)):
        row = block * 64 + band * 16 + r
        groups = [8 * tile + g for g in (0, 4, 1, 5, 2, 6, 3, 7)]
        expected = [nibble(plain, row, g) | nibble(plain, row + 8, g) << 4 for g in groups]
        assert other[block, tile, band, r].tolist() == expected


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@pytest.mark.parametrize("name", ["cutlass_8bit", "cusparselt_8bit", "cusparselt_16bit"])
def test_the_kernels_that_convert_agree(name):
    pytest.importorskip("triton")
    from sidlm.ops.sparse24.triton_relayout import relayout

    plain = random_metadata(128, 384)
    other = torch.empty_like(plain)
    relayout(plain, other, name)
    assert torch.equal(other, to_layout(plain, name))


@pytest.mark.parametrize(
    ("name", "M", "K", "words"),
    [
        ("plain", 3, 12, "columns in multiples of 8, got a matrix (3, 12)"),
        ("cutlass_8bit", 65, 128, "rows in multiples of 64"),
        ("cutlass_8bit", 64, 64, "columns in multiples of 128"),
        ("mine", 64, 64, "no metadata layout 'mine'; there are plain, cutlass_8bit"),
    ],
)
def test_sizes_that_a_layout_does_not_take(name, M, K, words):
    with pytest.raises(ValueError) as error:
        layout_for(name, M, K)
    assert words in str(error.value)
