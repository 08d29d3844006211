"""Blocks of PTX that work on words of e4m3 and on numbers, run by numpy, against what they stand for."""

import numpy as np
import pytest
import torch

from ops.ptx_numpy import execute
from ops.sparse24_oracle import activation, gradient
from sidlm.ops.sparse24.packed import Packed, pack, unpack
from sidlm.ops.sparse24.quantize import FP8, power_of_two_scale
from sidlm.ops.sparse24.select import select_2to4

pytest.importorskip("triton")

import triton.language as tl

from sidlm.ops.sparse24 import triton_groups, triton_turn, triton_units

T, F = 64, 48
OCTETS, GROUPS = T // 8, F // 4


@pytest.fixture(params=[False, True], ids=["activation", "gradient"])
def matrix(request):
    """Packed e4m3 (T, F) of tokens of very different size, one of them zero, and whether it has signs."""
    make = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.randint(-9, 9, (T, 1), generator=make).float())
    y1 = torch.randn(T, F, generator=make) * size
    y1[5] = 0
    act, *_ = activation(y1, True)
    return (gradient(torch.randn(T, F, generator=make), act, True) if request.param else act), request.param


def unsigned(x: torch.Tensor) -> np.ndarray:
    x = x.contiguous()
    return (x.view(torch.int32) if x.dtype == torch.float32 else x).numpy().astype(np.int64).astype(np.uint32).ravel()


def halves(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16).float().view(-1, 2)


def test_features(matrix):
    p, signed = matrix
    values = p.values.view(torch.uint8).view(torch.int32).flatten()
    table = triton_units.selectors(torch.device("cpu"))[p.metadata.flatten().long()].numpy().view(np.uint64)
    exponents = (p.scale.view(torch.int32) >> 23) - 7
    first = exponents >> 1
    one, other = ((x + 127) * 0x00800080 for x in (first, exponents - first))
    factors = [unsigned(x.repeat_interleave(F // 8)) for x in (one, other)]
    none = [np.zeros(len(values), np.uint32)] * (4 if signed else 8)
    code = triton_units.features_ptx(not signed)
    found = execute(code, 4 if signed else 8, [unsigned(values), table, *factors, *none])
    x = unpack(p).view(-1, 2, 4)
    for place in range(4):
        assert torch.equal(halves(found[place]), x[:, :, place].abs())
        assert signed or torch.equal(halves(found[4 + place]), (x[:, :, place] > 0).float())


def octets(p: Packed, wanted: torch.Tensor) -> list[np.ndarray]:
    """The operands that both forms of `octet_ptx` have, for every octet of tokens and group of features."""

    def everywhere(x: torch.Tensor) -> np.ndarray:
        return unsigned(x.expand(OCTETS, GROUPS))

    codes = unpack(Packed(p.values.view(torch.uint8).int(), p.metadata)).to(torch.uint8)
    words = codes.view(OCTETS, 8, GROUPS, 4).permute(1, 0, 2, 3).contiguous().view(torch.int32)
    exponents = ((p.scale.view(torch.int32) >> 23) - 127).view(OCTETS, 8)
    top = exponents.amax(1, keepdim=True).clamp_min(-126)
    factors = (exponents - top + 247).clamp_min(1) * 0x00800080
    inverse = (1 / power_of_two_scale(unpack(p).abs().amax(0))).view(GROUPS, 4)
    pairs = [wanted[:, i] * 0x3F80 | wanted[:, i + 2] * 0x3F800000 for i in range(2)]
    return [
        *(unsigned(x) for x in words),
        *(everywhere(factors[:, i : i + 1]) for i in range(8)),
        everywhere((top + 127 << 23).view(torch.float32)),
        *(everywhere(inverse[:, i]) for i in range(4)),
        *(everywhere(x) for x in pairs),
        *[np.zeros(OCTETS * GROUPS, np.uint32)] * 2,
    ]


def test_two_of_four_tokens(matrix):
    p, signed = matrix
    wanted = torch.ones(GROUPS, 4, dtype=torch.int32)
    wanted[2, 1], wanted[3] = 0, 0
    columns = unpack(p).T.contiguous()
    scale = power_of_two_scale(columns.abs().amax(1))[:, None]
    mask, counted = select_2to4(columns, by="magnitude" if signed else "value"), wanted.flatten() > 0
    packed = pack(columns, mask)
    before, after = (x[counted].count_nonzero() for x in (columns, columns.where(mask, 0)))

    *words, metadata, found, left = execute(triton_turn.octet_ptx(signed, False), 7, octets(p, wanted))
    values = (packed.values / scale).to(FP8).view(torch.uint8).view(GROUPS, 4, OCTETS, 4)
    for feature, word in enumerate(words):
        assert np.array_equal(word.view(np.uint8).reshape(OCTETS, GROUPS, 4), values[:, feature].permute(1, 0, 2))
    metadata = metadata.view(np.uint8).reshape(OCTETS, GROUPS, 4)
    assert np.array_equal(metadata, packed.metadata.view(GROUPS, 4, OCTETS).permute(2, 0, 1))
    assert (halves(found).sum(), halves(left).sum()) == (before, after)

    every = [(1 - wanted[:, i]) * 0xFFFF | (wanted[:, i + 2] - 1) << 16 for i in range(2)]
    given = octets(p, wanted) + [unsigned(x.expand(OCTETS, GROUPS)) for x in every]
    *words, found, left = execute(triton_turn.octet_ptx(signed, True), 10, given)
    values = (columns.where(mask | ~counted[:, None], 0) / scale).to(FP8).view(GROUPS, 4, OCTETS, 2, 4)
    for i, word in enumerate(words):
        mine = torch.from_numpy(word.view(np.uint8).reshape(OCTETS, GROUPS, 4).copy()).view(FP8).float()
        assert torch.equal(mine + 0.0, values[:, i // 2, :, i % 2].permute(1, 0, 2).float() + 0.0)
    assert (halves(found).sum(), halves(left).sum()) == (before, after)


def test_words_of_packed_values(matrix):
    p, _ = matrix
    values = unsigned(p.values.view(torch.uint8).view(torch.int32))
    select = triton_turn.word_selectors(torch.device("cpu"))[p.metadata.flatten().long()]
    both = [execute(triton_turn._prmt(), 1, [values, unsigned(select >> 16 * i)])[0] for i in range(2)]
    codes = unpack(Packed(p.values.view(torch.uint8).int(), p.metadata)).to(torch.uint8)
    assert np.array_equal(np.stack(both, -1).view(np.uint8).ravel(), codes.flatten())


@pytest.mark.parametrize("small", [False, True])
def test_roots_are_the_nearest_of_all_numbers_of_few_bits(small):
    """Eight bits and an even or odd exponent, or those of e4m3, times two or not."""
    if small:
        x = torch.arange(127, dtype=torch.uint8).view(FP8).float()
        x = torch.cat((x, 2 * x))
    else:
        x = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16).float()
        x = x[(x == 0) | (x > 2.0**-100)]
    code = triton_groups._small_root_ptx() if small else triton_groups._root_ptx()
    (found,) = execute(code, 1, [unsigned(x)])
    expected = x.double().sqrt().float()
    assert torch.equal(torch.from_numpy(found.view(np.float32)).nan_to_num(-1.0), expected.nan_to_num(-1.0))


@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_kept(by):
    inf, nan = float("inf"), float("nan")
    some = torch.tensor([-inf, -2.0, -0.0, 0.0, 1.0, 1.5, inf, nan])
    x = torch.cartesian_prod(*[some] * 4).bfloat16()
    given = [x[:, i].contiguous().view(torch.int16).numpy().view(np.uint32) for i in range(4)]
    found = execute(triton_groups._keep_ptx(tl.bfloat16, by == "magnitude"), 4, given)
    expected = x.where(select_2to4(x, by=by), 0)
    mine = torch.stack([torch.from_numpy(y.view(np.int16).copy()).view(torch.bfloat16) for y in found], -1)
    assert torch.equal(mine.nan_to_num(-3.0), expected.nan_to_num(-3.0))
