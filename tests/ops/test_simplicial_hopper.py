"""The Gluon kernels for Hopper, emulated on a CPU: every geometry and gradient against the oracle in float64."""

import math
import os

import pytest
import torch

from sidlm.ops import two_simplicial_attention
from sidlm.ops.simplicial.reference import reference

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the device")

# batch, steps, heads, groups, dim, window, s1, s2, documents
GEOMETRIES = [
    (1, 40, 4, 1, 64, (20, 8), None, None, 0),
    (1, 40, 16, 1, 64, (20, 8), None, None, 3),
    (2, 37, 8, 2, 64, (20, 32), None, None, 2),
    (1, 33, 5, 1, 64, (20, 9), None, None, 0),
    (2, 30, 4, 4, 64, (70, 12), None, None, 0),
    (2, 20, 8, 2, 64, (16, 13), 45, 31, 0),
    (1, 1, 8, 2, 64, (60, 8), 80, 20, 0),
    (1, 150, 2, 1, 64, (140, 4), None, None, 0),
    (1, 30, 3, 3, 64, (20, 1), None, None, 0),
    (1, 3, 2, 1, 64, (1, 1), None, None, 0),
    (1, 34, 64, 1, 64, (30, 3), None, None, 3),
    (1, 50, 2, 1, 64, (48, 50), None, None, 2),
    (1, 40, 16, 1, 128, (40, 16), None, None, 2),
    (1, 75, 8, 1, 64, (70, 20), None, None, 2),
    (1, 27, 3, 1, 64, (5, 18), None, None, 0),
    # narrow groups over several programs, whose shares of the second keys meet
    (1, 70, 3, 3, 64, (40, 32), None, None, 0),
    (2, 67, 4, 1, 128, (150, 31), 130, 90, 2),
]
FORMS = ("trilinear", "determinant")


def kernels():
    """Module and name of every Gluon kernel."""
    from sidlm.ops.simplicial import (
        hopper_backward_keys,
        hopper_backward_queries,
        hopper_forward,
        hopper_narrow_keys,
        hopper_narrow_queries,
    )

    return {
        hopper_forward: "forward_kernel",
        hopper_backward_queries: "backward_queries_kernel",
        hopper_backward_keys: "backward_keys_kernel",
        hopper_narrow_queries: "narrow_queries_kernel",
        hopper_narrow_keys: "narrow_keys_kernel",
    }


@pytest.fixture
def emulated(monkeypatch):
    """The kernels of `impl="hopper"` replaced by their emulation, on a device of three processors.

    Memory is NaN until it is written.
    """
    from gluon_emulator import Emulated
    from sidlm.ops.simplicial import hopper, hopper_wide, prepare

    for module, name in kernels().items():
        monkeypatch.setattr(module, name, Emulated(getattr(module, name)))
        monkeypatch.setattr(module, "processors", lambda device: 3)
    monkeypatch.setattr(hopper_wide, "takes", lambda p: False)  # CUDA C++ is not emulated
    monkeypatch.setattr(prepare, "why_not_hopper", lambda device, dtype: None)
    torch.use_deterministic_algorithms(True)
    yield hopper
    torch.use_deterministic_algorithms(False)


def inputs(geometry, seed=0, dtype=torch.float16):
    batch, steps, heads, groups, dim, _, s1, s2, docs = geometry
    make = torch.Generator().manual_seed(seed)
    shapes = [(steps, heads), *((s or steps, groups) for s in (s1, s1, s2, s2))]
    xs = [torch.randn(batch, *shape, dim, generator=make).to(dtype) for shape in shapes]
    ids = None
    if docs:
        ids = torch.randint(-1, docs, (batch, max(x.shape[1] for x in xs)), generator=make).sort(dim=1).values
    grads = [torch.randn(batch, steps, heads, *tail, generator=make) for tail in ((dim,), ())]
    return xs, ids, (grads[0].to(dtype), grads[1])


def run(hopper, xs, grads, settings):
    """Output, LSE and five gradients; the LSE of padding takes no gradient."""
    out, lse = hopper.forward(*xs, *settings)
    grad_lse = grads[1].masked_fill(lse == -torch.inf, 0.0)
    return out, lse, *hopper.backward(grads[0], grad_lse, *xs, out, lse, *settings)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_against_the_oracle(emulated, geometry, form):
    xs, ids, grads = inputs(geometry, seed=len(form))
    settings = (*geometry[5], form, geometry[4] ** -0.5, 0.25, 1.0, ids)
    mine = run(emulated, xs, grads, settings)
    exact = [x.double().requires_grad_() for x in xs]
    out, lse = reference(*exact, *settings)
    finite = lse.isfinite()
    loss = (out * grads[0].double()).sum() + (lse.masked_fill(~finite, 0.0) * grads[1].double()).sum()
    expected = (out.detach(), lse.detach(), *torch.autograd.grad(loss, exact))
    assert torch.equal(mine[1].isfinite(), finite)
    for name, m, e in zip(("out", "lse", "q", "k", "v", "k2", "v2"), mine, expected, strict=True):
        m, e = (x.double().nan_to_num(neginf=0.0) if name == "lse" else x.double() for x in (m, e))
        # float16 has an epsilon of 1e-3; one pair a row leaves gradients of q, k and k2 that are all cancellation
        limit = 1e-3 if name in ("out", "lse", "v", "v2") or geometry[5] != (1, 1) else 1e-2
        assert (m - e).norm() <= limit * e.norm(), f"{name}: {(m - e).norm() / e.norm():.1e}"


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(emulated, form):
    xs, ids, grads = inputs(GEOMETRIES[1], dtype=torch.bfloat16)
    settings = (*GEOMETRIES[1][5], form, 0.125, 0.25, 1.0, ids)
    mine = run(emulated, xs, grads, settings)
    exact = [x.double().requires_grad_() for x in xs]
    out, lse = reference(*exact, *settings)
    seen = lse.isfinite()
    loss = (out * grads[0].double()).sum() + (lse.masked_fill(~seen, 0.0) * grads[1].double()).sum()
    for m, e in zip((mine[0], *mine[2:]), (out, *torch.autograd.grad(loss, exact)), strict=True):
        assert (m.double() - e).norm() <= 1e-2 * e.norm()


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_whatever_the_timing(emulated, form):
    """Products read their operands at random moments, and partitions run as their threads do."""
    xs, ids, grads = inputs(GEOMETRIES[2])
    settings = (*GEOMETRIES[2][5], form, 0.125, 0.0, 1.0, ids)
    first = run(emulated, xs, grads, settings)
    for seed in (1, 2):
        for module, name in kernels().items():
            getattr(module, name).seed = seed
        for a, b in zip(first, run(emulated, xs, grads, settings), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_sharp_softmax(emulated, form):
    """P = exp(logit - LSE) of the key gradients is off by the exponential of any other rounding of the logits."""
    xs, _, grads = inputs((1, 40, 16, 1, 64, (30, 8), None, None, 0))
    xs, settings = [8 * x for x in xs], (30, 8, form, 0.125, 0.0, 0.0, None)
    mine = run(emulated, xs, grads, settings)
    exact = [x.double().requires_grad_() for x in xs]
    out, lse = reference(*exact, *settings)
    loss = (out * grads[0].double()).sum() + (lse * grads[1].double()).sum()
    expected = dict(zip(("q", "k", "v", "k2", "v2"), torch.autograd.grad(loss, exact), strict=True))
    error = (mine[0] - out).norm() / out.norm()  # what rounding u does to the weights
    for name, m in (("v", mine[4]), ("v2", mine[6])):
        assert (m.double() - expected[name]).norm() <= 3 * error * expected[name].norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_sharp_start_of_the_next_document(emulated, form):
    """Tiles of whole windows end in it: exp(0 - LSE), of its first query, overflows and must not meet a zero."""
    xs, _, grads = inputs((1, 72, 16, 1, 64, (72, 8), None, None, 0), seed=3)
    settings = (72, 8, form, 0.125, 0.0, 0.0, (torch.arange(72) >= 66).long()[None])
    xs = [3 * x for x in xs]
    results = run(emulated, xs, grads, settings)
    assert results[1][0, 66].min() < -16 * math.log(2)  # beyond float16
    assert all(bool(x.isfinite().all()) for x in results)


@pytest.mark.parametrize(
    ("geometry", "form"),
    [(GEOMETRIES[i], "trilinear") for i in (1, 2, 10, 11)] + [(GEOMETRIES[i], "determinant") for i in (1, 11)],
    ids=str,
)
def test_nan_in_one_document_stays_there(emulated, geometry, form):
    xs, ids, grads = inputs(geometry, seed=3)
    settings = (*geometry[5], form, 0.125, 0.0, 1.0, ids)
    before = run(emulated, xs, grads, settings)
    for victim in range(int(ids.max()) + 1):
        poisoned = [x.masked_fill((ids[:, -x.shape[1] :] == victim)[..., None, None], torch.nan) for x in xs]
        after = run(emulated, poisoned, grads, settings)
        for name, a, b in zip(("out", "lse", "q", "k", "v", "k2", "v2"), after, before, strict=True):
            others = ids[:, -a.shape[1] :] != victim
            assert torch.equal(a[others], b[others]), f"{name}, document {victim}"


@pytest.mark.parametrize("form", FORMS)
def test_nan_in_one_sequence_stays_there(emulated, form):
    xs, _, grads = inputs((2, 37, 6, 2, 64, (20, 8), None, None, 0))
    settings = (20, 8, form, 0.125, 0.0, 1.0, None)
    before = run(emulated, xs, grads, settings)
    for broken, clean in ((0, 1), (1, 0)):
        poisoned = [x.index_fill(0, torch.tensor([broken]), torch.nan) for x in xs]
        for a, b in zip(run(emulated, poisoned, grads, settings), before, strict=True):
            assert torch.equal(a[clean], b[clean])


def test_other_problems_go_to_the_portable_kernels(emulated):
    """Head dimensions, long short windows and scales that the Gluon kernels do not take."""
    (q, k, v, k2, v2), _, _ = inputs((1, 12, 2, 1, 48, (6, 3), None, None, 0))
    out, _ = emulated.forward(q, k, v, k2, v2, 6, 3, "trilinear", -0.3, 0.0, 0.0, None)
    exact = [x.double() for x in (q, k, v, k2, v2)]
    expected = two_simplicial_attention(*exact, window=(6, 3), scale=-0.3, impl="reference")
    assert (out.double() - expected).norm() <= 1e-3 * expected.norm()
