"""The dense kernels that benchmarks/sparse24.py compares with, in Triton's interpreter, against torch's autograd."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

from ops.sparse24_interpreter import poison_memory, use_casts_of_torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.runtime import interpreter

FP8 = torch.float8_e4m3fn
FUNCTIONS = {
    "relu2": lambda y: y.relu().square(),
    "swiglu": lambda y: torch.nn.functional.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
}


@pytest.fixture
def kernels(monkeypatch):
    use_casts_of_torch(monkeypatch, interpreter)
    poison_memory(monkeypatch)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("_sparse24_dense_kernels")
    sys.modules.pop("_sparse24_dense_kernels", None)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_value_and_gradient_plain_and_transposed(kernels, kind):
    make = torch.Generator().manual_seed(1)
    features = 72 if kind == "relu2" else 2 * 72
    y = torch.randn(130, features, generator=make, dtype=torch.float64, requires_grad=True)
    dh = torch.randn(130, 72, generator=make, dtype=torch.float64)
    h = FUNCTIONS[kind](y)
    h.backward(dh)
    y32, dh32, scale, h_scale = y.detach().float(), dh.float(), 2.0**-3, 2.0**-4
    for dtype, error in ((torch.float32, 1e-6), (FP8, 2**-4)):

        def close(got, expected, by, error=error):
            torch.testing.assert_close(got.double() * by, expected, rtol=error, atol=by * max(error / 8, 2**-10))

        plain, turned = kernels.pointwise(y32, kind, dtype, h_scale, turned=True)
        close(plain, h.detach(), h_scale)
        assert torch.equal(turned.float(), plain.T.float())
        h_turned, dy, dy_turned = kernels.pointwise_backward(y32, dh32, kind, dtype, h_scale, scale, turned=True)
        assert torch.equal(h_turned.float(), plain.T.float())
        close(dy, y.grad, scale)
        assert torch.equal(dy_turned.float(), dy.T.float())


def test_the_scale_of_a_whole_matrix(kernels):
    x = torch.randn(130, 1100)
    x[77, 1050] = -449.0 * 2**5
    assert kernels.scale_of(x).item() == 2.0**6 and kernels.scale_of(x.clamp(min=-448.0 * 2**5)).item() == 2.0**5
