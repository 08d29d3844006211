"""bfloat16 inputs multiplied as float16 (compensated.py): accuracy, range, what powers of two do.

The portable kernels run in Triton's interpreter and give float32, for the interpreter gets bfloat16 wrong.
"""

import functools
import os

import pytest
import torch

from sidlm.ops import two_simplicial_attention
from sidlm.ops.simplicial import compensated, eager
from sidlm.ops.simplicial.reference import reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from sidlm.ops.simplicial import portable

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on the way to a masked value
NAMES = ("out", "lse", "dq", "dk", "dv", "dk2", "dv2")
WINDOW, BIASES = (9, 4), (0.3, 1.0)


def inputs(factors=(1.0,) * 6, seed=0):
    """q, k, v, k2, v2, grad_out in bfloat16, each times a factor, and grad_lse."""
    make = torch.Generator().manual_seed(seed)
    heads = (4, 2, 2, 2, 2, 4)
    xs = [torch.randn(2, 21, h, 24, generator=make).mul(f).bfloat16() for h, f in zip(heads, factors, strict=True)]
    return xs, torch.randn(2, 21, 4, generator=make)


def run(xs, grad_lse, form, *, module=portable, biases=BIASES, ids=None):
    """Output, LSE and gradients by a module's kernels with compensation, all in float32."""

    def exact(function):
        return lambda *args, dtype: function(*args, dtype=torch.float32)

    *xs, grad = xs
    args = (*WINDOW, form, 24**-0.5, *biases, ids)
    out, lse = compensated.forward(exact(module.forward), *xs, *args)
    backward = functools.partial(compensated.backward, exact(module.backward), module is portable)
    return out, lse, *backward(grad, grad_lse, *xs, out, lse, *args)


def oracle(xs, grad_lse, form, biases=BIASES, ids=None):
    *xs, grad = (x.double().requires_grad_() for x in xs)
    out, lse = reference(*xs, *WINDOW, form, 24**-0.5, *biases, ids)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return out, lse, *torch.autograd.grad((out * grad).sum() + (lse * grad_lse.double()).sum(), xs)


def relative(x, exact):
    return float((x.detach().double() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("module", [portable, eager])
def test_errors_are_those_of_eleven_bits(form, module):
    xs, grad_lse = inputs()
    for name, x, exact in zip(NAMES, run(xs, grad_lse, form, module=module), oracle(xs, grad_lse, form), strict=True):
        assert relative(x, exact) < 2.0**-10, name  # bfloat16's products make it some 2^-8


@pytest.mark.parametrize("factors", [(2.0**12, 2.0**-4, 1, 2.0**-8, 1, 1), (2.0**-9, 2.0**-3, 1, 2.0**12, 1, 1)])
def test_powers_of_two_that_cancel_change_no_bit(factors):
    xs, grad_lse = inputs()
    scaled, _ = inputs(factors)
    plain = run(xs, grad_lse, "trilinear", biases=(0.0, 1.0))
    found = run(scaled, grad_lse, "trilinear", biases=(0.0, 1.0))
    for name, x, y, factor in zip(NAMES, plain, found, (1, 1, *factors[:5]), strict=True):
        assert torch.equal(x, y * factor), name


def test_gradients_and_values_far_from_one_keep_their_accuracy():
    """By themselves these would be zero in float16, or infinite."""
    factors = (1.0, 1.0, 2.0**20, 1.0, 2.0**-30, 2.0**-25)
    xs, grad_lse = inputs(factors)
    biases, grad_lse = (0.0, 0.0), grad_lse * 2.0**-40
    found, exact = run(xs, grad_lse, "trilinear", biases=biases), oracle(xs, grad_lse, "trilinear", biases=biases)
    for name, x, y in zip(NAMES, found, exact, strict=True):
        assert relative(x, y) < 2.0**-10, name


def test_a_sharp_softmax_does_not_overflow():
    xs, grad_lse = inputs((16.0, 16.0, 8.0, 16.0, 8.0, 8.0))
    found, exact = run(xs, grad_lse, "trilinear"), oracle(xs, grad_lse, "trilinear")
    assert all(x.isfinite().all() for x in found)
    for name, x, y in zip(NAMES, found, exact, strict=True):
        if name in ("out", "dv", "dv2"):  # the others are differences of what is nearly equal
            assert relative(x, y) < 2.0**-6, name


def test_nan_stays_in_its_sequence():
    xs, grad_lse = inputs()
    clean = run(xs, grad_lse, "trilinear")
    for x in xs:
        x[1, 3, 0, 5] = torch.nan
    for name, x, y in zip(NAMES, run(xs, grad_lse, "trilinear"), clean, strict=True):
        torch.testing.assert_close(x[0], y[0], rtol=2.0**-8, atol=2.0**-8 * float(y[0].abs().max()), msg=name)


def test_zeros_and_nothing():
    xs, grad_lse = inputs((0.0,) * 6)
    assert all(x.isfinite().all() for x in run(xs, grad_lse, "trilinear", biases=(0.0, 0.0)))
    empty = [torch.empty(1, 0, h, 8, dtype=torch.bfloat16) for h in (2, 1, 1, 1, 1)]
    assert two_simplicial_attention(*empty, compensate=True).shape == (1, 0, 2, 8)


def test_public_function_is_closer_to_float64_and_differentiable():
    """Through autograd, with results in bfloat16: within twice what rounding the exact results costs."""
    xs, _ = inputs()
    *leaves, grad = (x.clone().requires_grad_() for x in xs)
    settings = {"window": WINDOW, "k2_bias": 0.3, "v2_bias": 1.0, "compensate": True}
    out = two_simplicial_attention(*leaves, **settings)
    assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out, leaves, grad)
    exact, _lse, *exact_grads = oracle(xs, torch.zeros(2, 21, 4), "trilinear")
    for x, y in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert x.dtype == torch.bfloat16
        assert relative(x, y) < 2 * relative(y.bfloat16(), y) + 2.0**-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_other_dtypes_are_left_alone(dtype):
    xs, _ = inputs()
    *xs, _grad = (x.to(dtype) for x in xs)
    plain, fine = (two_simplicial_attention(*xs, window=WINDOW, compensate=c) for c in (False, True))
    assert torch.equal(plain, fine)
