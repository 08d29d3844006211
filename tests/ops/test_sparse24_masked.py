"""What runs where sparse products do not pay: kernels that mask and do not pack, in Triton's interpreter.

Bit for bit against the oracle of the kernels that pack: with and without packing the function is one. bfloat16 and the
inline PTX are left to the GPU tests (test_sparse24_cuda.py).
"""

import os
from itertools import product

import pytest
import torch

from ops.sparse24_interpreter import poison_memory, run_ptx, use_casts_of_torch
from ops.sparse24_oracle import activation, columns, gradient, rounded, same, special, tensors, transposed
from sidlm.ops import squared_relu_ffn
from sidlm.ops.sparse24 import api, backends, crossover, recipe
from sidlm.ops.sparse24.packed import Packed, unpack

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)", allow_module_level=True)

from triton.runtime import interpreter

from sidlm.ops.sparse24 import gpu, triton_features, triton_masked, triton_split, triton_thin, triton_transpose

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on the way to a masked value
NONE = torch.empty(0, 0, dtype=torch.uint8)
MODES = list(product([torch.float32, torch.float16], [False, True]))
SIZES = [(T, F, *mode) for (T, F), mode in product([(1, 8), (3, 200), (17, 24)], MODES)]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    use_casts_of_torch(monkeypatch, interpreter)
    poison_memory(monkeypatch)


def whole(p: Packed) -> Packed:
    """The same matrix, not packed."""
    return Packed(unpack(p._replace(values=p.values.float(), scale=None)).to(p.values.dtype), NONE, p.scale)


def check(y1, dy2, fp8):
    T, F = y1.shape
    act, counts, totals = activation(y1, fp8)
    dact = gradient(dy2, act, fp8)
    out, scale, found, positive = triton_masked.activation(y1.clone(), fp8)
    if fp8:  # of a token that is not finite all is NaN, and not only what is kept
        good = act.scale.isfinite()
        assert out[~good].float().isnan().all() and torch.equal(scale.isfinite(), good)
        same((out[good], scale[good]), (whole(act).values[good], act.scale[good]), "activation")
    else:
        same((out,), (whole(act).values,), "activation")
    assert positive[0] == totals[0]
    assert fp8 or (torch.equal(found, counts) and torch.equal(positive, totals))
    out, scale = triton_masked.gradient(dy2.clone(), whole(act).values, act.scale)
    # 0 where nothing is kept, but for the sign, and NaN there, too, where dy2 is not finite
    finite = dy2.isfinite().all(1) & unpack(dact).isfinite().all(1)
    assert torch.equal(out[finite].float() + 0.0, whole(dact).values[finite].float() + 0.0)
    assert fp8 == (scale is not None) and (not fp8 or torch.equal(scale[finite], dact.scale[finite]))
    assert not out[~finite].float().isfinite().all(1).any()
    make = torch.Generator().manual_seed(1)
    perm = torch.randperm(T, generator=make)
    order = torch.randperm(F, generator=make)
    sparse, dense = order[: F - F // 4].sort().values, order[F - F // 4 :].sort().values
    for p, by in ((act, "value"), (dact, "magnitude")):
        largest = unpack(p).abs().amax(0)
        kept, totals = transposed(p, sparse, perm, -(-T // 16) * 16, by, fp8)
        want = torch.zeros(F, kept.values.shape[1] * 2)
        want[sparse] = unpack(kept._replace(values=kept.values.float(), scale=None))
        rest, rest_scale = rounded(columns(unpack(p), dense, perm, want.shape[1]), y1.dtype, fp8)
        want[dense] = rest.float()
        is_dense = torch.zeros(F, dtype=torch.uint8).index_fill_(0, dense, 1)
        if not fp8:
            out, scale, found = triton_thin.thinned(p, is_dense, perm, by)
            assert scale is None and out.dtype == p.values.dtype
            same((out[perm].T.contiguous().float(),), (want[:, :T].contiguous(),), f"thin by {by}")
            assert torch.equal(found, totals)
            continue
        forms = [(p, "plain"), (whole(p), None)]
        if not p.scale.isfinite().all():
            forms.pop()  # all features have NaN
        for given, layout in forms:
            count, top = triton_features.of_features(given, layout)
            assert torch.equal(count, (unpack(p) > 0).sum(0).int())
            assert torch.equal(top.view(torch.float32).nan_to_num(-1.0), largest.nan_to_num(-1.0))
        out, scale, found = triton_thin.thinned(p, is_dense, perm, by, bits=top)
        scales = torch.empty(F)
        scales[sparse], scales[dense] = kept.scale, rest_scale
        good = scales.isfinite()
        assert torch.equal(scale.isfinite(), good) and out[~good].float().isnan().all()
        same((out[good].float(), scale[good]), (want[good], scales[good]), f"thin by {by}")
        assert torch.equal(found, totals)
        if len(forms) == 2:
            turned = triton_transpose.transpose_rows(given.values, perm, want.shape[1], True, p.scale, top)
            same(turned, rounded(columns(unpack(p), torch.arange(F), perm, want.shape[1]), y1.dtype, True), "turned")


@pytest.mark.parametrize(("T", "F", "dtype", "fp8"), SIZES)
def test_equals_the_oracle(T, F, dtype, fp8):
    check(*tensors(T, F, dtype), fp8)


@pytest.mark.parametrize(("dtype", "fp8"), MODES)
def test_special_values(dtype, fp8):
    check(*special(dtype), fp8)


@pytest.mark.parametrize("fp8", [False, True])
def test_many_chunks_strips_and_steps(monkeypatch, fp8):
    monkeypatch.setattr(triton_masked, "TILE", 32)
    monkeypatch.setattr(triton_masked, "whole_rows", lambda F: (32, 1))
    monkeypatch.setattr(triton_masked, "PROGRAMS", 12)
    monkeypatch.setattr(triton_features, "PROGRAMS", 1)
    check(*tensors(36, 72, torch.float32, seed=5, zeros=0.3), fp8)


def test_sixteen_bits_take_the_place_of_what_they_are_made_of():
    y1, dy2 = tensors(6, 16, torch.float32)
    assert triton_masked.activation(y1, False)[0] is y1
    assert triton_masked.gradient(dy2, y1, None)[0] is dy2
    out, _, counts, totals = triton_masked.activation(*tensors(6, 16, torch.float32)[:1], False, count=False)
    assert not counts.any() and not totals.any() and torch.equal(out, y1)


@pytest.mark.parametrize("tokens", [1, 3, 5000])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("features", [8, 200, 1000])
def test_split(features, share, tokens, monkeypatch):
    monkeypatch.setattr(triton_split, "SEGMENT", 128)
    make = torch.Generator().manual_seed(features + tokens)
    counts = torch.randint(0, tokens + 1, (features,), generator=make).int()
    for given in (counts, counts // 2 * 2, torch.zeros_like(counts), torch.full_like(counts, tokens)):
        mine, theirs = triton_split.split(given, share, tokens), recipe.split(given, share)
        for a, b in zip(mine[:2], theirs[:2], strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert torch.equal(mine.is_dense.nonzero().flatten(), theirs.dense)


# the whole function


@pytest.fixture
def here(monkeypatch):
    """The kernels on this machine, with the dense backend under the name of another; (crossover of activations, of
    weights) -> None."""

    def set_crossovers(activations, weights):
        sizes = activations, activations, weights
        table = tuple(crossover.Crossover("cpu", fp8, 64, 16, *sizes) for fp8 in (False, True))
        monkeypatch.setattr(crossover, "TABLE", table)
        for cached in (gpu._preferred, backends._choose):
            cached.cache_clear()

    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda *args: "plainly" if choose(*args) == "dense" else choose(*args))
    monkeypatch.setitem(backends.BACKENDS, "plainly", backends.BACKENDS["dense"])
    chosen = api.IMPLEMENTATIONS["triton"]._replace(why_not=lambda device, dtype: None)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "triton", chosen)
    monkeypatch.delenv("SID_IMPL", raising=False)
    yield set_crossovers
    for cached in (gpu._preferred, backends._choose):
        cached.cache_clear()


def layer(tokens, features, d=16, dtype=torch.float16):
    make = torch.Generator().manual_seed(0)
    shapes = ((tokens, d), (features, d), (2 * d, features))
    inputs = [torch.randn(s, generator=make).mul(0.5).to(dtype).requires_grad_() for s in shapes]
    return inputs, torch.randn(tokens, 2 * d, generator=make).to(dtype)


def run(inputs, grad, dense_features=0.3, **settings):
    settings |= {"dense_features": dense_features, "return_stats": True}
    out, stats = squared_relu_ffn(*inputs, sparsity="2:4", **settings)
    grads = torch.autograd.grad(out, inputs, grad)
    return out.detach(), *grads, stats


@pytest.mark.parametrize("precision", [None, "fp8"])
@pytest.mark.parametrize("features", [64, 72])
def test_the_function_does_not_change_with_the_number_of_tokens(here, features, precision):
    """But where nothing is packed the weights' gradients are exact: all features are dense."""
    inputs, grad = layer(21, features, dtype=torch.float16 if precision is None else torch.bfloat16)
    selected, exact = (run(inputs, grad, share, impl="eager", precision=precision) for share in (0.3, 1.0))
    results, forms = [], []
    for crossovers in ((0, 0), (0, 100), (100, 100)):
        here(*crossovers)
        *mine, packed = run_and_look(inputs, grad, precision=precision)
        forms.append(packed)
        results.append(mine)
    assert forms == ([True, True, False] if features % 64 == 0 else [False] * 3)
    for mine, packed in zip(results, forms, strict=True):
        *mine, stats = mine
        *want, want_stats = selected if packed else exact
        for a, b in zip(mine, want, strict=True):
            assert a.stride() == b.stride() and a.dtype == b.dtype
            rounding = 4e-3 if precision is None else 4e-2
            torch.testing.assert_close(a.float(), b.float(), rtol=rounding, atol=rounding * b.abs().max().item())
        torch.testing.assert_close(stats[:4], want_stats[:4], rtol=4e-3, atol=4e-3)


def test_e4m3_is_turned_in_two_steps_where_the_kernel_is_wrong(here, monkeypatch):
    here(100, 100)
    inputs, grad = layer(21, 64, dtype=torch.bfloat16)
    assert gpu._turns(torch.device("cpu"))
    both = [run(inputs, grad, impl="triton", precision="fp8")]
    turn = triton_transpose.transpose_rows

    def wrong(x, *args):
        out, scale = turn(x, *args)
        return (out.float().flip(1).to(out.dtype), scale) if x.dtype == out.dtype else (out, scale)

    monkeypatch.setattr(triton_transpose, "transpose_rows", wrong)
    gpu._turns.cache_clear()
    assert not gpu._turns(torch.device("cpu"))
    both.append(run(inputs, grad, impl="triton", precision="fp8"))
    gpu._turns.cache_clear()
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


def run_and_look(inputs, grad, **settings):
    """`run`, and at last whether activations were packed."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        results = run(inputs, grad, impl="triton", **settings)
    features = len(inputs[1])
    return *results, not any(t.shape == (len(inputs[0]), features) for t in kept)


@pytest.mark.parametrize("crossovers", [(0, 0), (0, 100), (100, 100)])
def test_what_is_kept_has_the_shapes_that_were_said(here, crossovers):
    here(*crossovers)
    for fp8 in (False, True):
        act, counts, totals = gpu.pack_activation(torch.randn(37, 128).half(), fp8)
        said = gpu.empty_packed(37, 128, torch.float16, torch.device("cpu"), fp8)
        assert [x if x is None else (x.shape, x.dtype, x.stride()) for x in act] == [
            x if x is None else (x.shape, x.dtype, x.stride()) for x in said
        ]
        assert counts.shape == (128,) and totals.shape == (2,)


def gradients_of(op, given, compiled=lambda function: function):
    """Nothing but the operator, for which inductor writes no C++."""
    function, (inputs, grad) = compiled(lambda *xs: op(*xs, sparsity="2:4", impl="triton")), given
    return function, torch.autograd.grad(function(*inputs), inputs, grad)


def test_a_graph_on_disk_is_of_one_choice_of_packed_or_not(here, unchecked, tmp_path):
    """Inductor's cache outlives a process; what is kept has other shapes where crossovers or SID_IMPL say so."""
    from torch._inductor.utils import fresh_cache

    op, given = unchecked(squared_relu_ffn), layer(37, 128)
    with fresh_cache(dir=str(tmp_path)):
        for crossovers in ((0, 1 << 62), (1 << 62, 1 << 62)):
            here(*crossovers)
            torch.compiler.reset()
            _, expected = gradients_of(op, given)
            _, found = gradients_of(op, given, torch.compile)
            for mine, other in zip(found, expected, strict=True):
                assert torch.equal(mine, other)


def test_a_call_that_was_compiled_for_another_choice_says_so(here, unchecked):
    op, given = unchecked(squared_relu_ffn), layer(37, 128)
    torch.compiler.reset()
    here(0, 1 << 62)
    compiled, _ = gradients_of(op, given, lambda function: torch.compile(function, backend="aot_eager"))
    here(1 << 62, 1 << 62)
    with pytest.raises(RuntimeError, match="compile it again"):
        compiled(*given[0])


def test_without_statistics_and_gradients_nothing_is_counted(here):
    here(100, 100)
    inputs, _ = layer(37, 128)
    with torch.no_grad():
        mine, eager = (squared_relu_ffn(*inputs, sparsity="2:4", impl=impl) for impl in ("triton", "eager"))
    torch.testing.assert_close(mine, eager, rtol=4e-3, atol=4e-3 * eager.abs().max().item())


def test_shapes_are_asked_for_of_fake_tensors_without_trying_a_backend_on_them(here, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    tried = []
    monkeypatch.setattr(
        backends, "choose", lambda device, *_: tried.append(torch.zeros(1, device=device)) or "cusparselt"
    )
    here(100, 100)
    with FakeTensorMode():
        few, many = (gpu.empty_packed(T, 128, torch.float16, torch.device("cpu"), False) for T in (37, 370))
    assert few.values.shape == (37, 128) and many.values.shape == (384, 72)
    assert len(tried) == 1 and not isinstance(tried[0], FakeTensor)


# what sm_90 runs for e4m3, its PTX by numpy


def same_but_for_signs_of_zeros(mine, expected):
    assert torch.equal(mine.float() + 0.0, expected.float() + 0.0)


@pytest.mark.parametrize(("T", "F"), [(40, 72), (257, 136)])
def test_by_words(T, F, monkeypatch):
    run_ptx(monkeypatch, interpreter)
    for module in (triton_features, triton_thin, triton_transpose):
        monkeypatch.setattr(module, "in_pairs", lambda arch, dtype: True)
    y1, dy2 = tensors(T, F, torch.float32, seed=2)
    y1 *= torch.exp2(torch.arange(T) % 7 - 3.0)[:, None]
    act, counts, _ = activation(y1, True)
    dact = gradient(dy2, act, True)
    make = torch.Generator().manual_seed(1)
    perm, order = torch.randperm(T, generator=make), torch.randperm(F, generator=make)
    sparse, dense = order[: F - F // 4].sort().values, order[F - F // 4 :].sort().values
    is_dense = torch.zeros(F, dtype=torch.uint8).index_fill_(0, dense, 1)
    for p, by in ((act, "value"), (dact, "magnitude")):
        found, bits = triton_features.of_features(p, count=by == "value")
        assert torch.equal(bits.view(torch.float32), unpack(p).abs().amax(0))
        assert by == "magnitude" or torch.equal(found, counts)
        length = -(-T // 16) * 16
        want, totals = transposed(p, sparse, perm, length, by, True)
        mine, found = triton_transpose.transpose_pack(p, sparse, perm, length, by, True, bits=bits)
        same((mine, found), (want, totals))
        whole_columns, scale = rounded(columns(unpack(p), dense, perm, length), torch.float32, True)
        out, scales, found = triton_thin.thinned(p, is_dense, perm, by, bits=bits)
        same_but_for_signs_of_zeros(out[dense], whole_columns)
        same_but_for_signs_of_zeros(out[sparse], unpack(want._replace(values=want.values.float(), scale=None)))
        same((scales[dense], scales[sparse], found), (scale, want.scale, totals))
