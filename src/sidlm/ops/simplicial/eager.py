"""2-simplicial attention as flash attention over virtual queries, in plain torch, for any device.

With u[i, h, s] = q[i, h] o k2[i - s] (or the cross product k2 x q, for the determinant form) the logit of the pair
(j, i - s) is u . k[j]: for one block of queries, all offsets s stacked, that is ONE matrix product with a slice of k,
one softmax over (s, j), one product with the slice of v, and an elementwise epilogue with v2. README.md beside this
file has the derivation.

Query blocks and head chunks bound the working memory, so nothing grows with T * w1 * w2. The backward pass recomputes
the probabilities and spends six matrix products per pair (12 D FLOP). It takes the softmax again rather than
exp(logit - LSE): a float32 LSE of 10 would cost every probability of the row a relative error of 5e-7.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sidlm.ops.simplicial.documents import backward_apart, forward_apart

# logits held at once, in elements. On a CPU they should stay in the last-level cache; a GPU wants large launches.
BUDGET = {"cpu": 1 << 20, "cuda": 1 << 28}


class Problem(NamedTuple):
    """Inputs brought to one form: heads first, biases added, the longer window on the first axis."""

    q: Tensor  # (B*G, R, T, D), scaled
    k: Tensor  # (B*G, S1, D)
    v: Tensor  # (B*G, S1, D)
    k2: Tensor  # (B*G, w2-1 + S2, D): zeros in front, so that every query has w2 rows
    v2: Tensor  # (B*G, w2-1 + S2, D)
    ids: Tensor | None  # (B, S)
    w1: int
    w2: int
    form: str
    swapped: bool
    groups: int

    @property
    def block(self) -> int:
        """Queries a block: about 2,048 rows (query, offset), and a band that is not mostly masked."""
        return max(16, min(64, 2048 // self.w2, self.w1 // 2))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Cross product per chunk of three dimensions; plain product on the last D mod 3."""
    whole = a.shape[-1] // 3 * 3
    a, b = a.to(torch.promote_types(a.dtype, b.dtype)), b.to(torch.promote_types(a.dtype, b.dtype))
    cross = torch.linalg.cross(a[..., :whole].unflatten(-1, (-1, 3)), b[..., :whole].unflatten(-1, (-1, 3))).flatten(-2)
    return cross if whole == a.shape[-1] else torch.cat((cross, a[..., whole:] * b[..., whole:]), dim=-1)


def _combine(q: Tensor, k2: Tensor, form: str) -> Tensor:
    """Virtual queries u: det([q, k, k2]) = k . (k2 x q)."""
    return q * k2 if form == "trilinear" else _cross(k2, q)


def _combine_backward(grad: Tensor, q: Tensor, k2: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """Gradients of q and k2, before the sums over what each was broadcast along."""
    return (grad * k2, grad * q) if form == "trilinear" else (_cross(grad, k2), _cross(q, grad))


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Batched product with float32 results from half-precision operands (they reach here on CUDA only)."""
    return torch.bmm(a, b) if a.dtype in (torch.float32, torch.float64) else torch.bmm(a, b, out_dtype=torch.float32)


def _heads_first(x: Tensor) -> Tensor:
    """(B, S, G, D) -> (B*G, S, D)."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def _prepare(q, k, v, k2, v2, w1, w2, form, scale, k2_bias, v2_bias, doc_ids) -> Problem:
    if q.dtype != torch.float64 and q.device.type != "cuda":
        # half-precision products on a CPU round the logits; float32 costs little there
        q, k, v, k2, v2 = (x.float() for x in (q, k, v, k2, v2))
    k2, v2 = k2 + k2_bias, v2 + v2_bias
    swapped = w2 > w1
    if swapped:
        k, v, w1, k2, v2, w2 = k2, v2, w2, k, v, w1
    batch, steps, heads, dim = q.shape
    groups = k.shape[2]
    q = q.float() if q.dtype in (torch.bfloat16, torch.float16) else q
    q = q.reshape(batch, steps, groups, heads // groups, dim).permute(0, 2, 3, 1, 4).flatten(0, 1) * scale
    if swapped and form == "determinant":  # det changes sign when two rows are exchanged; the plain product does not
        q[..., : dim // 3 * 3].neg_()
    pad = (0, 0, w2 - 1, 0)
    k2, v2 = (torch.nn.functional.pad(_heads_first(x), pad) for x in (k2, v2))
    return Problem(q, _heads_first(k), _heads_first(v), k2, v2, doc_ids, w1, w2, form, swapped, groups)


class Block(NamedTuple):
    """One block of queries for one chunk of heads."""

    bg: slice  # of B*G
    r: slice  # of R
    i: slice  # queries
    j: slice  # rows of k, v
    m: slice  # rows of padded k2, v2
    shape: tuple[int, int, int, int, int]  # (bg, r, queries, offsets, keys)


def _blocks(p: Problem) -> Iterator[Block]:
    total, per_group, steps, _ = p.q.shape
    shift = p.k.shape[1] - steps  # query i sits at row i + shift of k
    shift2 = p.k2.shape[1] - (p.w2 - 1) - steps
    keys = min(p.w1 + p.block - 1, p.k.shape[1])
    rows = max(p.block * p.w2 * keys, 1)  # none without keys
    budget = BUDGET["cuda" if p.q.is_cuda else "cpu"]
    chunk_r = max(1, min(per_group, budget // rows))
    chunk_bg = max(1, min(total, budget // (rows * chunk_r))) if chunk_r == per_group else 1
    for bg in range(0, total, chunk_bg):
        for r in range(0, per_group, chunk_r):
            for start in range(0, steps, p.block):
                stop = min(start + p.block, steps)
                j = slice(max(0, start + shift - p.w1 + 1), stop + shift)
                m = slice(start + shift2, stop + shift2 + p.w2 - 1)
                bgs, rs = slice(bg, min(bg + chunk_bg, total)), slice(r, min(r + chunk_r, per_group))
                shape = (bgs.stop - bgs.start, rs.stop - rs.start, stop - start, p.w2, j.stop - j.start)
                yield Block(bgs, rs, slice(start, stop), j, m, shape)


def _windows(padded: Tensor, b: Block) -> Tensor:
    """Overlapping view (bg, 1, queries, offsets, D): row s of query i is position i - (w2 - 1) + s."""
    return padded[b.bg, b.m].unfold(1, b.shape[3], 1).transpose(-1, -2).unsqueeze(1)


def _hide(logits: Tensor, p: Problem, b: Block) -> None:
    """Write -inf into the pairs that a query of this block must not see. logits: b.shape."""
    queries, offsets, keys = b.shape[2:]
    steps = p.q.shape[2]
    rows = torch.arange(queries, device=logits.device)
    after = min(queries - 1, keys)  # keys of later queries, at the right edge of the slice
    if after:
        columns = torch.arange(queries - after, queries, device=logits.device)
        logits[..., keys - after :].masked_fill_((columns > rows[:, None])[:, None], -torch.inf)
    left = b.i.start + p.k.shape[1] - steps - p.w1 + 1  # first key of the block's first query, before the cut at 0
    before = min(left + queries - 1 - b.j.start, keys)  # keys that have left the window of the block's later queries
    if before > 0:
        columns = torch.arange(b.j.start - left, b.j.start - left + before, device=logits.device)
        logits[..., :before].masked_fill_((columns < rows[:, None])[:, None], -torch.inf)
    missing = p.w2 - 1 - b.m.start  # offsets that reach before the start of k2
    if missing > 0:
        offset = torch.arange(offsets, device=logits.device)
        logits.masked_fill_((rows[:, None] + offset < missing)[..., None], -torch.inf)
    if p.ids is not None:
        _hide_documents(logits, p, b)


def _hide_documents(logits: Tensor, p: Problem, b: Block) -> None:
    assert p.ids is not None
    length, steps = p.ids.shape[1], p.q.shape[2]
    end = length - steps + b.i.stop
    first, second = length - p.k.shape[1], length - (p.k2.shape[1] - p.w2 + 1)
    sequences = torch.arange(b.bg.start, b.bg.stop, device=logits.device) // p.groups
    reach = max(0, min(b.j.start + first, b.m.start + second - p.w2 + 1))
    ids = p.ids[sequences]
    if not logits.is_cuda and bool((ids[:, reach:end] == ids[:, end - 1 : end].clamp_min(0)).all()):
        return  # one document throughout: nothing to hide, and no need to build the mask
    own = ids[:, end - b.shape[2] : end]
    padded = torch.nn.functional.pad(ids[:, second:], (p.w2 - 1, 0), value=-1)
    sees_first = ids[:, None, b.j.start + first : b.j.stop + first] == own[..., None]
    sees_second = (padded[:, b.m].unfold(1, p.w2, 1) == own[..., None]) & (own >= 0)[..., None]
    logits.masked_fill_(~(sees_second[..., None] & sees_first[:, :, None, :])[:, None], -torch.inf)


def _softmax(logits: Tensor) -> Tensor:
    """One softmax over (offset, key)."""
    return logits.flatten(3).softmax(dim=-1).view(logits.shape)


def _logits(p: Problem, b: Block) -> tuple[Tensor, Tensor]:
    """Logits (bg, r, queries, offsets, keys) with -inf where hidden, and virtual queries (bg, rows, D)."""
    u = _combine(p.q[b.bg, b.r, b.i].unsqueeze(3), _windows(p.k2, b), p.form).flatten(1, 3).to(p.k.dtype)
    logits = _matmul(u, p.k[b.bg, b.j].transpose(1, 2)).view(b.shape)
    _hide(logits, p, b)
    return logits, u


@forward_apart
def forward(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, scale: float,
    k2_bias: float, v2_bias: float, doc_ids: Tensor | None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D) in dtype (q's) and natural-log LSE (B, T, H), float32 (float64 for float64)."""
    p = _prepare(q, k, v, k2, v2, w1, w2, form, scale, k2_bias, v2_bias, doc_ids)
    out = torch.empty_like(p.q)
    lse = torch.empty(p.q.shape[:3], dtype=p.q.dtype, device=q.device)
    for b in _blocks(p):
        logits, _ = _logits(p, b)
        weights = _softmax(logits)
        # the largest weight is exp(top - LSE), and never too small to invert
        lse[b.bg, b.r, b.i] = logits.amax(dim=(3, 4)) - weights.amax(dim=(3, 4)).log()
        values = _matmul(weights.flatten(1, 3).to(p.v.dtype), p.v[b.bg, b.j]).view(*b.shape[:4], -1)
        out[b.bg, b.r, b.i] = values.mul_(_windows(p.v2, b)).sum(dim=3)
    out, lse = _heads_last(out, p).to(dtype or q.dtype), _heads_last(lse.unsqueeze(-1), p).squeeze(-1)
    if doc_ids is not None:  # a padding query has seen nothing, and its softmax is NaN
        padding = doc_ids[:, -q.shape[1] :, None] < 0
        out, lse = out.masked_fill_(padding.unsqueeze(-1), 0.0), lse.masked_fill_(padding, -torch.inf)
    return out, lse


def _heads_last(x: Tensor, p: Problem) -> Tensor:
    """(B*G, R, T, D) -> (B, T, H, D)."""
    return x.unflatten(0, (-1, p.groups)).permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous()


def _scatter(target: Tensor, grad: Tensor, b: Block) -> None:
    """Add grad (bg, queries, offsets, D) to the padded rows that `_windows` read. A loop: the same bits every time."""
    for s in range(b.shape[3]):
        target[b.bg, b.m.start + s : b.m.start + s + b.shape[2]] += grad[:, :, s]


@backward_apart
def backward(
    grad_out: Tensor, grad_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, out: Tensor,
    lse: Tensor, w1: int, w2: int, form: str, scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, k2, v2, each in its input's shape, in dtype (the inputs'); grad_lse (B, T, H) may be zeros.

    The saved LSE is not used: see above.
    """
    p = _prepare(q, k, v, k2, v2, w1, w2, form, scale, k2_bias, v2_bias, doc_ids)
    high = p.q.dtype

    def grouped(x: Tensor) -> Tensor:
        return x.to(high).unflatten(2, (p.groups, -1)).permute(0, 2, 3, 1, *range(4, x.ndim + 1)).flatten(0, 1)

    d_out = grouped(grad_out).contiguous()
    delta = (d_out * grouped(out)).sum(-1) - grouped(grad_lse)
    padding = None if doc_ids is None else doc_ids[:, -q.shape[1] :].repeat_interleave(p.groups, dim=0) < 0
    d_q = torch.empty_like(p.q)
    d_k, d_v, d_k2, d_v2 = (torch.zeros(x.shape, dtype=high, device=x.device) for x in (p.k, p.v, p.k2, p.v2))
    for b in _blocks(p):
        logits, u = _logits(p, b)
        weights = _softmax(logits)
        if padding is not None:
            weights.masked_fill_(padding[b.bg, None, b.i, None, None], 0.0)
        weights = weights.flatten(1, 3)  # (bg, rows, keys)
        k_rows, v_rows = p.k[b.bg, b.j], p.v[b.bg, b.j]
        d_o = d_out[b.bg, b.r, b.i].unsqueeze(3)
        d_o_rows = (d_o * _windows(p.v2, b)).flatten(1, 3).to(p.v.dtype)
        low_weights = weights.to(p.v.dtype)
        d_v[b.bg, b.j] += _matmul(low_weights.transpose(1, 2), d_o_rows)
        values = _matmul(low_weights, v_rows).view(*b.shape[:4], -1)
        _scatter(d_v2, values.mul_(d_o).sum(dim=1), b)
        d_logits = _matmul(d_o_rows, v_rows.transpose(1, 2)).view(b.shape)
        d_logits = d_logits.sub_(delta[b.bg, b.r, b.i, None, None]).flatten(1, 3).mul_(weights).to(p.k.dtype)
        d_k[b.bg, b.j] += _matmul(d_logits.transpose(1, 2), u)
        d_u = _matmul(d_logits, k_rows).view(*b.shape[:4], -1)
        d_q_rows, d_k2_rows = _combine_backward(d_u, p.q[b.bg, b.r, b.i].unsqueeze(3), _windows(p.k2, b), form)
        d_q[b.bg, b.r, b.i] = d_q_rows.sum(dim=3)
        _scatter(d_k2, d_k2_rows.sum(dim=1), b)
    if p.swapped and form == "determinant":
        d_q[..., : d_q.shape[-1] // 3 * 3].neg_()
    d_k2, d_v2 = d_k2[:, p.w2 - 1 :], d_v2[:, p.w2 - 1 :]
    if p.swapped:
        d_k, d_v, d_k2, d_v2 = d_k2, d_v2, d_k, d_v

    def ungrouped(x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, p.groups)).transpose(1, 2).to(dtype or q.dtype).contiguous()
        return x.clone() if x.storage_offset() else x  # not a view of its padded self: torch.compile expects none

    d_q = _heads_last(d_q * scale, p).to(dtype or q.dtype)
    return d_q, ungrouped(d_k), ungrouped(d_v), ungrouped(d_k2), ungrouped(d_v2)
