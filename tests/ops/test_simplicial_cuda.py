"""The kernels of 2-simplicial attention on a GPU: against float64, deterministic, and isolated from NaN elsewhere."""

import pytest
import torch

from sidlm.ops import two_simplicial_attention
from sidlm.ops.simplicial.api import IMPLEMENTATIONS

pytestmark = pytest.mark.gpu

# batch, steps, heads, groups, dim, window, s1, s2, documents
GEOMETRIES = [
    (1, 300, 64, 1, 128, (200, 32), None, None, 0),
    (2, 260, 64, 1, 128, (130, 20), None, None, 3),
    (2, 257, 8, 2, 128, (128, 16), None, None, 3),
    (1, 400, 128, 1, 64, (150, 32), None, None, 2),
    (2, 130, 5, 1, 64, (60, 33), None, None, 3),
    (1, 200, 4, 4, 128, (100, 32), None, None, 3),
    (1, 190, 3, 3, 64, (70, 1), None, None, 2),
    (2, 150, 6, 2, 128, (20, 90), None, None, 2),
    (2, 70, 8, 2, 128, (64, 32), 133, 101, 2),
    (1, 1, 8, 2, 128, (512, 32), 600, 40, 0),
    (1, 150, 8, 4, 128, (300, 200), None, None, 0),
    (2, 100, 4, 2, 32, (33, 9), None, None, 2),
    (2, 90, 6, 2, 48, (40, 8), None, None, 2),
    (1, 90, 2, 1, 60, (40, 8), None, None, 0),
    (1, 90, 4, 1, 96, (40, 8), None, None, 2),
    (1, 80, 4, 2, 192, (40, 8), None, None, 2),
    (1, 80, 4, 2, 256, (40, 8), None, None, 0),
    (1, 3, 2, 1, 64, (1, 1), None, None, 0),
    # groups of 16, 32 and 48 heads: one block of threads or two with shared keys
    (2, 70, 32, 2, 64, (64, 32), 133, 101, 2),
    (2, 150, 32, 1, 128, (300, 5), None, None, 3),
    (1, 200, 48, 1, 128, (100, 20), None, None, 2),
    (1, 3, 16, 1, 128, (1, 1), None, None, 0),
    (1, 90, 16, 1, 64, (64, 64), None, None, 2),
    # groups of few heads without documents, tiles of one query and of several
    (2, 300, 8, 2, 128, (200, 32), None, None, 0),
    (1, 203, 3, 3, 128, (100, 31), None, None, 0),
    (1, 333, 7, 1, 64, (150, 31), None, None, 0),
]


def _inputs(geometry, dtype, seed=0):
    batch, steps, heads, groups, dim, _, s1, s2, docs = geometry
    make = torch.Generator().manual_seed(seed)
    shapes = [(steps, heads)] + [(s or steps, groups) for s in (s1, s1, s2, s2)]
    xs = [torch.randn(batch, *shape, dim, generator=make).to(dtype).cuda() for shape in shapes]
    ids = None
    if docs:
        ids = torch.randint(-1, docs, (batch, max(x.shape[1] for x in xs)), generator=make).sort(dim=1).values.cuda()
    grads = [torch.randn(batch, steps, heads, *tail, generator=make).cuda() for tail in ((dim,), ())]
    return xs, ids, grads


def _run(xs, ids, grads, impl, **settings):
    """Output, LSE (zero at padding) and the five gradients, all float64."""
    xs = [x.detach().requires_grad_() for x in xs]
    out, lse = two_simplicial_attention(*xs, doc_ids=ids, return_lse=True, impl=impl, **settings)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1]).sum()
    return [x.double().detach() for x in (out, lse, *torch.autograd.grad(loss, xs))]


def _usable(impl, dtype):
    reason = IMPLEMENTATIONS[impl].why_not(torch.device("cuda"), dtype)
    if reason:
        pytest.skip(reason)


FORMS = ("trilinear", "determinant")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *(("hopper", g, BF16, form) for g in GEOMETRIES if g[4] in (64, 128) for form in FORMS),
    *(("hopper", g, FP16, form) for g in GEOMETRIES[1:4] for form in FORMS),
    *(("triton", g, BF16, FORMS[i % 2]) for i, g in enumerate(GEOMETRIES)),
    *(("triton", g, FP16, FORMS[i % 2]) for i, g in enumerate(GEOMETRIES[2::4])),
    *(("triton", g, FP32, FORMS[i % 2]) for i, g in enumerate(GEOMETRIES[1::2])),
]


@pytest.mark.parametrize(("impl", "geometry", "dtype", "form"), CASES, ids=str)
def test_error_against_float64(impl, geometry, dtype, form):
    """At most one and a half times the error of torch's own products in that dtype (the eager form).

    In float32 four times: three TF32 products leave out that of the two low parts, 2^-22 of the whole, which shows
    where little but the difference of two equal sums is left (one visible pair: dS = dP - delta).
    """
    _usable(impl, dtype)
    xs, ids, grads = _inputs(geometry, dtype)
    settings = {"window": geometry[5], "form": form, "k2_bias": 0.25, "v2_bias": 1.0}
    grads[0] = grads[0].to(dtype).float()
    exact = _run([x.double() for x in xs], ids, [g.double() for g in grads], "eager", **settings)
    own = _run(xs, ids, grads, "eager", **settings)
    mine = _run(xs, ids, grads, impl, **settings)
    again = _run(xs, ids, grads, impl, **settings)
    factor = 4.0 if dtype == torch.float32 else 1.5
    floor = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for name, e, o, m, a in zip(("out", "lse", "q", "k", "v", "k2", "v2"), exact, own, mine, again, strict=True):
        assert torch.equal(m, a), f"{name} differs between two runs"
        error, allowed = (m - e).norm() / e.norm(), factor * (o - e).norm() / e.norm()
        assert error <= max(allowed, floor), f"{name}: {error:.2e}, torch's own {allowed / factor:.2e}"


@pytest.mark.parametrize("impl", ["hopper", "triton"])
@pytest.mark.parametrize("geometry", GEOMETRIES[1:9], ids=str)
def test_nan_in_one_document_stays_there(impl, geometry):
    _usable(impl, torch.bfloat16)
    xs, ids, grads = _inputs(geometry, torch.bfloat16)
    settings = {"window": geometry[5], "v2_bias": 1.0}
    before = _run(xs, ids, grads, impl, **settings)
    victim = 0
    poisoned = []
    for x in xs:
        x = x.clone()
        x[ids[:, -x.shape[1] :] == victim] = torch.nan
        poisoned.append(x)
    after = _run(poisoned, ids, grads, impl, **settings)
    for name, b, a in zip(("out", "lse", "q", "k", "v", "k2", "v2"), before, after, strict=True):
        others = ids[:, -a.shape[1] :] != victim
        assert torch.equal(a[others], b[others]), name


@pytest.mark.parametrize("impl", ["hopper", "triton"])
def test_nan_in_one_sequence_stays_there(impl):
    _usable(impl, torch.bfloat16)
    for geometry in ((2, 150, 4, 2, 128, (70, 32), None, None, 0), (2, 90, 64, 1, 64, (70, 20), None, None, 0)):
        xs, ids, grads = _inputs(geometry, torch.bfloat16)
        for broken, clean in ((0, 1), (1, 0)):
            poisoned = [x.index_fill(0, torch.tensor([broken]).cuda(), torch.nan) for x in xs]
            before = _run(xs, ids, grads, impl, window=geometry[5])
            for b, a in zip(before, _run(poisoned, ids, grads, impl, window=geometry[5]), strict=True):
                assert torch.equal(a[clean], b[clean])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[2], GEOMETRIES[8], GEOMETRIES[12]], ids=str)
@pytest.mark.parametrize("impl", ["hopper", "triton", "eager"])
def test_compensated_errors_are_those_of_rounding_the_results(impl, geometry, form):
    """To bfloat16, and of eleven bits inside."""
    _usable(impl, BF16)
    xs, ids, grads = _inputs(geometry, BF16)
    settings = {"window": geometry[5], "form": form, "k2_bias": 0.3, "v2_bias": 1.0}
    exact = _run([x.double() for x in xs], ids, grads, "eager", **settings)
    found = _run(xs, ids, grads, impl, compensate=True, **settings)
    for x, y in zip(found, exact, strict=True):
        assert (x - y).norm() <= 1.25 * (y.bfloat16() - y).norm() + 2.0**-9 * y.norm()
