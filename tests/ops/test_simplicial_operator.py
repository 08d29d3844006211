"""2-simplicial attention as PyTorch sees it: autograd, torch.compile, checkpointing, FSDP and the FLOP counter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sidlm.ops import two_simplicial_attention
from sidlm.ops.simplicial import api, flops

# numpy's, in the interpreter, on the way to a masked value
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
IMPLS = ["eager", pytest.param("triton", marks=KERNELS)]
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def inputs(steps=20, heads=2, groups=1, dim=6, dtype=torch.float32, device="cpu"):
    """Leaves q, k, v, k2, v2 and doc_ids: padding, then two documents."""
    make = torch.Generator().manual_seed(0) if device == "cpu" else None
    shapes = [(1, steps, n, dim) for n in (heads, *[groups] * 4)]
    xs = [torch.randn(shape, generator=make, device=device).to(dtype).requires_grad_() for shape in shapes]
    ids = torch.arange(steps, device=device).sub(3).div(8, rounding_mode="floor")[None]
    return xs, ids


def gradients(function, xs):
    """The value of a function of q, k, v, k2, v2 and its five gradients."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    loss = function(*xs)
    return loss.detach(), *torch.autograd.grad(loss, xs)


def same(mine, other, **tolerance):
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance or {"rtol": 0, "atol": 0})


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators(dtype, form):
    xs, ids = inputs(dtype=dtype)
    opcheck(xs, ids if form == "determinant" else None, form, "eager")


@KERNELS
def test_operators_of_the_kernels():
    opcheck(*inputs(steps=6), "determinant", "triton")


def opcheck(xs, ids, form, impl):
    """Forward through autograd, and the backward operator, which has no gradient of its own."""
    settings = (7, 3, form, 0.4, 0.1, 1.0, ids, impl)
    torch.library.opcheck(api._two_simplicial, (*xs, *settings), test_utils=OPCHECKS)
    xs = [x.detach() for x in xs]
    out, lse = api._two_simplicial(*xs, *settings)
    saved = (torch.ones_like(out), torch.zeros_like(lse), *xs, out, lse)
    torch.library.opcheck(api._two_simplicial_backward, (*saved, *settings), test_utils=OPCHECKS)


@KERNELS
def test_backward_is_the_implementation_of_the_forward(monkeypatch):
    backend, ran = api._backend, []
    monkeypatch.setattr(api, "_backend", lambda impl: ran.append(impl) or backend(impl))
    xs, ids = inputs(steps=4)
    for impl in ("eager", "triton"):
        gradients(lambda *xs, impl=impl: two_simplicial_attention(*xs, doc_ids=ids, impl=impl).sum(), xs)
    assert ran == ["eager", "eager", "triton", "triton"]


@pytest.fixture
def no_kernel(monkeypatch):
    """No implementation may run."""
    monkeypatch.setattr(api, "_backend", lambda impl: pytest.fail(f"{impl} ran"))


@pytest.mark.parametrize(
    ("impl", "device", "dtype"),
    [
        *(("eager", device, dtype) for device in ("cpu", "meta") for dtype in (torch.float32, torch.bfloat16)),
        pytest.param("triton", "cpu", torch.float32, marks=KERNELS),
        pytest.param("triton", "cpu", torch.float16, marks=KERNELS),
    ],
)
def test_fake_tensors(no_kernel, impl, device, dtype):
    with FakeTensorMode():
        xs, ids = inputs(200_000, 4, 2, 64, dtype, device)  # working on it would take minutes
        out, lse = two_simplicial_attention(*xs, doc_ids=ids, return_lse=True, impl=impl)
        grads = torch.autograd.grad(out.sum() + lse.sum(), xs)
    assert (out.shape, out.dtype, out.device.type) == ((1, 200_000, 4, 64), dtype, device)
    assert (lse.shape, lse.dtype, lse.device.type) == ((1, 200_000, 4), torch.float32, device)
    for x, grad in zip(xs, grads, strict=True):
        assert (grad.shape, grad.dtype, grad.device.type) == (x.shape, dtype, device) and grad.is_contiguous()


def test_flops_are_counted_without_a_kernel(no_kernel):
    fake = FakeTensorMode()
    with fake, FlopCounterMode(display=False) as forward:
        xs, _ = inputs(2048, 64, 8, 128, torch.bfloat16)
        out = two_simplicial_attention(*xs, window=(512, 32))
    with fake, FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.sum(), xs)
    pairs = flops.visible_pairs(2048, (512, 32))
    assert forward.get_total_flops() == 4 * 128 * 64 * pairs
    assert backward.get_total_flops() == 12 * 128 * 64 * pairs


def compiler_missing():
    """inductor writes C++ for a CPU."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler() is None
    except Exception:  # whatever it raises where it finds none
        return True


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_compiles_to_one_graph(unchecked, impl, documents):
    compare_compiled(unchecked, "aot_eager", impl, documents)


@pytest.mark.skipif(compiler_missing(), reason="needs a C++ compiler")
def test_compiles_with_inductor(unchecked):
    compare_compiled(unchecked, "inductor", "eager", documents=True)


def compare_compiled(unchecked, backend, impl, documents):
    """Forward and gradients, with elementwise operations on both sides to fuse."""
    torch.compiler.reset()
    xs, ids = inputs(steps=9 if impl == "triton" else 40)
    op = unchecked(two_simplicial_attention)

    def loss(q, *others):
        settings = {"window": (9, 4), "form": "determinant", "doc_ids": ids if documents else None, "impl": impl}
        return op(q.sin(), *others, **settings).square().sum()

    same(gradients(torch.compile(loss, fullgraph=True, backend=backend), xs), gradients(loss, xs), rtol=1e-5, atol=1e-6)


def test_a_new_length_does_not_break_the_graph(unchecked):
    torch.compiler.reset()
    op = unchecked(two_simplicial_attention)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps in (12, 17, 25):
        xs, ids = inputs(steps)
        same([compiled(*xs, window=(9, 4), doc_ids=ids)], [op(*xs, window=(9, 4), doc_ids=ids)])


@pytest.mark.parametrize("impl", IMPLS)
def test_checkpointing_changes_no_bit(impl):
    xs, ids = inputs(steps=9 if impl == "triton" else 40)

    def block(*xs):
        return two_simplicial_attention(*(x.tanh() for x in xs), window=(9, 4), doc_ids=ids, impl=impl)

    again = gradients(lambda *xs: checkpoint(block, *xs, use_reentrant=False).square().sum(), xs)
    same(again, gradients(lambda *xs: block(*xs).square().sum(), xs))


def test_sharded_over_two_processes(tmp_path):
    """FSDP2 gathers the layer's weights and scatters its gradients: those of the whole batch in one process."""
    program = Path(__file__).with_name("sharded_layer.py")
    ranks = [subprocess.Popen([sys.executable, program, str(rank), "2", tmp_path]) for rank in range(2)]
    spec = importlib.util.spec_from_file_location("sharded_layer", program)
    assert spec is not None and spec.loader is not None
    sharded_layer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sharded_layer)
    whole = sharded_layer.layer()
    loss = sharded_layer.loss_of(whole)
    loss.backward()
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
    for name, tolerance in (("same", 1e-12), ("bfloat16", 3e-2)):
        mean, grads = torch.load(tmp_path / f"{name}.pt")
        assert (mean - loss).abs() <= tolerance * loss, name
        for parameter, x in whole.named_parameters():
            assert (grads.pop(parameter) - x.grad).norm() <= tolerance * x.grad.norm(), (name, parameter)
        assert not grads
