"""What the squared-ReLU function takes and says: dtypes, statistics, bad input, and which implementation runs."""

import pytest
import torch

from ops.sparse24_cases import IMPLS, distance, inputs, run, same, selected_by_hand
from sidlm.ops import IMPLEMENTATIONS, dispatch, select_2to4, squared_relu_ffn
from sidlm.ops.sparse24 import api, autograd, eager
from sidlm.ops.sparse24.recipe import Recipe, dense_count


def test_enabled_must_not_change_before_the_backward_pass():
    *leaves, g = inputs(7, 24)
    enabled = torch.tensor(False)
    out = squared_relu_ffn(*(t.requires_grad_() for t in leaves), sparsity="2:4", enabled=enabled)
    enabled.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(g)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_leading_axes(precision, impl):
    x, w_up, w_down, _ = inputs(24, dtype=torch.float32)
    settings = {"sparsity": "2:4", "precision": precision, "impl": impl}
    flat = squared_relu_ffn(x, w_up, w_down, **settings)
    for shape in ((2, 3, 4), (24, 1), (2, 0, 5)):
        some = x[: 0 if 0 in shape else 24].view(*shape, 20)
        out = squared_relu_ffn(some, w_up, w_down, **settings)
        assert out.shape == (*shape, 12) and torch.equal(out.flatten(0, -2), flat[: out.numel() // 12])
    assert distance(squared_relu_ffn(x[5], w_up, w_down, **settings), flat[5]) < 1e-6
    turned = x.T.contiguous().T  # other strides
    assert torch.equal(squared_relu_ffn(turned, w_up, w_down, **settings), flat)


@pytest.mark.parametrize("impl", IMPLS)
def test_precision_casts(impl):
    """Any dtypes go in, their own come out, and what is computed is bf16."""
    tensors = inputs(7, 24, dtype=torch.bfloat16)
    for precision in ("bf16", "fp8"):
        settings = {"sparsity": "2:4", "precision": precision, "impl": impl}
        expected = run(tensors, **settings)
        for dtype in (torch.float64, torch.float32):
            found = run([t.to(dtype) for t in tensors], **settings)
            assert all(t.dtype == dtype for t in found)
            same([t.bfloat16() for t in found], expected)
        x, w_up, w_down, g = tensors
        mixed = run([x, w_up.float(), w_down.double(), g], **settings)
        assert [t.dtype for t in mixed] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64]
        same([t.bfloat16() for t in mixed], expected)
    same(run(tensors, sparsity="2:4", precision="bf16", impl=impl), run(tensors, sparsity="2:4", impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_like_linear(impl):
    x, w_up, w_down, g = inputs(7, 24, dtype=torch.float32)
    expected = run([t.bfloat16() for t in (x, w_up, w_down, g)], sparsity="2:4", impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward pass too: its own products are not cast
        found = run([x, w_up.bfloat16(), w_down, g.bfloat16()], sparsity="2:4", impl=impl)
        exact = run([t.double() for t in (x, w_up, w_down, g)], sparsity="2:4", impl=impl)
        eights = run([x, w_up, w_down, g.bfloat16()], sparsity="2:4", precision="fp8", impl=impl)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.bfloat16, torch.float32]
    same([t.bfloat16() for t in found], expected)
    same(exact, run([t.double() for t in (x, w_up, w_down, g)], sparsity="2:4", impl=impl))
    tensors = [t.bfloat16() for t in (x, w_up, w_down, g)]
    same([t.bfloat16() for t in eights], run(tensors, sparsity="2:4", precision="fp8", impl=impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_autocast_does_not_reach_inside(precision, impl):
    """What is computed in bf16 stays so where autocast has another dtype, which would round differently."""
    x, w_up, w_down, g = inputs(31, 72, dtype=torch.float32)
    settings = {"sparsity": "2:4", "precision": precision, "impl": impl}
    expected = run([x, w_up, w_down, g.half().float()], **settings)
    with torch.autocast("cpu", dtype=torch.float16):
        out, *grads = run([x, w_up, w_down, g.half()], **settings)
    assert out.dtype == torch.float16
    same([out.float(), *grads], [expected[0].half().float(), *expected[1:]])


def stats_by_hand(tensors, dense_features=0.05):
    x, w_up, w_down, g = tensors
    y1 = x @ w_up.T
    mask = select_2to4(y1)
    counts = ((y1 > 0) & mask).sum(0)
    order = counts.argsort(stable=True)
    dense = order[len(order) - dense_count(len(order), dense_features) :].tolist()
    perm = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist()
    sparse = [f for f in range(len(w_up)) if f not in dense]
    shares = [1 - (y1 > 0).double().mean().item(), ((y1 > 0) & ~mask).sum().item() / (y1 > 0).sum().item()]
    act, dact = y1.relu().square() * mask, 2 * y1.relu() * mask * (g @ w_down)
    for left, key in ((act, lambda value: value), (dact, abs)):
        before = left[:, sparse].count_nonzero().item()
        after = selected_by_hand(left, dense, perm, key)[:, sparse].count_nonzero().item()
        shares.append(1 - after / before)
    return [*shares, min(counts[dense].tolist()) / len(x)]


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics(impl):
    tensors = inputs(15, 136)
    *leaves, g = [t.clone() for t in tensors]
    given = torch.zeros(5)
    settings = {"sparsity": "2:4", "impl": impl}
    for more in ({}, {"stats": given}):
        out, stats = squared_relu_ffn(*(t.requires_grad_() for t in leaves), return_stats=True, **settings, **more)
        assert not stats.requires_grad and (stats is given) == bool(more)
        expected = torch.tensor(stats_by_hand(tensors))
        torch.testing.assert_close(stats[[0, 1, 4]], expected[[0, 1, 4]])
        assert stats[2:4].isnan().all()
        for _ in range(2):
            out.backward(g, retain_graph=True)
            torch.testing.assert_close(stats, expected)
    given.zero_()
    assert isinstance(squared_relu_ffn(*leaves, stats=given, **settings), torch.Tensor)
    torch.testing.assert_close(given[:2], expected[:2])
    _, stats = squared_relu_ffn(*leaves, return_stats=True, dense_features=0.0, **settings)
    assert stats[4].isnan() and stats[1] == expected[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_without_sparsity(impl):
    *leaves, g = tensors = inputs(15, 136)
    leaves[0][3] = 0  # whose pre-activations are 0, not active
    zeros = stats_by_hand(tensors)[0]
    for settings in ({}, {"sparsity": "2:4", "enabled": torch.tensor(False)}):
        out, stats = squared_relu_ffn(*(t.requires_grad_() for t in leaves), return_stats=True, impl=impl, **settings)
        assert stats[2:4].isnan().all()
        out.backward(g)
        torch.testing.assert_close(stats, torch.tensor([zeros, 0, 0, 0, torch.nan]), equal_nan=True)
    w_up = -leaves[1].detach().abs()
    _, stats = squared_relu_ffn(leaves[0].abs(), w_up, leaves[2], sparsity="2:4", return_stats=True, impl=impl)
    assert stats[0] == 1 and stats[1] == 0  # of none, none is dropped
    out, stats = squared_relu_ffn(leaves[0][:0], *leaves[1:], sparsity="2:4", return_stats=True, impl=impl)
    assert stats.isnan().all()
    out.sum().backward()
    assert (stats[2:4] == 0).all()


@pytest.mark.parametrize("impl", [None, *IMPLS])
def test_bad_input_is_named(impl, unchecked):
    """In the same words whatever would have run."""
    x, w_up, w_down, _ = inputs(6, 24, dtype=torch.float32)

    def fails(message, *tensors, **settings):
        tensors = (*tensors, *(x, w_up, w_down)[len(tensors) :])
        with pytest.raises(ValueError) as caught:
            unchecked(squared_relu_ffn)(*tensors, impl=impl, **settings)
        assert str(caught.value) == message

    fails("x must be (..., d), got shape ()", x.sum())
    fails("w_up must be (F, d), got shape (24,)", x, w_up[:, 0])
    fails("w_down must be (d_out, F), got shape (2, 6, 24)", x, w_up, w_down.view(2, 6, 24))
    fails("w_up has d 19, but x has 20", x, w_up[:, 1:])
    fails("w_down has F 16, but w_up has 24", x, w_up, w_down[:, 8:])
    fails("w_up is torch.float64, but x is torch.float32", x, w_up.double())
    fails("w_down is torch.bfloat16, but x is torch.float32", x, w_up, w_down.bfloat16())
    fails("x is torch.int64, but must be of a floating-point type", x.long())
    fails("w_up is torch.int64, but must be of a floating-point type", x, w_up.long(), precision="fp8")
    fails("w_down is on meta, but x is on cpu", x, w_up, w_down.to("meta"))
    fails("sparsity is '1:4', but must be one of None, '2:4'", sparsity="1:4")
    fails("precision is 'fp4', but must be one of None, 'bf16', 'fp8'", precision="fp4")
    message = "2:4 sparsity takes F a multiple of 8, but w_up has F 20"
    fails(message, x, w_up[:20], w_down[:, :20], sparsity="2:4")
    for share in (-0.1, 1.5, float("nan")):
        fails(f"dense_features is {share}, but must be a share, from 0 to 1", dense_features=share)
    wanted = "but must be torch.bool of shape () on cpu"
    fails(f"enabled is torch.bool of shape (1,) on cpu, {wanted}", enabled=torch.tensor([True]))
    fails(f"enabled is torch.int64 of shape () on cpu, {wanted}", enabled=torch.tensor(1))
    fails(f"enabled is torch.bool of shape () on meta, {wanted}", enabled=torch.tensor(True, device="meta"))
    wanted = "but must be torch.float32 of shape (5,) on cpu"
    fails(f"stats is torch.float32 of shape (4,) on cpu, {wanted}", stats=torch.zeros(4))
    fails(f"stats is torch.float64 of shape (5,) on cpu, {wanted}", stats=torch.zeros(5).double())
    fails(f"stats is torch.float32 of shape (5,) on meta, {wanted}", stats=torch.zeros(5, device="meta"))


def test_odd_widths_are_fine_without_sparsity():
    x, w_up, w_down, _ = inputs(6, 24)
    assert squared_relu_ffn(x, w_up[:19], w_down[:, :19], precision="fp8").shape == (6, 12)


def test_on_a_cpu_there_are_no_kernels():
    rows = {row.impl: row for row in dispatch.table("cpu") if row.op == "squared_relu_ffn"}
    assert list(rows) == ["triton", "eager", "reference"]
    assert not rows["triton"].usable and rows["triton"].reason == "needs a CUDA device"
    assert rows["eager"].reason == "default" and rows["reference"].reason == "on request"
    tensors = inputs(6, 24)[:3]
    with pytest.raises(ValueError, match="implementation 'triton' cannot run here: needs a CUDA device"):
        squared_relu_ffn(*tensors, impl="triton")
    with pytest.raises(ValueError, match="no implementation 'cuda'; there are triton, eager, reference"):
        squared_relu_ffn(*tensors, impl="cuda")


@pytest.fixture
def kernels(monkeypatch):
    """A stand-in for the kernels, which a CPU takes: the steps of eager, and a list of what was asked for."""
    import sys
    from types import ModuleType

    asked, module = [], ModuleType("gpu")
    module.__dict__["steps"] = lambda: asked.append("triton") or eager.STEPS
    monkeypatch.setitem(sys.modules, "sidlm.ops.sparse24.gpu", module)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return asked


def test_what_runs_on_a_gpu(kernels):
    cuda = torch.device("cuda")
    sparse = Recipe(True, False, 0.05, True, True)
    for dtype in (torch.bfloat16, torch.float16):
        assert api.choose(None, cuda, dtype, sparse) == "triton"
        assert api.choose(None, cuda, dtype, sparse._replace(sparse=False, reuse_mask=False)) == "triton"
        assert api.choose(None, cuda, dtype, sparse._replace(reuse_mask=False)) == "eager"
        assert api.choose("reference", cuda, dtype, sparse) == "reference"
    assert api.choose(None, cuda, torch.float32, sparse) == "eager"
    with pytest.raises(ValueError, match="impl is 'triton', but reuse_mask=False takes 'eager' or 'reference'"):
        api.choose("triton", cuda, torch.bfloat16, sparse._replace(reuse_mask=False))
    reason = "the kernels take bfloat16 and float16, not torch.float32"
    with pytest.raises(ValueError, match=f"'triton' cannot run here: {reason}"):
        api.choose("triton", cuda, torch.float32, sparse)


def test_kernels_that_cannot_be_imported_say_why(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sidlm.ops.sparse24.gpu", None)
    reason = IMPLEMENTATIONS["squared_relu_ffn"]["triton"].why_not(torch.device("cuda"), torch.bfloat16)
    assert reason is not None and "sidlm.ops.sparse24.gpu" in reason


def test_forward_and_backward_pass_are_of_one_implementation(kernels, monkeypatch):
    impls = IMPLEMENTATIONS["squared_relu_ffn"]
    here = impls["triton"]._replace(why_not=lambda device, dtype: None)
    monkeypatch.setitem(impls, "triton", here)
    tensors = inputs(7, 24)
    same(run(tensors, sparsity="2:4", impl="triton"), run(tensors, sparsity="2:4", impl="eager"))
    assert set(kernels) == {"triton"}
    assert autograd.MODULES.keys() == {"triton", "eager"}
