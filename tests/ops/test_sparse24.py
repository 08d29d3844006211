"""The squared-ReLU function with 2:4 sparsity: its value, its gradients and what they do at the edges."""

import pytest
import torch
import torch.nn.functional as F

from ops.sparse24_cases import IMPLS, NAMES, differentiated, distance, inputs, run, same, selected_by_hand
from sidlm.ops import select_2to4
from sidlm.ops.sparse24 import eager, reference
from sidlm.ops.sparse24.recipe import dense_count

FORMS = [{"sparsity": s, "precision": p} for s in (None, "2:4") for p in (None, "bf16", "fp8")]
ABLATIONS = [{}, {"dense_features": 0.0}, {"dense_features": 0.4}, {"permute_tokens": False}, {"reuse_mask": False}]
CASES = [(f, a) for f in FORMS for a in (ABLATIONS if f["sparsity"] else [{}])]
UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, "fp8": 2.0**-4}


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
