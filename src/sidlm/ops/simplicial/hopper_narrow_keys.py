"""Gradients of k and v on Hopper for narrow groups: a block of keys against a stream of virtual queries, in Gluon.

For a key head with few query heads a position of the second axis meets few rows, and what a pass over virtual keys
(hopper_backward_keys.py) does for each of its pairs of keys outweighs the products. Here nothing is done for a pair of
keys: with the virtual queries u = q o k2 and the virtual output gradients w = dO o v2, dv = sum P w and dk = sum dS u
over all (query, head, offset), as in plain attention. Four products a pair, S, dP, dv, dk.

A block of threads owns 128 keys, 64 a warpgroup, and a run of queries. Each warpgroup forms one half of a coming tile,
u or w, while its products run, two tiles ahead. S and dP are computed transposed, (keys, rows), so that both weights
are operands from registers. Partial sums go to slots that no other block writes and are added in a fixed order: the
same bits every time.
"""

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sidlm.ops.simplicial.hopper_narrow import of_rows, statistics, virtual_rows
from sidlm.ops.simplicial.hopper_tiles import processors, thread_barrier
from sidlm.ops.simplicial.prepare import LOG2E, Launch, Problem, next_power

KEYS = 128  # of a block


@gluon.jit
@no_type_check
def _job(T, S1, w1, IC, slots):
    """This program's first key (row of k), and its run of queries [low, end)."""
    j = gl.program_id(0) // slots * 128
    low = gl.maximum(j - (S1 - T), 0)
    end = gl.minimum(j + 128 - (S1 - T) + w1 - 1, T)
    chunk = low // IC + gl.program_id(0) % slots
    return j, gl.maximum(low, chunk * IC), gl.minimum(end, chunk * IC + IC)


@gluon.jit
@no_type_check
def _form(
    n, tiles, first, end, u_smem, w_smem, lse_smem, delta_smem, formed, free,
    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr,
    b, group, T, S2, w2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, V2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """This warpgroup's half of tile n, if there is one: virtual queries, or virtual output gradients."""
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    if n < tiles:
        slot = n % STAGES
        pair = first + 2 * n
        mbarrier.wait(free.index(slot), ((n // STAGES) & 1) ^ 1)
        row = gl.arange(0, 64, layout=flat)
        lse, delta = statistics(row, pair, end, lse_ptr, delta_ptr, b, group, T, S2, w2, reach_ptr, R, G, HAS_DOCS)
        if WG == 0:
            u_smem.index(slot).store(
                virtual_rows(q_ptr, qb_ptr, k2_ptr, k2b_ptr, pair, end, b, group, T, S2, w2, k2_bias, reach_ptr,
                             R, G, D, DETERMINANT, K2_BIAS, HAS_DOCS)
            )  # fmt: skip
            lse_smem.index(slot).store(lse)
        else:
            w_smem.index(slot).store(
                virtual_rows(do_ptr, do_ptr, v2_ptr, v2_ptr, pair, end, b, group, T, S2, w2, v2_bias, reach_ptr,
                             R, G, D, False, V2_BIAS, HAS_DOCS)
            )  # fmt: skip
            delta_smem.index(slot).store(delta)
        fence_async_shared()
        mbarrier.arrive(formed.index(slot), count=1)


@gluon.jit
@no_type_check
def _store(dk, dv, dk_ptr, dv_ptr, home, D: gl.constexpr, inside):
    """Sums to their slots."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    at = home[:, None] * D + gl.arange(0, D, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(dk_ptr + at, dk, mask=inside[:, None])
    gl.store(dv_ptr + at, dv, mask=inside[:, None])


@gluon.jit
@no_type_check
def _consumer(
    u_smem, w_smem, lse_smem, delta_smem, kept_smem, formed, free,
    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, dk_ptr, dv_ptr,
    T, S1, S2, w1, w2, IC, slots, BG, scale_log2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, V2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    AHEAD: gl.constexpr = STAGES - 2  # tiles
    dtype: gl.constexpr = u_smem.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    bg = gl.program_id(1)
    b = bg // G
    j, low, high = _job(T, S1, w1, IC, slots)
    first = low * R
    end = high * R  # of pairs
    tiles = gl.maximum(gl.cdiv(end - first, 2), 0)
    j += 64 * WG
    k_kept = kept_smem.index(WG)
    v_kept = kept_smem.index(2 + WG)
    zero = gl.zeros([64, 64], gl.float32, s_layout)
    which, _place = of_rows(gl.arange(0, 64, layout=columns))
    jt = j - (S1 - T) + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    keys = j + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    home = ((gl.program_id(0) % slots) * BG + bg).to(gl.int64) * S1 + keys
    # tiles with a query that sees one of the keys, and of them those whose queries see them all
    mine_from = gl.minimum(gl.maximum((j - (S1 - T)) * R - first, 0) // 2, tiles)
    mine_to = gl.maximum(gl.minimum(gl.cdiv((j - (S1 - T) + 63 + w1) * R - first, 2), tiles), mine_from)
    whole_from = gl.cdiv(gl.maximum((j - (S1 - T) + 63) * R - first, 0), 2)
    whole_to = ((j - (S1 - T) + w1) * R - first) // 2
    dk = gl.zeros([64, D], gl.float32, o_layout)
    dv = gl.zeros([64, D], gl.float32, o_layout)
    begin = -(1 << 30)  # of the document that the sums belong to
    until = T - 1  # its last query so far
    for n in range(AHEAD):
        _form(n, tiles, first, end, u_smem, w_smem, lse_smem, delta_smem, formed, free, q_ptr, qb_ptr, k2_ptr, k2b_ptr,
              v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, b, bg % G, T, S2, w2, k2_bias, v2_bias,
              R, G, D, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, WG)  # fmt: skip
    for n in range(mine_from):
        _form(n + AHEAD, tiles, first, end, u_smem, w_smem, lse_smem, delta_smem, formed, free, q_ptr, qb_ptr, k2_ptr,
              k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, b, bg % G, T, S2, w2, k2_bias, v2_bias,
              R, G, D, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, WG)  # fmt: skip
        mbarrier.arrive(free.index(n % STAGES), count=1)
    for n in range(mine_from, mine_to):
        slot = n % STAGES
        whole = (n >= whole_from) & (n < whole_to)
        if HAS_DOCS:  # a tile is of one query: what other documents' queries do to these keys is dropped
            query = (first + 2 * n) // R
            reach = gl.load(reach_ptr + b * T + query)
            if (reach > 0) & (query - reach + 1 != begin):
                jt_o = keys - (S1 - T)
                _store(dk, dv, dk_ptr, dv_ptr, home, D, (jt_o >= begin) & (jt_o <= until) & (keys < S1))
                dk = gl.zeros([64, D], gl.float32, o_layout)
                dv = gl.zeros([64, D], gl.float32, o_layout)
                begin = query - reach + 1
            until = query
            whole = whole & (j - (S1 - T) >= begin)
        u = u_smem.index(slot)
        w = w_smem.index(slot)
        mbarrier.wait(formed.index(slot), (n // STAGES) & 1)
        less_delta = zero - delta_smem.index(slot).load(columns)[None, :]
        s_token = warpgroup_mma(k_kept, u.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp_token = warpgroup_mma(v_kept, w.permute((1, 0)), less_delta, is_async=True)
        lse = lse_smem.index(slot).load(columns)
        s = warpgroup_mma_wait(1, deps=[s_token])
        p = gl.exp2(s * scale_log2 - lse[None, :])
        if not whole:
            i = gl.minimum(first + 2 * n + which, end - 1) // R
            both = (jt[:, None] <= i[None, :]) & (jt[:, None] > (i - w1)[None, :])
            if HAS_DOCS:
                both = both & (jt >= begin)[:, None]
            p = gl.where(both, p, 0.0)
        weights = gl.convert_layout(p.to(dtype), p_layout)
        dv_token = warpgroup_mma(weights, w, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp_token])
        d_weights = gl.convert_layout((p * dp).to(dtype), p_layout)
        dk_token = warpgroup_mma(d_weights, u, dk, is_async=True)
        # while the products run
        _form(n + AHEAD, tiles, first, end, u_smem, w_smem, lse_smem, delta_smem, formed, free, q_ptr, qb_ptr, k2_ptr,
              k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, b, bg % G, T, S2, w2, k2_bias, v2_bias,
              R, G, D, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, WG)  # fmt: skip
        dv, dk = warpgroup_mma_wait(0, deps=[dv_token, dk_token])
        mbarrier.arrive(free.index(slot), count=1)
    for n in range(mine_to, tiles):
        _form(n + AHEAD, tiles, first, end, u_smem, w_smem, lse_smem, delta_smem, formed, free, q_ptr, qb_ptr, k2_ptr,
              k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, b, bg % G, T, S2, w2, k2_bias, v2_bias,
              R, G, D, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, WG)  # fmt: skip
        mbarrier.arrive(free.index(n % STAGES), count=1)
    inside = keys < S1
    if HAS_DOCS:
        inside = inside & (keys - (S1 - T) >= begin) & (keys - (S1 - T) <= until)
    _store(dk, dv, dk_ptr, dv_ptr, home, D, inside)


@gluon.jit
@no_type_check
def narrow_keys_kernel(
    q_ptr, qb_ptr, k_ptr, v_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, dk_ptr, dv_ptr,
    T, S1, S2, w1, w2, IC, slots, BG, scale_log2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, V2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    u_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], rows)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], rows)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], line)
    kept_smem = gl.allocate_shared_memory(dtype, [4, 64, D], rows)  # keys, then values
    formed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(formed.index(i), count=2)
        mbarrier.init(free.index(i), count=2)
    j, _low, _high = _job(T, S1, w1, IC, slots)
    bg = gl.program_id(1)
    for i in gl.static_range(2):
        keys = j + 64 * i + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
        d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
        at = (((bg // G) * S1 + keys).to(gl.int64) * G + bg % G)[:, None] * D + d[None, :]
        kept_smem.index(i).store(gl.load(k_ptr + at, mask=keys[:, None] < S1, other=0.0))
        kept_smem.index(2 + i).store(gl.load(v_ptr + at, mask=keys[:, None] < S1, other=0.0))
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    u_smem, w_smem, lse_smem, delta_smem, kept_smem, formed, free,
                    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, dk_ptr, dv_ptr,
                    T, S1, S2, w1, w2, IC, slots, BG, scale_log2, k2_bias, v2_bias,
                    R, G, D, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, FIRST,
                ),
            ),
            (
                _consumer,
                (
                    u_smem, w_smem, lse_smem, delta_smem, kept_smem, formed, free,
                    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr, dk_ptr, dv_ptr,
                    T, S1, S2, w1, w2, IC, slots, BG, scale_log2, k2_bias, v2_bias,
                    R, G, D, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, SECOND,
                ),
            ),
        ],
        [4],
        [240],
    )  # fmt: skip


class Shares(NamedTuple):
    """How the work is cut, and what that takes in slots."""

    blocks: int  # of 128 keys
    chunk: int  # queries of a program
    slots: int  # programs that share a block of keys


def cut(p: Problem) -> Shares:
    """Chunks of queries: few (each costs memory), but some programs for every processor."""
    batch, _, s1, _, groups, _, _ = p.shape
    blocks, span = -(-s1 // KEYS), KEYS + p.w1 - 1  # queries that see a block of keys
    wanted = max(1, -(-16 * processors(p.q.device) // (blocks * batch * groups)))
    chunk = next_power(-(-span // wanted), 32)
    return Shares(blocks, chunk, -(-(span - 1) // chunk) + 1)


def plan(
    p: Problem, cut: Shares, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None,
    sums: list[Tensor],
) -> Launch:  # fmt: skip
    """The launch that gives the shares of dk and dv; the tensors may be on the meta device."""
    batch, steps, s1, s2, groups, per_group, dim = p.shape
    (q, qb), (k2, k2b) = p.right(p.q), p.left(p.k2)
    args = {
        "q_ptr": q, "qb_ptr": qb, "k_ptr": p.k, "v_ptr": p.v, "k2_ptr": k2, "k2b_ptr": k2b, "v2_ptr": p.v2,
        "do_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta, "reach_ptr": lse if reach is None else reach,
        "dk_ptr": sums[0], "dv_ptr": sums[1],
        "T": steps, "S1": s1, "S2": s2, "w1": p.w1, "w2": p.w2, "IC": cut.chunk, "slots": cut.slots,
        "BG": batch * groups, "scale_log2": scale * LOG2E, "k2_bias": p.k2_bias, "v2_bias": p.v2_bias,
    }  # fmt: skip
    constants = {
        "R": per_group, "G": groups, "D": dim, "STAGES": 4, "DETERMINANT": p.determinant,
        "K2_BIAS": p.k2_bias != 0, "V2_BIAS": p.v2_bias != 0, "HAS_DOCS": reach is not None,
    }  # fmt: skip
    return Launch(narrow_keys_kernel, (cut.blocks * cut.slots, batch * groups), args, constants, num_warps=4)


def partial_sums(p: Problem, cut: Shares, has_docs: bool) -> list[Tensor]:
    """Room for the shares of dk and dv (slots, B * G, S1, D), float32; with documents not all is written."""
    batch, _, s1, _, groups, _, dim = p.shape
    make = torch.zeros if has_docs else torch.empty
    return [make(cut.slots, batch * groups, s1, dim, dtype=torch.float32, device=p.q.device) for _ in range(2)]


def launch(
    p: Problem, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None
) -> list[Tensor]:
    """dk and dv (B, S1, G, D), float32."""
    shares = cut(p)
    sums = partial_sums(p, shares, reach is not None)
    plan(p, shares, scale, grad_out, lse, delta, reach, sums).run()
    shape = (p.q.shape[0], p.k.shape[2])
    return [(x.sum(0) * f).unflatten(0, shape).transpose(1, 2) for x, f in zip(sums, (scale, 1.0), strict=True)]
