"""The kernels that pack for 2:4 products in Triton's interpreter, bit for bit against packed.py and its neighbours.

bfloat16 is left out, the interpreter gets it wrong without a word; inline PTX it cannot run at all. The GPU tests
(test_sparse24_cuda.py) cover both.
"""

import os
from itertools import product

import pytest
import torch

from ops.sparse24_interpreter import poison_memory, use_casts_of_torch
from ops.sparse24_oracle import INF, NAN, activation, columns, gradient, rounded, same, special, tensors, transposed
from sidlm.ops.sparse24.layouts import LAYOUTS, from_layout, to_layout
from sidlm.ops.sparse24.packed import unpack

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.runtime import interpreter

from sidlm.ops.sparse24 import triton_features, triton_gradient, triton_groups, triton_pack, triton_transpose

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on the way to a masked value


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    use_casts_of_torch(monkeypatch, interpreter)
    poison_memory(monkeypatch)


MODES = list(product([torch.float32, torch.float16], [False, True]))


def check(y1, dy2, fp8, *, perm=None, features=None, length=None, layout="plain"):
    """Everything from one y1 and dy2, each kernel on the inputs that the oracle gives it."""
    T, F = y1.shape
    act, counts, totals = activation(y1, fp8)

    def laid(p):
        return p._replace(metadata=to_layout(p.metadata, layout))

    def plain(p):
        return p._replace(metadata=from_layout(p.metadata, layout, len(p.values), 2 * p.values.shape[1]))

    mine, *rest = triton_pack.pack_activation(y1, fp8, layout)
    same((plain(mine), *rest), (act, counts, totals), "pack")
    dact = gradient(dy2, act, fp8)
    mine = triton_gradient.pack_gradient(dy2, laid(act), fp8, layout)
    same(plain(mine), dact, "gradient")
    make = torch.Generator().manual_seed(1)
    perm = torch.randperm(T, generator=make) if perm is None else perm
    order = torch.randperm(F, generator=make)
    features = order[: F - F // 4].sort().values if features is None else features
    length = -(-T // 8) * 8 if length is None else length
    for p, by in ((act, "value"), (dact, "magnitude")):
        mine, totals = triton_transpose.transpose_pack(laid(p), features, perm, length, by, fp8, layout)
        same((plain(mine), totals), transposed(p, features, perm, length, by, fp8), by)
        dense = order[F - F // 4 :]
        mine = triton_transpose.transpose_dense(laid(p), dense, perm, length, fp8, layout)
        x = columns(unpack(p), dense, perm, length)
        same(mine, rounded(x, x.dtype, fp8), "dense")
    x = columns(dy2, torch.arange(F), perm, length)
    same(triton_transpose.transpose_rows(dy2, perm, length, fp8), rounded(x, x.dtype, fp8), "rows")


SIZES = [(T, F, *mode) for (T, F), mode in product([(1, 8), (3, 200), (17, 24)], MODES)]
SIZES += [(63, 24, torch.float16, False), (65, 8, torch.float32, True)]


@pytest.mark.parametrize(("T", "F", "dtype", "fp8"), SIZES)
def test_equals_the_oracle(T, F, dtype, fp8):
    check(*tensors(T, F, dtype), fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_lengths_and_identity(fp8):
    """Padding of more than eight tokens, all features packed, tokens in their own order."""
    y1, dy2 = tensors(12, 16, torch.float32, seed=3, zeros=0.9)
    check(y1, dy2, fp8, perm=torch.arange(12), features=torch.arange(16), length=32)


def test_no_feature_and_features_in_any_order():
    y1, dy2 = tensors(9, 16, torch.float32, seed=4)
    check(y1, dy2, True, features=torch.tensor([11, 3, 4]))
    act, *_ = activation(y1, True)
    packed, totals = triton_transpose.transpose_pack(act, torch.arange(0), torch.arange(9), 16, "value", True)
    assert packed.values.shape == (0, 8) and packed.metadata.shape == (0, 2) and totals.tolist() == [0, 0]
    assert triton_transpose.transpose_dense(act, torch.arange(0), torch.arange(9), 16, True)[0].shape == (0, 16)


def test_no_tokens():
    for fp8 in (False, True):
        act, counts, totals = triton_pack.pack_activation(torch.zeros(0, 16), fp8)
        assert act.values.shape == (0, 8) and not counts.any() and not totals.any()
        assert triton_gradient.pack_gradient(torch.zeros(0, 16), act, fp8).values.shape == (0, 8)
        none = torch.arange(0)
        assert triton_transpose.transpose_pack(act, torch.arange(16), none, 0, "value", fp8)[0].values.shape == (16, 0)
        assert triton_transpose.transpose_rows(torch.zeros(0, 16), none, 0, fp8)[0].shape == (16, 0)
        for padded, _ in (
            triton_transpose.transpose_dense(act, torch.arange(4), none, 8, fp8),
            triton_transpose.transpose_rows(torch.zeros(0, 4), none, 8, fp8),
        ):
            assert padded.shape == (4, 8) and not padded.float().any()


@pytest.mark.parametrize("fp8", [False, True])
def test_many_chunks_strips_and_steps(monkeypatch, fp8):
    """Loads run ahead of what is written; several programs add to one count."""
    monkeypatch.setattr(triton_pack, "TILE", 32)
    for module in (triton_pack, triton_gradient):
        monkeypatch.setattr(module, "row_shape", lambda F: (32, 1))
    monkeypatch.setattr(triton_pack, "PROGRAMS", 12)
    monkeypatch.setattr(triton_features, "PROGRAMS", 1)
    check(*tensors(20, 136, torch.float32, seed=5, zeros=0.3), fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_offsets_of_64_bits(monkeypatch, fp8):
    monkeypatch.setattr(triton_groups, "WIDE", 1)
    check(*tensors(9, 24, torch.float32, seed=6), fp8)


@pytest.mark.parametrize("layout", ["cutlass_8bit", "cusparselt_8bit"])
def test_layouts(layout):
    assert LAYOUTS[layout].byte is not None
    y1, dy2 = tensors(64, 128, torch.float32, seed=7)
    check(y1, dy2, True, features=torch.arange(64), length=128, layout=layout)


def test_layouts_of_nibbles_are_not_for_kernels():
    with pytest.raises(ValueError, match="plain, cutlass_8bit, cusparselt_8bit, not in 'cusparselt_16bit'"):
        triton_pack.pack_activation(torch.zeros(64, 64), False, "cusparselt_16bit")


@pytest.mark.parametrize(("dtype", "fp8"), MODES)
def test_special_values(dtype, fp8):
    """NaN, infinities, ties, zeros of both signs, what rounds to zero and what is too large for the dtype."""
    y1, dy2 = special(dtype)
    check(y1, dy2, fp8)
    check(y1[:, :8], dy2[:, :8], fp8, perm=torch.arange(len(y1)))


@pytest.mark.parametrize("fp8", [False, True])
def test_bad_tokens_stay_among_themselves(fp8):
    """NaN in one token changes no other: neither what is kept of it nor its scale."""
    y1, dy2 = tensors(6, 24, torch.float32, seed=8)
    clean, *_ = triton_pack.pack_activation(y1, fp8)
    clean_gradient = triton_gradient.pack_gradient(dy2, clean, fp8)
    y1[4, 5], dy2[2, :] = NAN, INF
    dirty, counts, _ = triton_pack.pack_activation(y1, fp8)
    dirty_gradient = triton_gradient.pack_gradient(dy2, dirty, fp8)
    others = torch.tensor([0, 1, 3, 5])
    for one, other in ((clean, dirty), (clean_gradient, dirty_gradient)):
        same(*(tuple(None if x is None else x[others] for x in p) for p in (one, other)))
    assert unpack(dirty)[4, 5].isnan()
    if fp8:
        assert unpack(dirty)[4].nan_to_num(1.0).count_nonzero() == 12  # all that is kept
    assert torch.equal(counts, (unpack(dirty) > 0).sum(0).int())


def test_written_where_told():
    y1, dy2 = tensors(10, 16, torch.float32, seed=9)
    values, metadata = torch.empty(12, 8), torch.empty(12, 2, dtype=torch.uint8)
    act, *_ = triton_pack.pack_activation(y1, False, values=values[:10], metadata=metadata[:10])
    expected, *_ = activation(y1, False)
    same(act, expected)
    assert act.values.data_ptr() == values.data_ptr() and act.metadata.data_ptr() == metadata.data_ptr()
    assert values[10:].isnan().all() and (metadata[10:] == 0xFF).all()
    out = torch.empty(10, 8)
    assert triton_gradient.pack_gradient(dy2, expected, False, values=out).values is out
    same(out[None], gradient(dy2, expected, False).values[None])
    values, metadata = torch.empty(16, 8), torch.empty(16, 2, dtype=torch.uint8)
    args = (expected, torch.arange(16), torch.arange(10), 16, "value", False)
    packed, _ = triton_transpose.transpose_pack(*args, values=values, metadata=metadata)
    assert packed.values is values and packed.metadata is metadata
    same(packed, transposed(*args)[0])


def test_strides_do_not_matter():
    y1, dy2 = tensors(10, 16, torch.float32, seed=10)
    for fp8 in (False, True):
        same(*(triton_pack.pack_activation(x, fp8) for x in (y1, y1.T.contiguous().T)))
        act, *_ = activation(y1, fp8)
        same(*(triton_gradient.pack_gradient(x, act, fp8) for x in (dy2, dy2.T.contiguous().T)))
        perm = torch.arange(10)
        same(*(triton_transpose.transpose_rows(x, perm, 16, fp8) for x in (dy2, dy2.T.contiguous().T)))


def test_without_counting():
    y1, _ = tensors(5, 24, torch.float32, seed=11)
    for fp8 in (False, True):
        act, counts, totals = triton_pack.pack_activation(y1, fp8, count=False)
        same(act, activation(y1, fp8)[0])
        assert not counts.any() and not totals.any()


def test_scales_once_for_two():
    """The features' magnitudes may be computed once for both halves of a weight gradient."""
    y1, _ = tensors(20, 24, torch.float32, seed=12)
    act, *_ = activation(y1, True)
    bits = triton_features.largest_of_features(act)
    assert torch.equal(bits.view(torch.float32), unpack(act).abs().amax(0))
    features, perm = torch.arange(24), torch.arange(20)
    for run, args in ((triton_transpose.transpose_pack, ("value",)), (triton_transpose.transpose_dense, ())):
        one, other = (run(act, features, perm, 24, *args, True, bits=b) for b in (None, bits))
        same(one, other)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda act: triton_pack.pack_activation(torch.zeros(3, 12), False), "multiples of 8, got a matrix (3, 12)"),
        (lambda act: triton_pack.pack_activation(torch.zeros(3, 16), True, "cutlass_8bit"), "multiples of 64"),
        (lambda act: triton_transpose.transpose_pack(act, torch.arange(2), torch.arange(9), 12, "value", False), "12"),
        (
            lambda act: triton_transpose.transpose_pack(act, torch.arange(2), torch.arange(9), 8, "value", False),
            "got 8",
        ),
        (lambda act: triton_transpose.transpose_pack(act, torch.arange(2), torch.arange(9), 16, "size", False), "size"),
        (lambda act: triton_transpose.transpose_dense(act, torch.arange(2), torch.arange(9), 8, False), "got 8"),
        (lambda act: triton_transpose.transpose_rows(torch.zeros(9, 4), torch.arange(9), 8, False), "got 8"),
    ],
)
def test_errors_name_the_numbers(call, words):
    with pytest.raises(ValueError) as error:
        call(activation(torch.zeros(9, 16), False)[0])
    assert words in str(error.value)
