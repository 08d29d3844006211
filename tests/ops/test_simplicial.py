"""2-simplicial attention: the oracle against the definition written out, every implementation against the oracle."""

import importlib.util
import itertools
import math
import os

import pytest
import torch

from sidlm.ops import IMPLEMENTATIONS, dispatch, two_simplicial_attention
from sidlm.ops.simplicial import api, prepare

NAMES = ("q", "k", "v", "k2", "v2")
INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
IMPLS = ["eager", "reference", pytest.param("triton", marks=KERNELS)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def inputs(batch, steps, heads, groups, dim, *, s1=None, s2=None, docs=0, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = [(steps, heads)] + [(s or steps, groups) for s in (s1, s1, s2, s2)]
    xs = [torch.randn(batch, *shape, dim, generator=make, dtype=torch.float64).to(dtype) for shape in shapes]
    ids = None
    if docs:
        length = max(steps, s1 or 0, s2 or 0)
        ids = torch.randint(-1, docs, (batch, length), generator=make).sort(dim=1).values
    return xs, ids


def run(xs, grad_seed=1, **kwargs):
    """Output, LSE (zero at padding) and the five gradients of a random linear functional of both."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    out, lse = two_simplicial_attention(*xs, return_lse=True, **kwargs)
    make = torch.Generator().manual_seed(grad_seed)
    finite = lse.isfinite()
    lse = lse.masked_fill(~finite, 0.0)
    loss = (out.double() * torch.randn(out.shape, generator=make, dtype=torch.float64)).sum()
    loss = loss + (lse.double() * torch.randn(lse.shape, generator=make, dtype=torch.float64)).sum()
    return out.detach(), lse.detach(), finite, *torch.autograd.grad(loss, xs)


def determinant_by_hand(a, b, c):
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - a[1] * (b[0] * c[2] - b[2] * c[0]) + a[2] * (b[0] * c[1] - b[1] * c[0])


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
def test_oracle_is_the_definition(form):
    """Python loops over every pair and every dimension, no tensor algebra at all."""
    (q, k, v, k2, v2), _ = inputs(1, 5, 2, 1, 4, seed=3)
    w1, w2, b_k2, b_v2 = 3, 2, 0.3, -0.7
    out, lse = two_simplicial_attention(
        q, k, v, k2, v2, window=(w1, w2), form=form, k2_bias=b_k2, v2_bias=b_v2, return_lse=True, impl="reference"
    )
    for i, h in itertools.product(range(5), range(2)):
        weights, values = [], []
        for j, m in itertools.product(range(max(0, i - w1 + 1), i + 1), range(max(0, i - w2 + 1), i + 1)):
            a, b, c = q[0, i, h].tolist(), k[0, j, 0].tolist(), [x + b_k2 for x in k2[0, m, 0].tolist()]
            if form == "trilinear":
                logit = sum(x * y * z for x, y, z in zip(a, b, c, strict=True))
            else:  # one chunk of three, then a plain product over the one dimension left
                logit = determinant_by_hand(a[:3], b[:3], c[:3]) + a[3] * b[3] * c[3]
            weights.append(math.exp(logit / 2.0))  # scale 1/sqrt(4)
            values.append([x * (y + b_v2) for x, y in zip(v[0, j, 0].tolist(), v2[0, m, 0].tolist(), strict=True)])
        total = sum(weights)
        expected = [sum(w * x[d] for w, x in zip(weights, values, strict=True)) / total for d in range(4)]
        torch.testing.assert_close(out[0, i, h], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        assert abs(lse[0, i, h].item() - math.log(total)) < 1e-12


GEOMETRIES = [
    # batch, steps, heads, groups, dim, window, s1, s2, docs
    (2, 37, 4, 2, 7, (9, 4), None, None, 0),
    (1, 63, 3, 3, 60, (20, 5), None, None, 0),
    (2, 70, 4, 2, 8, (4, 9), None, None, 3),
    (2, 150, 2, 1, 6, (70, 5), None, None, 4),
    (1, 130, 2, 1, 6, (300, 200), None, None, 2),
    (1, 90, 8, 1, 5, (33, 3), None, None, 2),
    (2, 5, 2, 1, 6, (30, 20), 17, 11, 3),
    (2, 1, 2, 1, 6, (30, 20), 29, 19, 2),
    (1, 40, 2, 2, 6, (17, 1), 45, 60, 0),
    (2, 3, 2, 1, 6, (1, 1), None, None, 0),
    (1, 1, 1, 1, 3, (512, 32), None, None, 0),
]


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_eager_equals_oracle_in_float64(geometry, form):
    batch, steps, heads, groups, dim, window, s1, s2, docs = geometry
    xs, ids = inputs(batch, steps, heads, groups, dim, s1=s1, s2=s2, docs=docs, seed=GEOMETRIES.index(geometry))
    kwargs = {"window": window, "form": form, "k2_bias": 0.3, "v2_bias": 1.0, "doc_ids": ids}
    for name, mine, oracle in zip(
        ("out", "lse", "finite", *NAMES),
        run(xs, impl="eager", **kwargs),
        run(xs, impl="reference", **kwargs),
        strict=True,
    ):
        torch.testing.assert_close(mine, oracle, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def test_small_budget_splits_heads(monkeypatch):
    """Chunks of heads, within a group and across groups, are only a matter of memory."""
    from sidlm.ops.simplicial import eager

    xs, ids = inputs(2, 40, 4, 2, 6, docs=2)
    whole = run(xs, window=(16, 4), doc_ids=ids, impl="eager")
    for budget in (1, 16 * 4 * 31 * 2):
        monkeypatch.setitem(eager.BUDGET, "cpu", budget)
        for mine, other in zip(run(xs, window=(16, 4), doc_ids=ids, impl="eager"), whole, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_a_small_multiple_of_the_dtypes_own(dtype):
    """Against float64 on the same rounded inputs, at most twice the error of the oracle run in that dtype by torch."""
    xs, _ = inputs(2, 48, 4, 2, 32, seed=11)
    xs = [x.to(dtype) for x in xs]
    exact = run([x.double() for x in xs], window=(24, 6), impl="reference")
    oracle, mine = (run(xs, window=(24, 6), impl=impl) for impl in ("reference", "eager"))
    for name, e, o, m in zip(("out", "lse", "finite", *NAMES), exact, oracle, mine, strict=True):
        if name != "finite":
            own, error = ((x.double() - e).norm() / e.norm() for x in (o, m))
            assert error <= 2 * own, name


def test_with_k2_v2_zero_it_is_sliding_attention():
    from sidlm.ops import attention

    xs, ids = inputs(2, 50, 4, 2, 8, docs=3)
    q, k, v, k2, v2 = xs
    mine = two_simplicial_attention(
        q, k, v, k2 * 0, v2 * 0, window=(11, 4), k2_bias=1.0, v2_bias=1.0, doc_ids=ids, impl="eager"
    )
    torch.testing.assert_close(mine, attention(q, k, v, window=11, doc_ids=ids), rtol=1e-12, atol=1e-12)


def test_axes_are_symmetric():
    (q, k, v, k2, v2), _ = inputs(1, 40, 2, 1, 9)
    one = two_simplicial_attention(q, k, v, k2, v2, window=(13, 4))
    other = two_simplicial_attention(q, k2, v2, k, v, window=(4, 13))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_documents_equal_separate_sequences():
    (q, k, v, k2, v2), _ = inputs(1, 60, 2, 1, 6)
    ids = torch.tensor([[0] * 23 + [4] * 37])
    packed = two_simplicial_attention(q, k, v, k2, v2, window=(16, 5), doc_ids=ids)
    for part in (slice(0, 23), slice(23, 60)):
        alone = two_simplicial_attention(*(x[:, part] for x in (q, k, v, k2, v2)), window=(16, 5))
        torch.testing.assert_close(packed[:, part], alone, rtol=1e-12, atol=1e-12)


def test_first_document_does_not_touch_the_second_bit_for_bit():
    xs, _ = inputs(1, 60, 2, 1, 6, dtype=torch.float32)
    ids = torch.tensor([[0] * 23 + [1] * 37])
    before = two_simplicial_attention(*xs, window=(16, 5), doc_ids=ids)
    after = two_simplicial_attention(
        *(torch.cat((x[:, :23] * -7, x[:, 23:]), 1) for x in xs), window=(16, 5), doc_ids=ids
    )
    assert torch.equal(before[:, 23:], after[:, 23:])
    assert not torch.equal(before[:, :23], after[:, :23])


def test_padding_is_zero_and_unseen():
    xs, _ = inputs(1, 12, 2, 1, 6)
    ids = torch.tensor([[-1] * 4 + [0] * 8])
    out, lse = two_simplicial_attention(*xs, window=(6, 3), doc_ids=ids, return_lse=True)
    assert (out[:, :4] == 0).all() and (lse[:, :4] == -torch.inf).all()
    alone = two_simplicial_attention(*(x[:, 4:] for x in xs), window=(6, 3))
    torch.testing.assert_close(out[:, 4:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_one_sequence_stays_there(impl):
    xs, _ = inputs(2, 12, 2, 1, 6, dtype=torch.float32)
    clean = run(xs, window=(6, 3), impl=impl)
    for x in xs:
        x[0] = torch.nan
    for name, before, after in zip(
        ("out", "lse", "finite", *NAMES), clean, run(xs, window=(6, 3), impl=impl), strict=True
    ):
        assert torch.equal(before[1], after[1]), name
        if name in ("out", *NAMES):
            assert after[0].isnan().all(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [0, 1, 2])
def test_nan_in_one_document_stays_there(impl, bad):
    """Padding and two documents, all within one window."""
    xs, _ = inputs(1, 18, 2, 1, 6, dtype=torch.float32)
    ids = torch.tensor([[-1] * 4 + [0] * 6 + [2] * 8])
    settings = {"window": (12, 9), "form": "determinant", "doc_ids": ids, "impl": impl}
    clean = run(xs, **settings)
    here = (torch.arange(18) >= (0, 4, 10)[bad]) & (torch.arange(18) < (4, 10, 18)[bad])
    for x in xs:
        x[:, here] = torch.nan
    for name, before, after in zip(("out", "lse", "finite", *NAMES), clean, run(xs, **settings), strict=True):
        kept = slice(None) if bad == 0 else ~here
        torch.testing.assert_close(after[:, kept], before[:, kept], rtol=1e-5, atol=1e-5, msg=name)
        if bad and name in ("out", *NAMES):
            assert after[:, here].isnan().all(), name


@pytest.mark.parametrize("impl", [None, "eager", "reference"])
def test_padding_inside_a_document(impl):
    """A prompt padded on the right, then its continuation: that sees the prompt at its distance, and no padding."""
    xs, _ = inputs(1, 12, 2, 1, 6, dtype=torch.float32)
    gap = torch.tensor([[0] * 5 + [-1] * 3 + [0] * 4])
    out = two_simplicial_attention(*xs, window=(7, 6), doc_ids=gap, impl=impl)
    for i in range(8, 12):
        q = xs[0].double()[0, i]
        seen = [[at for at in range(max(0, i - w + 1), i + 1) if gap[0, at] == 0] for w in (7, 6)]
        k, v = (x.double()[0, seen[0], 0] for x in xs[1:3])
        k2, v2 = (x.double()[0, seen[1], 0] for x in xs[3:])
        weights = (torch.einsum("hd,jd,md->hjm", q, k, k2) / 6**0.5).flatten(1).softmax(1).view(2, len(k), len(k2))
        expected = torch.einsum("hjm,jd,md->hd", weights, v, v2)
        torch.testing.assert_close(out[0, i].double(), expected, rtol=1e-5, atol=1e-5)


@KERNELS
def test_kernels_refuse_padding_inside_a_document(unchecked):
    """For what they would compute is something else: to them a document is one run of equal ids."""
    xs, _ = inputs(2, 8, 2, 1, 6, dtype=torch.float32)
    outside = torch.tensor([[-1, -1, 0, 0, -1, 1, -1, -1], [-1, 2, 2, 3, 3, 3, 5, -1]])
    two_simplicial_attention(*xs, window=(4, 2), doc_ids=outside, impl="triton")
    inside = torch.tensor([[-1, -1, 0, 0, -1, 1, -1, -1], [-1, 2, 2, -1, -1, 2, 5, 5]])
    with pytest.raises(ValueError) as caught:
        unchecked(two_simplicial_attention)(*xs, window=(4, 2), doc_ids=inside, impl="triton")
    assert str(caught.value) == (
        "doc_ids has padding inside a document: row 1 goes on with 2 at position 5, "
        "which implementation 'triton' would take for another document; impl='eager' does not"
    )


def test_where_documents_have_holes():
    rows = [
        ([0, 0, -1, 0, 0], [3]),
        ([-1, 0, -1, -1, 0, -1, 0, 1, -1, 1], [4, 6, 9]),
        ([-1, -1, 0, 1, -1, 2, -1, -1], []),
        ([3], []),
        ([-1], []),
    ]
    for ids, expected in rows:
        assert api.holes(torch.tensor([ids]))[0].nonzero().flatten().tolist() == expected, ids


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a device that has every kernel, for what is chosen there: nothing is run on it."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    half = (torch.bfloat16, torch.float16)
    monkeypatch.setattr(prepare, "why_not_hopper", lambda device, dtype: None if dtype in half else "half only")
    return torch.device("cuda")


def test_the_kernels_are_the_default_on_a_gpu(on_a_gpu, monkeypatch):
    pytest.importorskip("triton")

    def default(op, dtype, device=on_a_gpu):
        return dispatch.choose(op, IMPLEMENTATIONS[op], None, device, dtype)

    expected = {torch.bfloat16: "hopper", torch.float16: "hopper", torch.float32: "triton", torch.float64: "eager"}
    for dtype, name in expected.items():
        assert default("simplicial", dtype) == name
        assert default("simplicial_decode", dtype) == name.replace("hopper", "triton")
        for device in ("cpu", "meta"):
            assert {default(op, dtype, torch.device(device)) for op in ("simplicial", "simplicial_decode")} == {"eager"}
    rows = {(row.op, row.impl): row.reason for row in dispatch.table(on_a_gpu, torch.float16)}
    assert rows["simplicial", "hopper"] == rows["simplicial_decode", "triton"] == "default"
    assert {rows["simplicial", name] for name in ("triton", "eager", "reference")} == {"on request"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # nor is a GPU what runs them then
    assert default("simplicial", torch.float32) == default("simplicial_decode", torch.float32) == "eager"


def test_no_kernel_unasked_for_heads_without_tiles(on_a_gpu, unchecked):
    pytest.importorskip("triton")
    from types import SimpleNamespace

    def chosen(dim, impl=None):
        heads = SimpleNamespace(device=on_a_gpu, dtype=torch.float32, shape=(1, 1, 1, dim))
        return unchecked(api.choose)("simplicial", IMPLEMENTATIONS["simplicial"], impl, heads)

    assert chosen(256) == "triton" and chosen(257) == "eager" and chosen(257, "triton") == "triton"


@KERNELS
def test_on_a_cpu_kernels_are_only_emulated():
    rows = {row.impl: row for row in dispatch.table("cpu") if row.op == "simplicial"}
    assert list(rows) == ["hopper", "triton", "eager", "reference"]
    assert rows["triton"].usable and rows["triton"].reason == "on request, emulated"
    assert rows["eager"].reason == "default" and rows["reference"].reason == "on request"


def test_nothing_that_can_run_says_why():
    with pytest.raises(ValueError) as caught:
        dispatch.choose("simplicial", IMPLEMENTATIONS["simplicial"], None, torch.device("cpu"), torch.int32)
    message = str(caught.value)
    assert message.startswith("simplicial: no implementation for torch.int32 on cpu (hopper: ")
    assert message.endswith("eager: torch.int32 is not a floating-point type; reference: torch.int32 is not a "
                            "floating-point type)")  # fmt: skip


@KERNELS
def test_a_compiled_call_chooses_the_kernels_without_a_graph_break(unchecked, monkeypatch):
    """As on a GPU, where the choice asks for its capability."""
    ran, backend, impls = [], api._backend, IMPLEMENTATIONS["simplicial"]
    for name in api.KERNELS:
        monkeypatch.setitem(impls, name, impls[name]._replace(emulated=lambda device: False))
    monkeypatch.setattr(api, "_backend", lambda impl: ran.append(impl) or backend(impl))
    torch.compiler.reset()
    xs, ids = inputs(1, 6, 2, 1, 6, docs=2, dtype=torch.float32)
    op = unchecked(two_simplicial_attention)
    compiled = torch.compile(lambda *xs: op(*xs, window=(4, 2), doc_ids=ids) * 2, fullgraph=True, backend="aot_eager")
    out = compiled(*xs)
    assert ran == ["triton"]
    torch.testing.assert_close(out, op(*xs, window=(4, 2), doc_ids=ids, impl="eager") * 2, rtol=1e-5, atol=1e-5)


def _with(xs, name, value):
    return [value if n == name else x for n, x in zip(NAMES, xs, strict=True)]


@pytest.mark.parametrize("impl", [None, "hopper", *IMPLS])
def test_bad_input_is_named(impl, unchecked):
    """In the same words whatever would have run, and before it is asked whether it can run here."""
    xs, _ = inputs(2, 8, 4, 2, 6, dtype=torch.float32)
    q, k, v, k2, v2 = xs

    def fails(message, args=xs, **kwargs):
        with pytest.raises(ValueError) as caught:
            unchecked(two_simplicial_attention)(*args, **{"window": (4, 2), "impl": impl, **kwargs})
        assert str(caught.value) == message

    fails("q must be (B, T, H, D), got shape (2, 8, 24)", _with(xs, "q", q.flatten(2)))
    fails("v2 must be (B, S, G, D), got shape (2, 8, 12)", _with(xs, "v2", v2.flatten(2)))
    fails("k2 has D 5, expected 6 (q (2, 8, 4, 6))", _with(xs, "k2", k2[..., :5]))
    fails("v has batch size 1, expected 2 (q (2, 8, 4, 6))", _with(xs, "v", v[:1]))
    fails("q has 3 heads, not a multiple of the 2 heads of k", _with(xs, "q", q[:, :, :3]))
    fails("k2 has G 1, expected 2 (q (2, 8, 4, 6))", _with(xs, "k2", k2[:, :, :1]))
    fails("k has 7 positions, fewer than the 8 of q", _with(xs, "k", k[:, 1:]))
    fails("v2 has 9 positions, but k2 has 8", _with(xs, "v2", torch.cat((v2, v2[:, :1]), 1)))
    fails("v is torch.float64, but q is torch.float32", _with(xs, "v", v.double()))
    fails("k is on meta, but q is on cpu", _with(xs, "k", k.to("meta")))
    fails("window[1] is 0, but must be at least 1", window=(4, 0))
    fails("window is (4, 2, 1), but must be two integers (w1, w2)", window=(4, 2, 1))
    fails("window is (4.5, 2), but must be two integers (w1, w2)", window=(4.5, 2))
    fails("window is 4, but must be two integers (w1, w2)", window=4)
    fails("window is ('a', 2), but must be two integers (w1, w2)", window=("a", 2))
    fails("form is 'cubic', but must be one of trilinear, determinant", form="cubic")
    fails("doc_ids has shape (2, 7), expected (2, 8)", doc_ids=torch.zeros(2, 7, dtype=torch.long))
    fails("doc_ids is torch.float32 on cpu, expected integers on cpu", doc_ids=torch.zeros(2, 8))
    descending = torch.tensor([[0] * 8, [0, 0, 1, -1, 0, 0, 1, 1]])
    fails("doc_ids must not decrease along a row: row 1 has 0 at position 4 after 1", doc_ids=descending)


@pytest.mark.parametrize(
    ("impl", "dtype", "reason"),
    [
        ("hopper", torch.bfloat16, "needs a GPU of compute capability 9.0"),
        ("hopper", torch.float32, "the kernels take bfloat16 and float16, not torch.float32"),
        ("triton", torch.float64, "the kernels take float32, bfloat16 and float16, not torch.float64"),
    ],
)
def test_what_cannot_run_here_says_why(impl, dtype, reason):
    pytest.importorskip("triton")
    xs, _ = inputs(1, 4, 1, 1, 3, dtype=dtype)
    with pytest.raises(ValueError) as caught:
        two_simplicial_attention(*xs, impl=impl)
    assert str(caught.value) == f"simplicial: implementation {impl!r} cannot run here: {reason}"


def test_unknown_implementation_is_named(monkeypatch):
    xs, _ = inputs(1, 4, 1, 1, 3)
    with pytest.raises(ValueError, match="no implementation 'cuda'; there are hopper, triton, eager, reference"):
        two_simplicial_attention(*xs, impl="cuda")
    monkeypatch.setenv("SID_IMPL", "simplicial=nothing")
    with pytest.raises(ValueError, match="no implementation 'nothing'"):
        two_simplicial_attention(*xs)
    monkeypatch.setenv("SID_IMPL", "simplical=eager")
    with pytest.raises(ValueError, match="SID_IMPL names 'simplical'; the operations are "):
        two_simplicial_attention(*xs)
