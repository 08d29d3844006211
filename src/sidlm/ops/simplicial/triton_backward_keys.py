"""Gradients of k, v, k2 and v2 in portable Triton: the backward pass of plain attention over virtual keys.

The pair (j, m) is one key kappa = k[j] o (k2[m] + bias) with value nu = v[j] o (v2[m] + bias) (k[j] cross k2[m] for the
determinant form, since det([q, k, k2]) = q . (k cross k2)). For a block of BN keys j and one m, the visible queries
stream past: four products give dkappa and dnu [BN, D], and from them

    dk[j] += dkappa o k2[m]    dv[j] += dnu o v2[m]    in registers, over the m of the program
    dk2[m] = sum_j dkappa o k[j]    dv2[m] = sum_j dnu o v[j]    the block's share, to memory

The logits are formed as in the forward pass, k . u with u = q o (k2 + bias) rounded: from a rounded kappa instead,
P = exp(logit - LSE) would be off by the exponential of the difference, which is large where the softmax is sharp.

A program owns a block of keys and a chunk of consecutive m. The shares of chunks and of blocks have slots of their own
and are summed afterwards in a fixed order: no atomics. The sums of a cross product are kept per permuted copy (a, b) of
the other factor and put together at the end.
"""

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial import prepare
from sidlm.ops.simplicial.prepare import LOG2E, Launch, Problem
from sidlm.ops.simplicial.triton_forward import Tile, choose_tile, load_rows, product

PARTIAL_BYTES = 1 << 30  # memory for the shares; more sequences and groups than fit take several launches
PROGRAMS = 1024  # wanted at least, to fill a device


@triton.jit
@no_type_check
def grad_of_pairs(
    dkappa, dnu, k, nu, k2a, k2b, q_ptr, qa_ptr, qb_ptr, grad_ptr, lse_ptr, delta_ptr, rho, rho_end, j, w1, c, heads,
    d, R: tl.constexpr, D: tl.constexpr, CROSS: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows rho = query * R + head [BR] added to dkappa and dnu [BN, BD]; k2a, k2b [BD] for the left of a product."""
    i = rho // R
    rows = i * heads + rho % R
    q = load_rows(q_ptr, rows, D, rho < rho_end, d, D, EDGE)
    grad = load_rows(grad_ptr, rows, D, rho < rho_end, d, D, EDGE)
    if EDGE:  # past the end P = exp2(0 - inf) = 0
        lse = tl.load(lse_ptr + rows, mask=rho < rho_end, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rho < rho_end, other=0.0)
    else:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    qa = q.to(tl.float32)
    qb = qa
    if CROSS:
        qa = load_rows(qa_ptr, rows, D, rho < rho_end, d, D, EDGE).to(tl.float32)
        qb = load_rows(qb_ptr, rows, D, rho < rho_end, d, D, EDGE).to(tl.float32)
    u = product(k2a[None, :], k2b[None, :], qa, qb, CROSS).to(q.dtype)
    logits = tl.dot(u, tl.trans(k), input_precision=PRECISION)  # [BR, BN]
    dp = tl.dot(grad, tl.trans(nu), input_precision=PRECISION)
    p = tl.exp2(logits * c - (lse * 1.4426950408889634)[:, None])
    if EDGE:
        p = tl.where((j[None, :] <= i[:, None]) & (j[None, :] > i[:, None] - w1), p, 0.0)
    dnu = tl.dot(tl.trans(p.to(grad.dtype)), grad, dnu, input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    return tl.dot(tl.trans(ds), q, dkappa, input_precision=PRECISION), dnu


@triton.jit
@no_type_check
def keys_kernel(
    q_ptr, qa_ptr, qb_ptr, grad_ptr, k_ptr, ka_ptr, kb_ptr, v_ptr, k2a_ptr, k2b_ptr, v2_ptr,
    lse_ptr, delta_ptr, first_ptr, last_ptr, dka_ptr, dkb_ptr, dv_ptr, dk2a_ptr, dk2b_ptr, dv2_ptr,
    sign, c, scale, k2_bias, v2_bias, bg_first, bg_count, T, S1, S2, G, w1, w2, key_blocks, slots, chunk,
    R: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, CROSS: tl.constexpr,
    HAS_DOCS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Shares of dk, dv (slots, bg, S1, D) and of dk2, dv2 (slots of m, bg, S2, D), float32; a and b: see above."""
    pid = tl.program_id(0)
    slot, key_block, bg = pid % slots, pid // slots % key_blocks, pid // slots // key_blocks
    b, g = ((bg + bg_first) // G).to(tl.int64), (bg + bg_first) % G
    before, before2 = S1 - T, S2 - T
    d = tl.arange(0, BD)
    row_j = key_block * BN + tl.arange(0, BN)
    j_low = key_block * BN - before
    j_high = tl.minimum(j_low + BN, T) - 1
    j = j_low + tl.arange(0, BN)
    one = tl.full([], 1, tl.int64 if WIDE else tl.int32)
    heads, stride = G * R * one, G * D * one
    q_at = (b * T * G + g) * R
    k_ptr += (b * S1 * G + g) * D
    ka_ptr += (b * S1 * G + g) * D
    kb_ptr += (b * S1 * G + g) * D
    v_ptr += (b * S1 * G + g) * D
    k2_at = ((b * S2 + before2) * G + g) * D
    # queries that see a key of the block, and the m that those queries see
    i_low, i_high = tl.maximum(j_low, 0), tl.minimum(j_high + w1, T) - 1
    m_low = tl.maximum(i_low - w2 + 1, -before2) + slot * chunk
    m_end = tl.minimum(m_low + chunk, tl.where(i_high >= i_low, i_high + 1, -before2))

    dka = tl.zeros([BN, BD], tl.float32)
    dkb = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    for m in range(m_low, m_end):
        low, high = tl.maximum(m, i_low), tl.minimum(m + w2 - 1, i_high)
        if HAS_DOCS:
            first = tl.load(first_ptr + b * S2 + before2 + m)
            last = tl.load(last_ptr + b * S2 + before2 + m)
            high = tl.minimum(high, last)
            sees = (tl.maximum(j, low) <= tl.minimum(j + w1 - 1, high)) & (j >= first) & (row_j < S1)
        else:
            sees = (tl.maximum(j, low) <= tl.minimum(j + w1 - 1, high)) & (row_j < S1)
        queries = tl.maximum(high - low + 1, 0)
        tiles = tl.cdiv(queries * R, BR)
        whole_from = tl.minimum(tl.cdiv(tl.maximum(j_high - low, 0) * R, BR), tiles)
        whole_to = tl.maximum(tl.maximum(tl.minimum(high, j_low + w1 - 1) - low + 1, 0) * R // BR, whole_from)

        k2a = tl.load(k2a_ptr + k2_at + m * stride + d, mask=d < D, other=0.0).to(tl.float32) + k2_bias
        v2 = tl.load(v2_ptr + k2_at + m * stride + d, mask=d < D, other=0.0).to(tl.float32) + v2_bias
        k2b = k2a
        k = load_rows(k_ptr, row_j, stride, sees, d, D, True)
        v = load_rows(v_ptr, row_j, stride, sees, d, D, True).to(tl.float32)
        left_a = k2a * sign
        left_b = left_a
        if CROSS:  # the copies for the left differ from those for the right in the last D mod 3 dimensions
            whole = d < D // 3 * 3
            k2b = tl.load(k2b_ptr + k2_at + m * stride + d, mask=d < D, other=0.0).to(tl.float32) + k2_bias
            left_a = tl.where(whole, k2a, k2b) * sign
            left_b = tl.where(whole, k2b, 0.0) * sign
            k2a = tl.where(whole, k2a, 0.0)
        nu = (v * v2[None, :]).to(grad_ptr.dtype.element_ty)
        dkappa = tl.zeros([BN, BD], tl.float32)
        dnu = tl.zeros([BN, BD], tl.float32)
        rho_low, rho_end = low * R, (low + queries) * R
        for tile in tl.range(whole_from, whole_to, num_stages=STAGES):
            rho = rho_low + tile * BR + tl.arange(0, BR)
            dkappa, dnu = grad_of_pairs(
                dkappa, dnu, k, nu, left_a, left_b, q_ptr + q_at * D, qa_ptr + q_at * D, qb_ptr + q_at * D,
                grad_ptr + q_at * D, lse_ptr + q_at, delta_ptr + q_at, rho, rho_end, j, w1, c, heads, d, R, D, CROSS,
                False, PRECISION,
            )  # fmt: skip
        for edge in tl.range(0, tiles - whole_to + whole_from, num_stages=STAGES):
            tile = tl.where(edge < whole_from, edge, edge + whole_to - whole_from)
            rho = rho_low + tile * BR + tl.arange(0, BR)
            dkappa, dnu = grad_of_pairs(
                dkappa, dnu, k, nu, left_a, left_b, q_ptr + q_at * D, qa_ptr + q_at * D, qb_ptr + q_at * D,
                grad_ptr + q_at * D, lse_ptr + q_at, delta_ptr + q_at, rho, rho_end, j, w1, c, heads, d, R, D, CROSS,
                True, PRECISION,
            )  # fmt: skip

        # what a key of another document would get from this one is 0, or NaN: dropped either way
        keep = sees[:, None]
        dka += tl.where(keep, dkappa * k2a[None, :], 0.0)
        dv += tl.where(keep, dnu * v2[None, :], 0.0)
        ka = load_rows(ka_ptr, row_j, stride, sees, d, D, True, True).to(tl.float32)
        v = load_rows(v_ptr, row_j, stride, sees, d, D, True, True).to(tl.float32)
        dk2a = tl.sum(tl.where(keep, dkappa * ka, 0.0), 0)
        dv2 = tl.sum(tl.where(keep, dnu * v, 0.0), 0)
        slot2 = key_block - tl.maximum(tl.maximum(m, 0) - w1 + 1 + before, 0) // BN
        to2 = ((slot2 * bg_count + bg).to(tl.int64) * S2 + before2 + m) * D + d
        tl.store(dk2a_ptr + to2, dk2a * scale, mask=d < D)
        tl.store(dv2_ptr + to2, dv2, mask=d < D)
        if CROSS:
            dkb += tl.where(keep, dkappa * k2b[None, :], 0.0)
            kb = load_rows(kb_ptr, row_j, stride, sees, d, D, True, True).to(tl.float32)
            tl.store(dk2b_ptr + to2, tl.sum(tl.where(keep, dkappa * kb, 0.0), 0) * scale, mask=d < D)

    to = ((slot * bg_count + bg).to(tl.int64) * S1 + row_j)[:, None] * D + d[None, :]
    inside = (row_j < S1)[:, None] & (d < D)[None, :]
    tl.store(dka_ptr + to, dka * scale, mask=inside)
    tl.store(dv_ptr + to, dv, mask=inside)
    if CROSS:
        tl.store(dkb_ptr + to, dkb * scale, mask=inside)


# keys, rows a tile, warps, stages for (architecture, or whether shared memory is large; bytes an element; padded dim).
# Eight warps of Hopper cover 128 rows; with 64 rows two warp groups would form the same logits.
KEY_TILES: dict[tuple[str | bool, int, int], Tile] = {
    ("sm_90", 2, 64): Tile(64, 128, 8, 2),
    ("sm_90", 2, 128): Tile(64, 128, 8, 2),
    (True, 2, 64): Tile(64, 64, 8, 2),
    (True, 2, 128): Tile(64, 64, 8, 2),
    (True, 2, 256): Tile(32, 32, 8, 2),
    (True, 4, 64): Tile(32, 32, 8, 2),
    (True, 4, 128): Tile(32, 16, 8, 2),
    (True, 4, 256): Tile(16, 16, 8, 1),
    (False, 2, 64): Tile(32, 32, 4, 2),
    (False, 2, 128): Tile(32, 32, 4, 1),
    (False, 2, 256): Tile(16, 16, 4, 1),
    (False, 4, 64): Tile(32, 16, 4, 1),
    (False, 4, 128): Tile(16, 16, 4, 1),
    (False, 4, 256): Tile(16, 16, 4, 1),
}


class Shares(NamedTuple):
    """How the work is cut, and what that takes in slots."""

    tile: Tile
    key_blocks: int
    slots: int  # chunks of m that a block of keys meets
    chunk: int  # m of a chunk
    slots2: int  # blocks of keys that an m meets
    bg_count: int  # sequences x groups of a launch


def cut(p: Problem, arch: str) -> Shares:
    """Chunks of m: few (each costs memory), but enough programs to fill a device."""
    batch, _, s1, s2, groups, per_group, dim = p.shape
    tile = choose_tile(KEY_TILES, arch, p.q)
    rows = prepare.next_power(p.w2 * per_group, 16)
    if rows < tile.bn:
        # All rows that see an m in one tile: there is no next one to load ahead. Nor may Triton try: products with
        # fewer than 64 rows are not wgmma, those that sum over the rows are, and where both read a tile its pipeliner
        # (3.6, 3.7) copies the next one, here zeros, into the only buffer that wgmma in flight still read
        tile = tile._replace(bn=rows, stages=1)
    if p.determinant:  # two more tiles of queries, for which there is no room twice
        tile = tile._replace(stages=1)
    key_blocks = -(-s1 // tile.m)
    span = min(p.w1 + p.w2 + tile.m - 2, s2)
    slots = max(1, min(-(-PROGRAMS // (batch * groups * key_blocks)), span // 8))
    slots2 = min((p.w1 + p.w2 - 2) // tile.m + 2, key_blocks)
    row_bytes = 4 * dim * (3 if p.determinant else 2)
    fits = PARTIAL_BYTES // (row_bytes * (slots * s1 + slots2 * s2))
    return Shares(tile, key_blocks, slots, -(-span // slots), slots2, max(1, min(batch * groups, fits)))


def plan_keys(
    p: Problem, cut: Shares, scale: float, tensors: dict[str, Tensor], shares: tuple[Tensor, Tensor], bg_first: int,
    bg_count: int, has_docs: bool, arch: str,
) -> Launch:  # fmt: skip
    """The launch for bg_count sequences x groups from bg_first on; shares are those of the first and second keys."""
    _, steps, s1, s2, groups, per_group, dim = p.shape
    (dka, dkb, dv), (dk2a, dk2b, dv2) = (x.unbind() if p.determinant else (x[0], x[0], x[1]) for x in shares)
    args: dict[str, Any] = {
        **tensors, "dka_ptr": dka, "dkb_ptr": dkb, "dv_ptr": dv, "dk2a_ptr": dk2a, "dk2b_ptr": dk2b, "dv2_ptr": dv2,
        "sign": -1.0 if scale < 0 else 1.0, "c": abs(scale) * LOG2E, "scale": scale, "k2_bias": p.k2_bias,
        "v2_bias": p.v2_bias, "bg_first": bg_first, "bg_count": bg_count, "T": steps, "S1": s1, "S2": s2, "G": groups,
        "w1": p.w1, "w2": p.w2, "key_blocks": cut.key_blocks, "slots": cut.slots, "chunk": cut.chunk,
    }  # fmt: skip
    constants = {
        "R": per_group, "D": dim, "BD": prepare.next_power(dim, 16), "BN": cut.tile.m, "BR": cut.tile.bn,
        "CROSS": p.determinant, "HAS_DOCS": has_docs, "WIDE": p.wide, "PRECISION": prepare.precision(arch, p.q),
        "STAGES": cut.tile.stages,
    }  # fmt: skip
    grid = bg_count * cut.key_blocks * cut.slots
    return Launch(keys_kernel, grid, args, constants, cut.tile.warps, cut.tile.stages)


def key_tensors(
    p: Problem, doc_ids: Tensor | None, grad_out: Tensor, lse: Tensor, delta: Tensor
) -> dict[str, Tensor]:  # fmt: skip
    """The inputs of `keys_kernel`."""
    (ka, kb), (k2a, k2b), (qa, qb), s2 = p.left(p.k), p.right(p.k2), p.right(p.q), p.k2.shape[1]
    first, last = (lse, lse)
    if doc_ids is not None:
        first, last = (x[:, -s2:].contiguous() for x in prepare.extents(doc_ids, p.q.shape[1]))
    return {
        "q_ptr": p.q, "qa_ptr": qa, "qb_ptr": qb, "grad_ptr": grad_out, "k_ptr": p.k, "ka_ptr": ka,
        "kb_ptr": kb, "v_ptr": p.v, "k2a_ptr": k2a, "k2b_ptr": k2b,
        "v2_ptr": p.v2, "lse_ptr": lse, "delta_ptr": delta, "first_ptr": first, "last_ptr": last,
    }  # fmt: skip


def key_gradients(
    p: Problem, scale: float, doc_ids: Tensor | None, grad_out: Tensor, lse: Tensor, delta: Tensor, arch: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """dk, dv (B, S1, G, D), dk2, dv2 (B, S2, G, D) in dtype (the inputs'), contiguous."""
    batch, _, s1, s2, groups, _, dim = p.shape
    pieces, cuts = batch * groups, cut(p, arch)
    tensors = key_tensors(p, doc_ids, grad_out, lse, delta)
    dk, dv, dk2, dv2 = grads = [p.q.new_empty(pieces, s, dim, dtype=dtype) for s in (s1, s1, s2, s2)]
    for start in range(0, pieces, cuts.bg_count):
        count = min(cuts.bg_count, pieces - start)
        kinds, piece = 3 if p.determinant else 2, slice(start, start + count)
        one, two = (
            torch.zeros(kinds, slots, count, s, dim, dtype=torch.float32, device=p.q.device)
            for slots, s in ((cuts.slots, s1), (cuts.slots2, s2))
        )
        plan_keys(p, cuts, scale, tensors, (one, two), start, count, doc_ids is not None, arch).run()
        *parts, total = one.sum(1)
        dv[piece] = total
        dk[piece] = -difference(p, parts) if p.determinant else parts[0]
        *parts, total = two.sum(1)
        dv2[piece] = total
        dk2[piece] = difference(p, parts) if p.determinant else parts[0]
    return [x.view(batch, groups, *x.shape[1:]).transpose(1, 2).contiguous() for x in grads]


def difference(p: Problem, parts: list[Tensor]) -> Tensor:
    """The cross product from its two sums, each at its own rotation."""
    a, b = (x.index_select(-1, index) for x, index in zip(parts, p.rotations(), strict=True))
    return a - b
