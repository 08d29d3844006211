"""The kernels that pack for 2:4 products on a GPU, bit for bit against packed.py and its neighbours."""

import pytest
import torch

from ops.sparse24_oracle import activation, columns, gradient, rounded, same, special, tensors, transposed
from sidlm.ops.sparse24.layouts import LAYOUTS, from_layout, to_layout
from sidlm.ops.sparse24.packed import unpack

pytest.importorskip("triton")

from sidlm.ops.sparse24 import (
    recipe,
    triton_features,
    triton_gradient,
    triton_masked,
    triton_pack,
    triton_split,
    triton_thin,
    triton_transpose,
)
from sidlm.ops.sparse24.products import dense_values

pytestmark = pytest.mark.gpu
SIZES = [(512, 2304), (1000, 9216), (130, 21504), (7, 43008)]
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def e4m3(request):
    fp8 = request.node.callspec.params.get("fp8") if hasattr(request.node, "callspec") else False
    if fp8 and not torch.version.hip and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 needs a GPU of compute capability 8.9 or more")


def active(T, F, dtype, seed=0):
    """y1 and dy2 as in a trained model: a tenth is positive, some features far more often than others, ties."""
    y1, dy2 = tensors(T, F, torch.float32, seed)
    often = torch.rand(F, generator=torch.Generator().manual_seed(seed + 1)) ** 4 * 3 - 1.6
    size = 4.0 ** torch.randn(T, 1, generator=torch.Generator().manual_seed(seed + 2))
    return ((y1 + often) * size).to(dtype).cuda(), (dy2 * 1e-3).to(dtype).cuda()


def same_features(mine, expected, name):
    """Of features that are not finite e4m3 says no more than that: their scale is NaN."""
    (p, _), (want, _) = mine, expected
    if want.scale is None or want.scale.isfinite().all():
        return same(mine, expected, name)
    good = want.scale.isfinite()
    assert torch.equal(p.scale.isfinite(), good) and p.values[~good].float().isnan().all()
    same(*(tuple(x[good] for x in q) for q in (p, want)), name)


def check(y1, dy2, fp8, layout="plain", length=None):
    T, F = y1.shape

    def laid(p):
        return p._replace(metadata=to_layout(p.metadata, layout))

    def plain(p):
        return p._replace(metadata=from_layout(p.metadata, layout, len(p.values), 2 * p.values.shape[1]))

    act, counts, totals = activation(y1, fp8)
    mine, *rest = triton_pack.pack_activation(y1, fp8, layout)
    same((plain(mine), *rest), (act, counts, totals), "pack")
    dact = gradient(dy2, act, fp8)
    same(plain(triton_gradient.pack_gradient(dy2, laid(act), fp8, layout)), dact, "gradient")
    make = torch.Generator().manual_seed(1)
    perm = torch.randperm(T, generator=make).cuda()
    order = counts.argsort(stable=True)
    some = F // 1024 * 64 or F // 8
    sparse, dense = order[: F - some].sort().values, order[F - some :].sort().values
    length = -(-T // 128) * 128 if length is None else length
    for p, by in ((act, "value"), (dact, "magnitude")):
        args = (sparse, perm, length, by, fp8)
        mine, totals = triton_transpose.transpose_pack(laid(p), *args, layout)
        same_features((plain(mine), totals), transposed(p, *args), f"transpose by {by}")
        x = columns(unpack(p), dense, perm, length)
        mine = triton_transpose.transpose_dense(laid(p), dense, perm, length, fp8, layout)
        same(mine, rounded(x, x.dtype, fp8), "dense")
    x = columns(dy2, torch.arange(F).cuda(), perm, length)
    same(triton_transpose.transpose_rows(dy2, perm, length, fp8), rounded(x, x.dtype, fp8), "rows")


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "F"), SIZES)
def test_equals_the_oracle(T, F, dtype, fp8):
    check(*active(T, F, dtype), fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("T", "F"), [(1, 8), (3, 24), (65, 200)])
def test_small_and_odd(T, F, fp8):
    for dtype in (*DTYPES, torch.float32):
        check(*(x.cuda() for x in tensors(T, F, dtype)), fp8, length=-(-T // 8) * 8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_special_values(dtype, fp8):
    check(*(x.cuda() for x in special(dtype)), fp8)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_portable_form(monkeypatch, dtype, fp8):
    """What other GPUs run in place of inline PTX."""
    for module in (triton_pack, triton_gradient, triton_transpose, triton_features):
        monkeypatch.setattr(module, "in_pairs", lambda arch, dtype: False)
    check(*active(300, 2304, dtype, seed=5), fp8)
    check(*(x.cuda() for x in special(dtype)), fp8)


@pytest.mark.parametrize("layout", [name for name, x in LAYOUTS.items() if x.byte is not None])
@pytest.mark.parametrize("fp8", [False, True])
def test_layouts(layout, fp8):
    check(*active(256, 2304, torch.bfloat16, seed=6), fp8, layout)


@pytest.mark.parametrize("fp8", [False, True])
def test_the_same_bits_twice(fp8):
    y1, dy2 = active(700, 4608, torch.bfloat16, seed=7)
    one, other = (triton_pack.pack_activation(y1, fp8) for _ in range(2))
    same(one, other)
    same(*(triton_gradient.pack_gradient(dy2, one[0], fp8) for _ in range(2)))
    perm, features = torch.randperm(700).cuda(), torch.arange(4608).cuda()
    args = (one[0], features, perm, 768, "value", fp8)
    same(*(triton_transpose.transpose_pack(*args) for _ in range(2)))


@pytest.mark.parametrize("fp8", [False, True])
def test_more_than_2_31_elements(fp8):
    """Offsets of rows take 64 bits: the last rows of a large matrix are those of a small one."""
    T, F = 101_000, 21504
    if torch.cuda.get_device_properties(0).total_memory < 24 << 30:
        pytest.skip("needs 24 GiB")
    few, _ = active(8, F, torch.bfloat16, seed=8)
    y1 = torch.zeros(T, F, dtype=torch.bfloat16, device="cuda")
    y1[-8:] = few
    (act, counts, totals), small = triton_pack.pack_activation(y1, fp8), triton_pack.pack_activation(few, fp8)
    del y1
    last = (*(None if x is None else x[-8:] for x in act),)
    same((last, counts, totals), (tuple(small[0]), *small[1:]))
    back, features = torch.arange(T - 1, -1, -1).cuda(), torch.arange(64).cuda()
    packed, _ = triton_transpose.transpose_pack(act, features, back, T, "value", fp8)
    flipped = torch.arange(7, -1, -1).cuda()
    expected, _ = triton_transpose.transpose_pack(small[0], features, flipped, 8, "value", fp8)
    assert torch.equal(packed.values[:, :4].float(), expected.values.float())


def check_masked(y1, dy2, fp8):
    """What runs for few tokens: nothing packed, or packed and the weights' gradients dense."""
    T, F = y1.shape
    act, counts, _ = activation(y1, fp8)
    dact = gradient(dy2, act, fp8)
    dense_act, dense_dact = (dense_values(p) for p in (act, dact))
    out, scale, found, _ = triton_masked.activation(y1.clone(), fp8)
    assert torch.equal(out.float(), dense_act.float()) and (not fp8 or torch.equal(scale, act.scale))
    assert fp8 or torch.equal(found, counts)
    out, scale = triton_masked.gradient(dy2.clone(), dense_act, act.scale)
    assert torch.equal(out.float(), dense_dact.float()) and (not fp8 or torch.equal(scale, dact.scale))
    split = triton_split.split(counts, 0.05, T)
    for mine, theirs in zip(split[:2], recipe.split(counts, 0.05)[:2], strict=True):
        assert torch.equal(mine, theirs)
    perm = torch.randperm(T, generator=torch.Generator().manual_seed(1)).cuda()
    length = -(-T // 16) * 16
    none = torch.empty(0, 0, dtype=torch.uint8, device="cuda")
    for p, dense, by in ((act, dense_act, "value"), (dact, dense_dact, "magnitude")):
        want, totals = transposed(p, split.sparse, perm, length, by, fp8)
        rest, rest_scale = rounded(columns(unpack(p), split.dense, perm, length), y1.dtype, fp8)
        bits = None
        if fp8:
            whole = p._replace(values=dense, metadata=none)
            for given, layout in ((p, "plain"), (whole, None)):
                found, bits = triton_features.of_features(given, layout, count=by == "value")
                assert by == "magnitude" or torch.equal(found, counts)
            turned = triton_transpose.transpose_rows(dense, perm, length, True, p.scale, bits)
            same(turned, rounded(columns(unpack(p), torch.arange(F).cuda(), perm, length), y1.dtype, True), "turned")
        out, scale, found = triton_thin.thinned(p, split.is_dense, perm, by, bits=bits)
        assert torch.equal(found, totals)
        kept = unpack(want._replace(values=want.values.float(), scale=None))
        if fp8:
            assert torch.equal(scale[split.sparse], want.scale) and torch.equal(scale[split.dense], rest_scale)
            assert torch.equal(out[split.dense].float(), rest.float())
            assert torch.equal(out[split.sparse].float(), kept)
        else:
            turned = out[perm].T.float()
            assert torch.equal(turned[split.sparse], kept[:, :T])
            assert torch.equal(turned[split.dense], rest[:, :T].float())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "F"), [(512, 2304), (1000, 9216), (130, 21504), (3, 200)])
def test_masked(T, F, dtype, fp8):
    check_masked(*active(T, F, dtype), fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_masked_in_the_portable_form(monkeypatch, fp8):
    for module in (triton_masked, triton_features, triton_thin):
        monkeypatch.setattr(module, "in_pairs", lambda arch, dtype: False)
    check_masked(*active(300, 2304, torch.bfloat16, seed=5), fp8)
