"""Packed sequences are the sequences alone; shards of a sequence with halos are the whole sequence."""

from itertools import pairwise

import pytest
import torch

from sidlm.ops import (
    halo_sizes,
    two_simplicial_attention,
    two_simplicial_attention_halo,
    two_simplicial_attention_varlen,
)
from sidlm.ops.simplicial.api import IMPLEMENTATIONS

CPU = torch.device("cpu")
FORMS = ["trilinear", "determinant"]
SETTINGS = {"k2_bias": 0.3, "v2_bias": 1.0, "scale": 0.4}


def inputs(*shape, heads=4, groups=2, dim=7, dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, h, dim, generator=make, dtype=torch.float64).to(dtype).requires_grad_()
        for h in (heads, *[groups] * 4)
    ]


def weights(x, seed=9):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def gradients(out, xs):
    return torch.autograd.grad((out * weights(out)).sum(), xs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [[5], [23, 1, 40], [0, 7, 0, 0, 30, 0]], ids=str)
@pytest.mark.parametrize("window", [(9, 4), (3, 8)])
def test_varlen_is_every_sequence_alone(lengths, form, window):
    xs = inputs(sum(lengths))
    ends = torch.tensor(lengths).cumsum(0)
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).int()
    kwargs = {"window": window, "form": form, **SETTINGS, "return_lse": True}
    out, lse = two_simplicial_attention_varlen(*xs, cu_seqlens, **kwargs)
    alone = [
        two_simplicial_attention(*(x[None, stop - n : stop] for x in xs), **kwargs, impl="reference")
        for n, stop in zip(lengths, ends.tolist(), strict=True)
        if n
    ]
    expected_out, expected_lse = (torch.cat(parts, dim=1)[0] for parts in zip(*alone, strict=True))
    torch.testing.assert_close(out, expected_out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients(out, xs), gradients(expected_out, xs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_nothing_packed_is_nothing():
    out = two_simplicial_attention_varlen(*inputs(0), torch.zeros(3, dtype=torch.int32), window=(4, 2))
    assert out.shape == (0, 4, 7)


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_nan_in_one_packed_sequence_stays_there(impl):
    reason = IMPLEMENTATIONS[impl].why_not(CPU, torch.float32)
    if reason:
        pytest.skip(reason)
    clean = inputs(14, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 5, 8, 14], dtype=torch.int32)
    kwargs = {"window": (8, 3), "impl": impl, "return_lse": True}
    expected = two_simplicial_attention_varlen(*clean, cu_seqlens, **kwargs)
    expected = (*expected, *gradients(expected[0], clean))
    for value in (torch.nan, torch.inf):
        xs = [x.detach().clone() for x in clean]
        for x in xs:
            x[5:8] = value
        xs = [x.requires_grad_() for x in xs]
        got = two_simplicial_attention_varlen(*xs, cu_seqlens, **kwargs)
        grads = gradients(got[0], xs)
        for mine, theirs in zip((*got, *grads), expected, strict=True):
            for part in (slice(0, 5), slice(8, 14)):
                torch.testing.assert_close(mine[part], theirs[part], rtol=2e-5, atol=2e-5)
        assert got[0][5:8].isnan().any()
    broken = weights(expected[0])
    broken[5:8] = torch.nan
    out = two_simplicial_attention_varlen(*clean, cu_seqlens, **kwargs)[0]
    for grad in torch.autograd.grad(out, clean, broken):
        assert grad[:5].isfinite().all() and grad[8:].isfinite().all() and grad[5:8].isnan().any()


def test_nan_in_a_row_with_padding_inside_a_document():
    """The eager form takes documents apart then; padding between one's tokens still counts as distance."""
    q, k, v, k2, v2 = inputs(2, 40, dtype=torch.float32)
    ids = torch.tensor([[-1] * 3 + [0] * 12 + [-1] * 4 + [0] * 6 + [3] * 15, [1] * 40])
    hidden = (ids < 0)[..., None, None]
    kwargs = {"window": (16, 5), "doc_ids": ids, "return_lse": True}
    expected = two_simplicial_attention(q, k, v, k2, v2, impl="eager", **kwargs)
    xs = [x.masked_fill(hidden, torch.nan) for x in (q, k, v, k2, v2)]
    mine = two_simplicial_attention(*xs, impl="eager", **kwargs)
    for a, b in zip(mine, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(mine[0], (q, k, v, k2, v2)), gradients(expected[0], (q, k, v, k2, v2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_varlen_names_bad_input(unchecked):
    xs = inputs(10)

    def fails(message, cu_seqlens, xs=xs):
        with pytest.raises(ValueError, match=message):
            unchecked(two_simplicial_attention_varlen)(*xs, cu_seqlens, window=(4, 2))

    good = torch.tensor([0, 4, 10])
    fails(r"q must be \(total, H, D\), got shape \(1, 10, 4, 7\)", good, [x[None] for x in xs])
    fails(r"k has 9 tokens, but q has 10", good, [xs[0], xs[1][1:], *xs[2:]])
    fails(r"cu_seqlens has shape \(1, 3\), expected \(N \+ 1,\)", good[None])
    fails(r"cu_seqlens is torch.float32", good.float())
    fails(r"cu_seqlens starts at 1, expected 0", good.clamp_min(1))
    fails(r"cu_seqlens ends at 9, but q has 10 tokens", good.clamp_max(9))
    fails(r"cu_seqlens must not decrease: 3 follows 5", torch.tensor([0, 5, 3, 10]))


def sharded(xs, cuts, window, doc_ids, **kwargs):
    """Outputs of the shards, each handed the tails of those before it, put together."""
    bounds = [0, *cuts, xs[0].shape[1]]
    outs = []
    for start, stop in pairwise(bounds):
        sizes = [min(size, start) for size in halo_sizes(window)]
        halo = tuple(
            x[:, start - size : start] for x, size in zip(xs[1:], (sizes[0],) * 2 + (sizes[1],) * 2, strict=True)
        )
        ids = None if doc_ids is None else doc_ids[:, start - max(sizes) : stop]
        shard = (x[:, start:stop] for x in xs)
        outs.append(two_simplicial_attention_halo(*shard, halo, window=window, doc_ids=ids, **kwargs))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [(30,), (20, 40), (11, 13, 44)], ids=str)
@pytest.mark.parametrize("window", [(9, 4), (4, 9), (25, 3), (1, 1)])
@pytest.mark.parametrize("docs", [False, True])
def test_shards_with_halos_are_the_whole(cuts, form, window, docs):
    """Autograd adds the gradients of a halo to the neighbour's shard it was cut from, as a real exchange must."""
    xs = inputs(2, 60)
    ids = torch.tensor([[0] * 25 + [1] * 35, [-1] * 12 + [0] * 48]) if docs else None
    kwargs = {"window": window, "form": form, "doc_ids": ids, **SETTINGS}
    whole, parts = two_simplicial_attention(*xs, **kwargs, impl="reference"), sharded(xs, cuts, **kwargs)
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10)
    for mine, theirs in zip(gradients(parts, xs), gradients(whole, xs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_reach_the_halo():
    xs, before = inputs(1, 6), [x[:, :3].detach().clone().requires_grad_() for x in inputs(1, 6, seed=1)[1:]]
    out, lse = two_simplicial_attention_halo(*xs, tuple(before), window=(4, 4), return_lse=True)
    for grad in torch.autograd.grad(out.sum() + lse.sum(), (*xs, *before)):
        assert grad.abs().max() > 0


def test_halo_names_bad_input(unchecked):
    xs = inputs(1, 6)
    k, v, k2, v2 = inputs(1, 3, seed=1)[1:]

    def fails(message, halo, **kwargs):
        with pytest.raises(ValueError, match=message):
            unchecked(two_simplicial_attention_halo)(*xs, halo, **{"window": (5, 4)} | kwargs)

    fails(r"halo has 3 tensors, expected 4", (k, v, k2))
    fails(r"halo\[1\] \(v\) has 2 positions, but halo\[0\] \(k\) has 3", (k, v[:, 1:], k2, v2))
    fails(
        r"halo\[0\] \(k\) has 3 positions, more than the 1 that window\[0\] = 2 can see", (k, v, k2, v2), window=(2, 4)
    )
    fails(r"halo\[2\] \(k2\) has shape \(1, 3, 1, 7\), expected \(1, h, 2, 7\)", (k, v, k2[:, :, :1], v2))
    fails(r"halo\[3\] \(v2\) is torch.float32, but v2 is torch.float64", (k, v, k2, v2.float()))
    fails(r"doc_ids has shape \(1, 6\), expected \(1, 9\)", (k, v, k2, v2), doc_ids=torch.zeros(1, 6, dtype=torch.long))
