"""Decoding from ring buffers is the dense op on the history written out, whatever else the rings hold."""

import pytest
import torch

from sidlm.ops import two_simplicial_attention, two_simplicial_decode
from sidlm.ops.simplicial.decode import IMPLEMENTATIONS, _two_simplicial_decode

CPU = torch.device("cpu")
WHY_NOT = IMPLEMENTATIONS["triton"].why_not(CPU, torch.float32)
NEEDS_TRITON = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
TRITON = pytest.param("triton", marks=NEEDS_TRITON)
IN_FULL = [("eager", torch.float64, 1e-10), pytest.param("triton", torch.float32, 2e-5, marks=NEEDS_TRITON)]


def history(lengths, heads, groups, dim, *, seed=0, dtype=torch.float64):
    """q, k, v, k2, v2 of every sequence, each (1, L, ., D)."""
    make = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(1, n, h, dim, generator=make, dtype=torch.float64).to(dtype) for h in (heads, *[groups] * 4)]
        for n in lengths
    ]


def rings(sequences, n, window, extra=(0, 0), fill=torch.nan):
    """The last n queries and four rings that hold `fill` wherever no query of a token can see."""
    _, _, heads, dim = sequences[0][0].shape
    groups = sequences[0][1].shape[2]
    q = torch.full((len(sequences), n, heads, dim), fill, dtype=sequences[0][0].dtype)
    out = []
    for i in range(4):
        w, more = window[i // 2], extra[i // 2]
        slots = w + n - 1 + more
        ring = q.new_full((len(sequences), slots, groups, dim), fill)
        for b, xs in enumerate(sequences):
            length = xs[0].shape[1]
            for p in range(max(0, length - (w + n - 1)), length):
                ring[b, p % slots] = xs[i + 1][0, p]
        out.append(ring)
    for b, xs in enumerate(sequences):
        length = xs[0].shape[1]
        q[b, max(0, n - length) :] = xs[0][0, max(0, length - n) :]
    return q, out


def oracle(sequences, n, **kwargs):
    """Output and LSE in float64, zero and -inf before a sequence's start."""
    _, _, heads, dim = sequences[0][0].shape
    out = torch.zeros(len(sequences), n, heads, dim, dtype=torch.float64)
    lse = torch.full((len(sequences), n, heads), -torch.inf, dtype=torch.float64)
    for b, xs in enumerate(sequences):
        length = xs[0].shape[1]
        new = min(n, length)
        if new:
            q, *others = (x.double() for x in xs)
            ids = kwargs.get("doc_ids")
            ids = None if ids is None else ids[b : b + 1, -length:]
            out[b, n - new :], lse[b, n - new :] = two_simplicial_attention(
                q[:, -new:], *others, **{**kwargs, "doc_ids": ids}, return_lse=True, impl="reference"
            )
    return out, lse


CASES = [
    # lengths, n, heads, groups, dim, window, extra slots
    ([1, 5, 9, 40], 1, 4, 2, 8, (9, 4), (0, 0)),
    ([0, 2, 23, 50], 3, 4, 1, 7, (9, 4), (3, 1)),
    ([100, 3], 5, 3, 3, 12, (70, 5), (0, 2)),
    ([33, 90], 2, 4, 2, 9, (4, 21), (5, 0)),
    ([200], 1, 6, 1, 20, (150, 40), (1, 1)),
    ([31], 4, 2, 2, 5, (1, 1), (0, 0)),
]


@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("impl", "dtype", "tolerance"), IN_FULL)
def test_is_the_dense_op_on_the_history(case, form, impl, dtype, tolerance):
    lengths, n, heads, groups, dim, window, extra = case
    sequences = history(lengths, heads, groups, dim, dtype=dtype, seed=len(lengths))
    q, ringed = rings(sequences, n, window, extra)
    kwargs = {"window": window, "form": form, "k2_bias": 0.3, "v2_bias": 1.0, "scale": 0.4}
    out, lse = two_simplicial_decode(q, *ringed, torch.tensor(lengths), **kwargs, impl=impl, return_lse=True)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for mine, expected in zip((out, lse), oracle(sequences, n, **kwargs), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["eager", TRITON])
@pytest.mark.parametrize("window", [(9, 4), (4, 9)])
def test_half_precision(impl, window):
    sequences = history([30, 7], 4, 2, 32, dtype=torch.float16)
    q, ringed = rings(sequences, 2, window)
    out = two_simplicial_decode(q, *ringed, torch.tensor([30, 7]), window=window, v2_bias=1.0, impl=impl)
    expected, _ = oracle(sequences, 2, window=window, v2_bias=1.0)
    assert out.dtype == torch.float16
    assert (out.double() - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("impl", ["eager", TRITON])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_documents_and_padding(impl, dtype):
    """Ids of the last positions only; rows padded on the left, of two documents, padded inside, padded at the end."""
    window, n, lengths = (9, 5), 3, [20] * 4
    sequences = history(lengths, 4, 2, 8, dtype=torch.float32)
    ids = [[-1] * 13 + [0] * 7, [2] * 18 + [5] * 2, [1] * 12 + [-1] * 3 + [1] * 5, [0] * 18 + [-1] * 2]
    ids = torch.tensor(ids, dtype=dtype)
    for row, xs in zip(ids, sequences, strict=True):
        hidden = (row < 0) | (row < row[-3])
        for x in xs:
            x[:, hidden] = torch.nan  # what no query may read
    q, ringed = rings(sequences, n, window)
    clean = [[x.nan_to_num() for x in xs] for xs in sequences]
    kwargs = {"window": window, "k2_bias": 0.5}
    expected = oracle(clean, n, doc_ids=ids, **kwargs)
    for mine, theirs in zip(
        two_simplicial_decode(
            q, *ringed, torch.tensor(lengths), doc_ids=ids[:, -11:], impl=impl, return_lse=True, **kwargs
        ),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("impl", ["eager", TRITON])
def test_any_strides(impl):
    """Rings stored heads first, as caches have them, and a q cut out of a larger tensor."""
    sequences = history([30, 4], 4, 2, 8, dtype=torch.float32)
    q, ringed = rings(sequences, 2, (9, 4))
    lengths = torch.tensor([30, 4], dtype=torch.int32)
    plain = two_simplicial_decode(q, *ringed, lengths, window=(9, 4), impl=impl)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in ringed]
    wide = torch.cat((q, q), dim=2)[:, :, :4]
    assert torch.equal(two_simplicial_decode(wide, *strided, lengths, window=(9, 4), impl=impl), plain)
    spread = torch.stack((q, q), dim=-1)[..., 0]
    assert torch.equal(two_simplicial_decode(spread, *ringed, lengths, window=(9, 4), impl=impl), plain)


@NEEDS_TRITON
@pytest.mark.parametrize("processors", [1, 132, 10_000])
def test_split_counts_change_nothing(processors, monkeypatch):
    from sidlm.ops.simplicial import triton_decode

    monkeypatch.setattr(triton_decode, "PROCESSORS_ASSUMED", processors)
    triton_decode._processors.cache_clear()
    sequences = history([150, 70], 2, 1, 8, dtype=torch.float32)
    q, ringed = rings(sequences, 1, (140, 3))
    out = two_simplicial_decode(q, *ringed, torch.tensor([150, 70]), window=(140, 3), impl="triton")
    triton_decode._processors.cache_clear()
    torch.testing.assert_close(out.double(), oracle(sequences, 1, window=(140, 3))[0], rtol=2e-5, atol=2e-5)


@NEEDS_TRITON
def test_plans_cover_their_rows_and_fill_the_device():
    from sidlm.ops.simplicial.triton_decode import plan

    for per_group, dim, w1, w2 in [(64, 128, 512, 32), (1, 96, 512, 32), (4, 12, 7, 4), (3, 256, 2000, 200)]:
        for tokens in (1, 5, 300):
            p = plan(tokens, 2, per_group, dim, w1, w2, 2, 132, large=True)
            assert 16 <= p.heads * p.offsets <= 64
            assert p.heads * p.head_tiles >= per_group and p.offsets * p.offset_tiles >= w2
            assert p.key_splits * p.keys_per_split >= w1 > (p.key_splits - 1) * p.keys_per_split
    alone = plan(1, 1, 64, 128, 512, 32, 2, 132, large=True)  # the paper's heads, one token
    assert alone.head_tiles * alone.offset_tiles * alone.key_splits == 128
    assert plan(300, 1, 64, 128, 512, 32, 2, 132, large=True).splits == 1


@pytest.mark.parametrize("impl", ["eager", TRITON])
def test_nan_in_one_sequence_stays_there(impl):
    sequences = history([30, 4], 4, 2, 8, dtype=torch.float32)
    q, ringed = rings(sequences, 2, (9, 4))
    for x in ringed:
        x[0] = torch.nan
    out = two_simplicial_decode(q, *ringed, torch.tensor([30, 4]), window=(9, 4), impl=impl)
    assert out[0].isnan().all() and out[1].isfinite().all()


@pytest.mark.parametrize("impl", ["eager", TRITON])
def test_registered_as_an_operator(impl):
    q, ringed = rings(history([30, 4], 4, 2, 8, dtype=torch.float32), 2, (9, 4))
    ids = torch.zeros(2, 10, dtype=torch.long)
    for form, doc_ids in (("trilinear", None), ("determinant", ids)):
        args = (q, *ringed, torch.tensor([30, 4]), 9, 4, form, 0.4, 0.1, 1.0, doc_ids, impl)
        torch.library.opcheck(_two_simplicial_decode, args)


def test_compiles_to_one_graph(unchecked):
    q, ringed = rings(history([30, 4], 4, 2, 8, dtype=torch.float32), 2, (9, 4))
    op, lengths = unchecked(two_simplicial_decode), torch.tensor([30, 4])
    compiled = torch.compile(lambda *xs: op(*xs, window=(9, 4)) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, *ringed, lengths), op(q, *ringed, lengths, window=(9, 4)) * 2)


def test_gradients_are_refused():
    q, ringed = rings(history([30], 4, 2, 8), 1, (9, 4))
    with pytest.raises(RuntimeError, match=r"has no gradient.*no_grad.*two_simplicial_attention"):
        two_simplicial_decode(q.requires_grad_(), *ringed, torch.tensor([30]), window=(9, 4))
    with torch.no_grad():
        two_simplicial_decode(q, *ringed, torch.tensor([30]), window=(9, 4))


def test_bad_input_is_named(unchecked):
    q, (k, v, k2, v2) = rings(history([30, 4], 4, 2, 6), 3, (9, 4))
    good = {"q": q, "k": k, "v": v, "k2": k2, "v2": v2, "lengths": torch.tensor([30, 4]), "window": (9, 4)}

    def fails(message, **kwargs):
        with pytest.raises(ValueError, match=message):
            unchecked(two_simplicial_decode)(**(good | kwargs))

    fails(r"q must be \(B, n, H, D\), got shape \(2, 3, 4\)", q=q[..., 0])
    fails(r"v must be \(B, C, G, D\), got shape \(2, 11, 2\)", v=v[..., 0])
    fails(r"k2 has D 5, expected 6", k2=k2[..., :5])
    fails(r"v has batch size 1, expected 2", v=v[:1])
    fails(r"v2 has G 1, expected 2", v2=v2[:, :, :1])
    fails(r"q has 3 heads, not a multiple of the 2 heads of k", q=q[:, :, :3])
    fails(r"k has 10 slots, fewer than the 11 that window\[0\] = 9 and 3 new tokens need", k=k[:, 1:], v=v[:, 1:])
    fails(r"k2 has 6 slots, fewer than the 7 that window\[1\] = 5", window=(9, 5))
    fails(r"v2 has 7 slots, but k2 has 6", v2=torch.cat((v2, v2[:, :1]), 1))
    fails(r"v is torch.float32, but q is torch.float64", v=v.float())
    fails(r"window\[1\] is 0, but must be at least 1", window=(9, 0))
    fails(r"window is \(9,\), but must be two integers \(w1, w2\)", window=(9,))
    fails(r"form is 'cubic', but must be one of trilinear, determinant", form="cubic")
    fails(r"lengths has shape \(1,\), expected \(2,\)", lengths=torch.tensor([30]))
    fails(r"lengths is torch.float32 on cpu, expected integers on cpu", lengths=torch.tensor([30.0, 4.0]))
    fails(r"doc_ids has shape \(2, 2\), expected \(2, 3 or more\)", doc_ids=torch.zeros(2, 2, dtype=torch.long))
    fails(r"no implementation 'cuda'; there are", impl="cuda")
    fails(r"'triton' cannot run here: the kernels take .* not torch.float64", impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 2e-5)], ids=str
)
@pytest.mark.parametrize("form", ["trilinear", "determinant"])
@pytest.mark.parametrize(
    ("heads", "groups", "dim", "window", "n"),
    [(64, 1, 128, (512, 32), 1), (32, 8, 96, (128, 16), 3), (4, 4, 64, (16, 70), 2), (4, 2, 20, (9, 4), 5)],
)
def test_on_a_gpu(heads, groups, dim, window, n, form, dtype, tolerance):
    lengths = [600, 3, 0, 70]
    sequences = history(lengths, heads, groups, dim, dtype=dtype)
    q, ringed = rings(sequences, n, window, (1, 2))
    kwargs = {"window": window, "form": form, "k2_bias": 0.5, "v2_bias": 1.0}
    on_gpu = (x.cuda() for x in (q, *ringed, torch.tensor(lengths, dtype=torch.int32)))
    out, lse = two_simplicial_decode(*on_gpu, **kwargs, impl="triton", return_lse=True)
    expected, expected_lse = oracle(sequences, n, **kwargs)
    assert (out.double().cpu() - expected).norm() <= tolerance * expected.norm()
    torch.testing.assert_close(lse.double().cpu(), expected_lse, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.gpu
def test_in_a_cuda_graph():
    """One graph, replayed while the sequences grow and the rings wrap around."""
    window = (128, 16)
    make = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 1, 16, 128, generator=make, device="cuda").bfloat16()
    ringed = [torch.zeros(2, w, 2, 128, device="cuda").bfloat16() for w in (128, 128, 16, 16)]
    lengths = torch.zeros(2, dtype=torch.long, device="cuda")
    with torch.no_grad():
        two_simplicial_decode(q, *ringed, lengths, window=window, impl="triton")  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = two_simplicial_decode(q, *ringed, lengths, window=window, impl="triton")
        for step in range(300):
            q.normal_(generator=make)
            for ring in ringed:
                ring[:, step % ring.shape[1]].normal_(generator=make)
            lengths.fill_(step + 1)
            graph.replay()
            if step % 37 == 0 or step > 295:
                expected = two_simplicial_decode(q, *ringed, lengths, window=window, impl="eager")
                torch.testing.assert_close(out, expected, rtol=3e-2, atol=3e-2)
