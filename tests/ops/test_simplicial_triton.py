"""The portable Triton kernels of 2-simplicial attention in Triton's interpreter, against the oracle in float64.

bfloat16 is left out: the interpreter gets it wrong without a word. The GPU tests cover it.
"""

import os

import pytest
import torch

from sidlm.ops.simplicial import eager
from sidlm.ops.simplicial.reference import reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from sidlm.ops.simplicial import permute, prepare, triton_backward, triton_backward_keys, triton_forward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on the way to a masked value
NAMES = ("out", "lse", "dq", "dk", "dv", "dk2", "dv2")
EPSILON = {torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody wrote reads as NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name, filled)


def inputs(batch, steps, heads, groups, dim, *, s1=None, s2=None, docs=0, dtype=torch.float32, seed=0):
    """q, k, v, k2, v2, doc_ids, grad_out, grad_lse."""
    make = torch.Generator().manual_seed(seed)
    shapes = [(steps, heads)] + [(s or steps, groups) for s in (s1, s1, s2, s2)] + [(steps, heads)]
    *xs, grad = (torch.randn(batch, *shape, dim, generator=make, dtype=torch.float64).to(dtype) for shape in shapes)
    ids = None
    if docs:
        length = max(steps, s1 or 0, s2 or 0)
        ids = torch.randint(-1, docs, (batch, length), generator=make).sort(dim=1).values
    return xs, ids, grad, torch.randn(batch, steps, heads, generator=make)


def run(xs, ids, grad, grad_lse, window, form, biases=(0.3, 1.0), scale=None):
    """Output, LSE and the five gradients by the kernels."""
    args = (*window, form, xs[0].shape[-1] ** -0.5 if scale is None else scale, *biases, ids)
    out, lse = triton_forward.forward(*xs, *args)
    return out, lse, *triton_backward.backward(grad, grad_lse, *xs, out, lse, *args)


def oracle(xs, ids, grad, grad_lse, window, form, biases=(0.3, 1.0), scale=None):
    """The same by the reference and autograd, in the inputs' dtype."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    args = (*window, form, xs[0].shape[-1] ** -0.5 if scale is None else scale, *biases, ids)
    out, lse = reference(*xs, *args)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out.double() * grad.double()).sum() + (finite.double() * grad_lse.double()).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, xs)


def check(case, window, form, multiple, **kwargs):
    """At most `multiple` times the oracle's own error in that dtype, or rounding's where the oracle's is smaller.

    The oracle computes half precision in float32; the kernels round u and the weights, as eager does on a GPU. And
    dS = P (dP - delta) is exact in the oracle where a row has one pair; the kernels round what is taken away.
    """
    xs, ids, grad, grad_lse = case
    mine = run(*case, window, form, **kwargs)
    exact = oracle([x.double() for x in xs], ids, grad, grad_lse, window, form, **kwargs)
    own = oracle(*case, window, form, **kwargs)
    delta = (exact[0] * grad.double()).sum(-1)
    taken = oracle([x.double() for x in xs], ids, grad * 0, delta, window, form, **kwargs)
    for name, m, e, o, t in zip(NAMES, mine, exact, own, taken, strict=True):
        assert m.dtype == (torch.float32 if name == "lse" else xs[0].dtype) and m.is_contiguous(), name
        hidden = e == -torch.inf
        assert torch.equal(m == -torch.inf, hidden), name
        m, e, o, t = (x.double().masked_fill(hidden, 0.0) for x in (m, e, o, t))
        floor = EPSILON[xs[0].dtype] * max(e.norm(), t.norm())
        assert (m - e).norm() <= multiple * max((o - e).norm(), floor), (name, (m - e).norm() / e.norm())
        if name == "out":
            assert (m[hidden] == 0).all()


CASES = [
    # batch, steps, heads, groups, dim, window, options
    (1, 37, 8, 2, 32, (9, 4), {}),
    (2, 30, 3, 1, 48, (4, 9), {"docs": 3}),  # the axes trade places; three heads
    (1, 37, 2, 2, 60, (16, 1), {"docs": 2}),
    (1, 5, 4, 4, 96, (1, 1), {}),
    (1, 44, 2, 1, 32, (33, 40), {}),  # two tiles of offsets
    (2, 9, 8, 1, 32, (16, 3), {"s1": 29, "s2": 14, "docs": 3}),
    (1, 7, 6, 1, 34, (3, 12), {"s1": 11, "s2": 30, "docs": 2}),
    (1, 1, 2, 1, 32, (512, 32), {}),
]


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:6])))
def test_equals_oracle_in_float32(case, form):
    *shape, window, options = case
    check(inputs(*shape, seed=CASES.index(case), **options), window, form, 4)


def test_many_blocks_of_keys():
    check(inputs(1, 80, 1, 1, 32, seed=7), (70, 5), "trilinear", 4)


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_equals_oracle_in_float16(form):
    check(inputs(1, 37, 2, 1, 48, docs=2, dtype=torch.float16, seed=3), (17, 6), form, 4)


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_sharp_softmax(form):
    """P = exp(logit - LSE) of the key gradients is off by the exponential of any other rounding of the logits."""
    xs, _, grad, grad_lse = inputs(1, 30, 4, 1, 20, dtype=torch.float16)
    case = ([8 * x for x in xs], None, grad, grad_lse)
    mine = run(*case, (20, 5), form)
    exact = oracle([x.double() for x in case[0]], None, grad, grad_lse, (20, 5), form)
    errors = dict(zip(NAMES, ((m - e).norm() / e.norm() for m, e in zip(mine, exact, strict=True)), strict=True))
    assert max(errors["dv"], errors["dv2"]) <= 3 * errors["out"], errors  # what rounding u does to the weights


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_scale(scale):
    check(inputs(1, 20, 2, 1, 33), (9, 3), "determinant", 4, scale=scale, biases=(-0.2, 0.0))


def test_wide_windows_take_several_tiles_of_offsets():
    """More offsets than a tile has rows, and more than the sequence has positions."""
    check(inputs(1, 38, 1, 1, 32, docs=2, seed=5), (60, 45), "trilinear", 4)


def test_groups_and_sequences_in_several_launches(monkeypatch):
    case = inputs(2, 12, 2, 2, 32, docs=2)
    whole = run(*case, (7, 3), "determinant")
    monkeypatch.setattr(triton_backward_keys, "PARTIAL_BYTES", 1)
    for name, one, other in zip(NAMES, whole, run(*case, (7, 3), "determinant"), strict=True):
        assert torch.equal(one, other), name


def test_offsets_of_64_bits(monkeypatch):
    case = inputs(2, 9, 4, 2, 32, s1=13, docs=2)
    narrow = run(*case, (7, 3), "determinant")
    monkeypatch.setattr(prepare, "WIDE", 1)
    for name, one, other in zip(NAMES, narrow, run(*case, (7, 3), "determinant"), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_the_same_bits_twice(form):
    case = inputs(1, 24, 4, 2, 32, docs=2, seed=2)
    for name, one, other in zip(NAMES, *(run(*case, (17, 5), form) for _ in range(2)), strict=True):
        assert torch.equal(one, other), name


def test_strides_do_not_matter():
    """Slices of one projection, as models pass them."""
    case, ids, grad, grad_lse = inputs(1, 20, 2, 1, 32)
    strided = [torch.stack((x, x), dim=-1)[..., 0] for x in case]
    expanded = grad[:, :1].expand_as(grad)
    one = run(case, ids, expanded.contiguous(), grad_lse, (7, 3), "trilinear")
    for name, x, y in zip(NAMES, one, run(strided, ids, expanded, grad_lse, (7, 3), "trilinear"), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nan_in_one_document_stays_there(form, bad):
    """Three documents in a row that share tiles of queries and of keys; the first is padding."""
    xs, _, grad, grad_lse = inputs(1, 40, 1, 1, 32)
    ids = torch.tensor([[-1] * 7 + [0] * 12 + [5] * 21])
    here = slice(*((0, 7), (7, 19), (19, 40))[bad])
    clean = run(xs, ids, grad, grad_lse, (20, 4), form)
    for x in (*xs, grad, grad_lse):
        x[:, here] = torch.nan
    dirty = run(xs, ids, grad, grad_lse, (20, 4), form)
    other = torch.ones(40, dtype=torch.bool)
    other[here] = False
    for name, x, y in zip(NAMES, clean, dirty, strict=True):
        assert torch.equal(x[:, other], y[:, other]), name
        if bad:
            assert y[:, here].isnan().all(), name
        else:
            assert torch.equal(x[:, here], y[:, here]), name


def test_nan_in_one_sequence_or_group_stays_there():
    xs, ids, grad, grad_lse = inputs(2, 12, 4, 2, 32)
    clean = run(xs, ids, grad, grad_lse, (7, 3), "trilinear")
    xs[0][0, :, :2], grad[0, :, :2] = torch.nan, torch.nan
    for x in xs[1:]:
        x[0, :, 0] = torch.nan
    dirty = run(xs, ids, grad, grad_lse, (7, 3), "trilinear")
    for name, x, y in zip(NAMES, clean, dirty, strict=True):
        half = x.shape[2] // 2
        assert torch.equal(x[1], y[1]) and torch.equal(x[0, :, half:], y[0, :, half:]), name
        assert y[0, :, :half].isnan().all(), name


def test_positions_that_no_query_sees_may_hold_anything():
    """A cache longer than the windows: its old rows are not read into any result."""
    xs, ids, grad, grad_lse = inputs(1, 6, 2, 1, 32, s1=40, s2=30)
    clean = run(xs, ids, grad, grad_lse, (8, 3), "trilinear")
    for x, window in ((xs[1], 8), (xs[2], 8), (xs[3], 3), (xs[4], 3)):
        x[:, : x.shape[1] - 6 - window + 1] = torch.nan
    for name, x, y in zip(NAMES, clean, run(xs, ids, grad, grad_lse, (8, 3), "trilinear"), strict=True):
        assert torch.equal(x, y), name


def test_no_queries():
    xs, ids, grad, grad_lse = inputs(1, 0, 2, 1, 32, s1=4, s2=3)
    for x, y in zip(run(xs, ids, grad, grad_lse, (4, 2), "trilinear")[2:], xs, strict=True):
        assert x.shape == y.shape and (x == 0).all()


def test_reach_and_extents():
    ids = torch.tensor([[-1, -1, 0, 0, 0, 3, 4, 4]])
    assert prepare.reach(ids, 7).tolist() == [[0, 1, 2, 3, 1, 1, 2]]
    assert prepare.reach(None, 7) is None
    first, last = prepare.extents(ids, 7)
    assert first[0, 2:].tolist() == [1, 1, 1, 4, 5, 5] and last[0, 2:].tolist() == [3, 3, 3, 4, 6, 6]
    assert (first[0, :2] > last[0, :2]).all()


def test_copies_give_the_cross_product():
    xs, *_ = inputs(1, 4, 1, 1, 8)
    for window in ((4, 2), (2, 4)):
        p = prepare.problem(*xs, *window, "determinant", 0.0, 0.0)
        (xa, xb), (ya, yb) = p.left(p.k2), p.right(p.q)
        sign = torch.tensor([-1.0] * 6 + [1.0] * 2) if p.swapped else 1.0
        torch.testing.assert_close(xa * yb - xb * ya, eager._cross(p.k2, p.q) * sign)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 37, 3, 64), (1, 5, 1, 48), (0, 2, 1, 32)])
def test_the_kernel_for_copies_is_their_definition(dtype, shape):
    """bfloat16 too: it only moves bits."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    for w1, w2 in ((4, 2), (2, 4)):
        p = prepare.problem(x, x, x, x, x, w1, w2, "determinant", 0.0, 0.0)._replace(swapped=w2 > w1)
        for want, zero in ((p.right(x), 0), (p.left(x), 1)):
            assert all(map(torch.equal, permute.copies(x, p.swapped, zero), want))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nothing_is_loaded_ahead_of_one_tile(arch):
    """Or Triton overwrites what products in flight read, where some products are too small to be wgmma."""
    for per_group, w2 in [(1, 32), (4, 8), (1, 1), (2, 7), (2, 32), (8, 16), (64, 32)]:
        q, k = (torch.empty(1, 90, heads, 96, dtype=torch.bfloat16, device="meta") for heads in (per_group, 1))
        p = prepare.problem(q, k, k, k, k, 40, w2, "trilinear", 0.0, 1.0)
        tile = triton_backward_keys.cut(p, arch).tile
        table = triton_forward.choose_tile(triton_backward_keys.KEY_TILES, arch, q)
        assert tile.bn == min(table.bn, prepare.next_power(per_group * w2, 16))
        assert tile.stages == (table.stages if tile.bn == table.bn else 1)
        if tile.stages > 1:
            assert arch != "sm_90" or tile.bn >= 64


def test_tiles_hold_few_dead_rows():
    split = triton_forward.split_rows
    assert split(64, 64, 4096, 8, 512, 32) == (1, 2, 32)
    assert split(64, 64, 4096, 64, 512, 32) == (1, 2, 32)
    bq, bh, bs = split(64, 64, 4096, 3, 512, 32)
    assert bq * bh * bs == 64 and bh == 1
    assert split(64, 64, 4096, 1, 512, 48)[2] == 16
