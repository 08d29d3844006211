"""The squared-ReLU function with 2:4 sparsity: its value, its gradients and what they do at the edges."""

import pytest
import torch
import torch.nn.functional as F

from sidlm.ops import IMPLEMENTATIONS, dispatch, select_2to4, squared_relu_ffn
from sidlm.ops.sparse24 import api, autograd, eager, reference
from sidlm.ops.sparse24.recipe import Recipe, dense_count

IMPLS = ["eager", "reference"]
FORMS = [{"sparsity": s, "precision": p} for s in (None, "2:4") for p in (None, "bf16", "fp8")]
NAMES = ("out", "dx", "dw_up", "dw_down")
ABLATIONS = [{}, {"dense_features": 0.0}, {"dense_features": 0.4}, {"permute_tokens": False}, {"reuse_mask": False}]
CASES = [(f, a) for f in FORMS for a in (ABLATIONS if f["sparsity"] else [{}])]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, "fp8": 2.0**-4}


def inputs(tokens=63, features=200, d=20, d_out=12, dtype=torch.float64, seed=0):
    """x, w_up, w_down and the gradient of the output. Features differ in how often they are active."""
    make = torch.Generator().manual_seed(seed)
    shapes = ((tokens, d), (features, d), (d_out, features), (tokens, d_out))
    x, w_up, w_down, g = (torch.randn(s, generator=make, dtype=torch.float64) for s in shapes)
    x[:, 0] = 1
    w_up[:, 0] = torch.linspace(-4, 4, features, dtype=torch.float64)
    return [t.to(dtype) for t in (x, w_up, w_down, g)]


def run(tensors, **settings):
    """out and the gradients of x, w_up and w_down."""
    *leaves, g = [t.detach().clone() for t in tensors]
    out = squared_relu_ffn(*(t.requires_grad_() for t in leaves), **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def differentiated(function, tensors):
    """The same of any function of the three."""
    *leaves, g = [t.detach().clone() for t in tensors]
    out = function(*(t.requires_grad_() for t in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, g)]


def same(mine, other, names=NAMES, **tolerance):
    for name, a, b in zip(names, mine, other, strict=True):
        torch.testing.assert_close(
            a, b, **{"rtol": 0, "atol": 0, "equal_nan": True, **tolerance}, msg=lambda m, name=name: f"{name}: {m}"
        )


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize(("form", "ablation"), [case for case in CASES if case[0]["precision"] is None], ids=str)
def test_eager_equals_reference_in_float64(form, ablation):
    for tokens, features in ((0, 24), (1, 8), (3, 200), (7, 24), (63, 8), (63, 200)):
        tensors = inputs(tokens, features)
        mine, oracle = (run(tensors, impl=impl, **form, **ablation) for impl in IMPLS)
        same(mine, oracle, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("form", "ablation"), CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_eager_equals_reference_where_sums_are_exact(dtype, form, ablation):
    """Bit for bit: of small integers the order of no sum matters, in float32 and in e4m3."""
    make = torch.Generator().manual_seed(1)
    for tokens, features in ((1, 8), (7, 24), (31, 136)):
        shapes = ((tokens, 8), (features, 8), (6, features), (tokens, 6))
        tensors = [torch.randint(-2, 3, s, generator=make).to(dtype) for s in shapes]
        mine, oracle = (run(tensors, impl=impl, **form, **ablation) for impl in IMPLS)
        assert all(t.isfinite().all() and t.dtype == dtype for t in mine)
        same(mine, oracle)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_eager_equals_reference_within_one_rounding(dtype, form):
    tensors = inputs(dtype=dtype)
    mine, oracle = (run(tensors, impl=impl, **form) for impl in IMPLS)
    for name, a, b in zip(NAMES, mine, oracle, strict=True):
        assert distance(a, b) <= UNIT[dtype], name


def masked_function(mask):
    return lambda x, w_up, w_down: F.linear(F.linear(x, w_up).relu().square() * mask, w_down)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_error_is_a_small_multiple_of_the_formats_own(form, impl):
    """Against float64 with the mask of what was rounded: a tie that rounding makes or breaks is no error."""
    tensors = inputs(dtype=torch.bfloat16)
    fp8 = form["precision"] == "fp8"
    y1 = reference._linear(*tensors[:2], torch.bfloat16, fp8)
    mask = select_2to4(y1) if form["sparsity"] else torch.ones_like(y1)
    exact = differentiated(masked_function(mask.double()), [t.double() for t in tensors])
    found = run(tensors, dense_features=1.0, impl=impl, **form)
    for name, a, b in zip(NAMES, found, exact, strict=True):
        assert distance(a, b) <= 1.5 * (UNIT["fp8"] if fp8 else UNIT[torch.bfloat16]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_dense_form_is_that_of_autograd(impl):
    tensors = inputs()
    plain = differentiated(lambda x, w_up, w_down: F.linear(F.linear(x, w_up).relu().square(), w_down), tensors)
    same(run(tensors, impl=impl), plain, rtol=1e-12, atol=1e-12)
    for dtype in (torch.float16, torch.bfloat16):  # elementwise steps in half precision are those of autograd too
        tensors = inputs(dtype=dtype)
        plain = differentiated(lambda x, w_up, w_down: F.linear(F.linear(x, w_up).relu().square(), w_down), tensors)
        for name, a, b in zip(NAMES, run(tensors, impl=impl), plain, strict=True):
            assert distance(a, b) <= UNIT[dtype], name


@pytest.mark.parametrize("impl", IMPLS)
def test_with_all_features_dense_gradients_are_those_of_the_masked_function(impl):
    """The mask is a constant: nothing else is lost, so plain autograd is right."""
    for tokens, features in ((1, 8), (7, 24), (63, 200)):
        tensors = inputs(tokens, features)
        mask = select_2to4(tensors[0] @ tensors[1].T)
        assert (F.linear(*tensors[:2]) > 0)[~mask].any()
        mine = run(tensors, sparsity="2:4", dense_features=1.0, impl=impl)
        same(mine, differentiated(masked_function(mask), tensors), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_the_forward_mask_gradients_are_those_of_the_dense_function(impl):
    """reuse_mask=False with all features dense: only the output is sparse."""
    tensors = inputs()
    mine = run(tensors, sparsity="2:4", dense_features=1.0, reuse_mask=False, impl=impl)
    dense = run(tensors, impl=impl)
    same(mine[1:], dense[1:], NAMES[1:], rtol=1e-12, atol=1e-12)
    same(mine[:1], run(tensors, sparsity="2:4", impl=impl)[:1], NAMES[:1])


def selected_by_hand(left, dense, perm, key):
    """left (T, F) with two non-zeros in every four tokens of perm, found with loops; not for the dense features."""
    kept = left.clone()
    for f in set(range(left.shape[1])) - set(dense):
        for at in range(0, len(perm), 4):
            group = perm[at : at + 4]
            best = sorted(range(len(group)), key=lambda i: (-key(left[group[i], f].item()), i))[:2]
            for i in set(range(len(group))) - set(best):
                kept[group[i], f] = 0
    return kept


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("settings", [{}, {"dense_features": 0.0}, {"permute_tokens": False}, {"reuse_mask": False}])
def test_selection_along_tokens_by_hand(settings, impl):
    tensors = x, w_up, w_down, g = inputs(31, 96)
    mine = run(tensors, sparsity="2:4", impl=impl, **settings)
    y1 = x @ w_up.T
    mask = select_2to4(y1)
    counts = ((y1 > 0) & mask).sum(0).tolist()
    by_count = sorted(range(96), key=lambda f: (counts[f], f))
    dense = by_count[96 - dense_count(96, settings.get("dense_features", 0.05)) :]
    if not settings:
        assert len(dense) == 64
    perm = torch.randperm(31, generator=torch.Generator().manual_seed(0)).tolist()
    perm = perm if settings.get("permute_tokens", True) else list(range(31))
    seen = mask if settings.get("reuse_mask", True) else torch.ones_like(mask)
    act, dact = y1.relu().square() * seen, 2 * y1.relu() * seen * (g @ w_down)
    act_t = selected_by_hand(act, dense, perm, lambda value: value)
    dact_t = selected_by_hand(dact, dense, perm, abs)
    assert (act_t == 0)[act != 0].any() and (dact_t == 0)[dact != 0].any() and not torch.equal(act_t > 0, dact_t != 0)
    expected = (y1.relu().square() * mask) @ w_down.T, dact @ w_up, dact_t.T @ x, g.T @ act_t
    same(mine, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("permute", [False, True])
def test_what_is_2to4_already_loses_nothing(permute, impl):
    """Pre-activations with two positive ones in every four along both axes: the gradients of the dense function."""
    tokens, features = 32, 200
    t, f = torch.meshgrid(torch.arange(tokens), torch.arange(features), indexing="ij")
    pattern = (t + t // 4 + f) % 4 < 2
    y1 = torch.rand(tokens, features, dtype=torch.float64) * torch.where(pattern, 1.0, -1.0)
    if permute:  # as seen in the order of the tokens
        perm = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
        y1 = torch.empty_like(y1).index_copy_(0, perm, y1)
    make = torch.Generator().manual_seed(0)
    w_down, g = (torch.randn(s, generator=make, dtype=torch.float64) for s in ((12, features), (tokens, 12)))
    tensors = [torch.eye(tokens, dtype=torch.float64), y1.T.contiguous(), w_down, g]
    mine = run(tensors, sparsity="2:4", dense_features=0.0, permute_tokens=permute, impl=impl)
    same(mine, run(tensors, impl=impl), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_powers_of_two_scale_exactly(form, impl):
    """x times s gives out times s^2, and its gradients times s, s^2 and s^2, bit for bit."""
    x, *others = inputs(dtype=torch.bfloat16)
    expected = run([x, *others], impl=impl, **form)
    for s in (2.0**-10, 2.0**10):
        factors = (s * s, s, s * s, s * s)
        same(run([x * s, *others], impl=impl, **form), [e * f for e, f in zip(expected, factors, strict=True)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_any_factor_scales(precision, impl):
    x, *others = inputs(dtype=torch.float32 if precision is None else torch.bfloat16)
    unit = 2.0**-20 if precision is None else UNIT["fp8"]
    settings = {"sparsity": "2:4", "precision": precision, "impl": impl}
    expected = run([x, *others], **settings)
    for s in (1e-3, 1e3):
        found = run([x * s, *others], **settings)
        for name, a, b, f in zip(NAMES, found, expected, (s * s, s, s * s, s * s), strict=True):
            assert distance(a.double() / f, b) <= 2 * unit, name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_active_feature_gives_zeros(form, impl):
    x, w_up, w_down, g = inputs(7, 24, dtype=torch.bfloat16)
    for tensors in ([x * 0, w_up, w_down, g], [x.abs(), -w_up.abs(), w_down, g], [x, w_up * 0, w_down, g]):
        assert all((t == 0).all() for t in run(tensors, impl=impl, **form))
    x[3] = 0
    out, dx, *_ = found = run([x, w_up, w_down, g], impl=impl, **form)
    assert all(t.isfinite().all() for t in found) and (out[3] == 0).all() and (dx[3] == 0).all()
    assert (out[2] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_not_finite_stays_in_its_token(form, bad, impl):
    tensors = inputs(9, 24, dtype=torch.bfloat16)
    clean = run(tensors, impl=impl, **form)
    for where in (0, 3):  # x, and the gradient of the output
        spoilt = [t.clone() for t in tensors]
        spoilt[where][4, 2] = bad
        found = run(spoilt, impl=impl, **form)
        for name, before, after in zip(NAMES[:2], clean, found, strict=False):
            others = torch.arange(9) != 4
            assert torch.equal(before[others], after[others]), name
        spoilt_out = found[0 if where == 0 else 1][4]
        assert not spoilt_out.isfinite().any()
    x = tensors[0].clone()
    x[4] = torch.nan
    assert run([x, *tensors[1:]], impl=impl, **form)[0][4].isnan().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("precision", [None, "fp8"])
def test_the_order_of_tokens_matters_to_weights_only(precision, impl):
    tensors = inputs(dtype=torch.float32)
    settings = {"sparsity": "2:4", "precision": precision, "dense_features": 0.0, "impl": impl}
    one, other = (run(tensors, permute_tokens=permute, **settings) for permute in (True, False))
    same(one[:2], other[:2], NAMES[:2])
    assert all(distance(a, b) > 0.01 for a, b in zip(one[2:], other[2:], strict=True))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ablation", ABLATIONS, ids=str)
@pytest.mark.parametrize("precision", [None, "bf16", "fp8"])
def test_enabled_says_which_form_it_is(precision, ablation, impl):
    tensors = inputs(31, 72, dtype=torch.bfloat16)
    settings = {"precision": precision, "impl": impl, **ablation}
    off = run(tensors, sparsity="2:4", enabled=torch.tensor(False), **settings)
    same(off, run(tensors, **settings))
    on = run(tensors, sparsity="2:4", enabled=torch.tensor(True), **settings)
    same(on, run(tensors, sparsity="2:4", **settings))
    assert distance(on[0], off[0]) > 0.01
    same(run(tensors, enabled=torch.tensor(True), **settings), off)


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


@pytest.mark.parametrize("precision", [None, "fp8"])
def test_padding_of_tokens_changes_nothing(precision, monkeypatch):
    tensors = inputs(7, 24, dtype=torch.float32)
    settings = {"sparsity": "2:4", "precision": precision, "impl": "eager"}
    expected = run(tensors, **settings)
    monkeypatch.setattr(eager, "STEPS", eager.STEPS._replace(token_multiple=64))
    same(run(tensors, **settings), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_may_have_any_strides(form, monkeypatch):
    """Some libraries' are column-major; what leaves the operator is not."""

    def column_major(step):
        return lambda *args: step(*args).T.contiguous().T

    tensors = inputs(7, 24, dtype=torch.bfloat16)
    expected = run(tensors, impl="eager", **form)
    turned = {name: column_major(getattr(eager.STEPS, name)) for name in ("dense_matmul", "sparse_matmul")}
    monkeypatch.setattr(eager, "STEPS", eager.STEPS._replace(**turned))
    found = run(tensors, impl="eager", **form)
    same(found, expected)
    assert all(t.is_contiguous() for t in found)


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
