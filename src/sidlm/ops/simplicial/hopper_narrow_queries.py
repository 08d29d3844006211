"""Gradients of q, k2 and v2 on Hopper for narrow groups: sums over the rows of virtual queries, in Gluon.

Each warpgroup owns two pairs (query, head) with 32 places for second keys (hopper_narrow.py). Over the window of keys
it takes four products a pair of keys, S = U K', dP = W V', Z = P V and dU = dS K. Then, at the end of a tile,

    dq = sum over places dU o k2        dk2_m += dU o q        dv2_m += Z o dO

The sums of the 32 second keys in sight stay in shared memory while the queries of a program go by; when a place changes
hands its sums go to a slot in global memory that no other program and warpgroup writes. These are added in a fixed
order: the same bits every time.
"""

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sidlm.ops.simplicial.hopper_backward_queries import outputs
from sidlm.ops.simplicial.hopper_narrow import PLACES, of_rows, statistics, virtual_rows
from sidlm.ops.simplicial.hopper_narrow_sums import leave, merge
from sidlm.ops.simplicial.hopper_tiles import (
    clear_before,
    descriptor,
    hide,
    processors,
    thread_barrier,
    visible,
    window,
)
from sidlm.ops.simplicial.prepare import LOG2E, Launch, Problem, next_power
from sidlm.ops.simplicial.triton_backward_keys import difference

BLOCK = 64  # keys


@gluon.jit
@no_type_check
def _job(T, IC, R: gl.constexpr):
    """This program's queries [low, end), its first tile among those of its sequence and group, and how many."""
    low = gl.program_id(0) * IC
    end = gl.minimum(low + IC, T)
    return low, end, low * R // 4, gl.cdiv((end - low) * R, 4)


@gluon.jit
@no_type_check
def _producer(
    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, reach_ptr, T, S1, w1, IC,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    bg = gl.program_id(1)
    column = bg % G * D
    step = 0
    _low, _end, tile, tiles = _job(T, IC, R)
    for t in range(tile, tile + tiles):
        lo, hi, _all_lo = window(t, bg // G, reach_ptr, T, S1, w1, R, 2, HAS_DOCS)
        blocks = gl.maximum(gl.cdiv(hi - lo + 1, BN), 1)
        for n in range(blocks):
            j = hi + 1 - (blocks - n) * BN
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [bg // G, j, column], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [bg // G, j, column], v_full.index(slot), v_smem.index(slot))
            step += 1


@gluon.jit
@no_type_check
def _consumer(
    k_smem, v_smem, u_smem, ring_smem, k_full, k_empty, v_full, v_empty,
    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr,
    dq_ptr, dqb_ptr, dk2_ptr, dk2b_ptr, dv2_ptr,
    T, S1, S2, w1, w2, IC, BG, away, scale_log2, scale, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    DETERMINANT: gl.constexpr, K2_BIAS: gl.constexpr, V2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_smem.dtype
    MANY: gl.constexpr = R % 4 != 0  # the tile spans queries
    SUMS: gl.constexpr = 3 if DETERMINANT else 2  # of dv2, of dk2 and, for a cross product, of dk2 again
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    # a pair's rows of o_layout: what a thread has of them stays where it is
    REGISTERS: gl.constexpr = [[0, 1], [0, 8], [0, 16], [0, 32]] + ([[0, 64]] if D == 128 else [])
    pair_layout: gl.constexpr = gl.DistributedLinearLayout(
        REGISTERS, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [32, D]
    )
    bg = gl.program_id(1)
    b = bg // G
    group = bg % G
    low, high, tile, tiles = _job(T, IC, R)
    end = high * R  # of pairs
    u = u_smem.index(2 * WG)
    w = u_smem.index(2 * WG + 1)
    scratch = u_smem._reinterpret(gl.float32, [4, 32, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    here = (WG * BG + bg).to(gl.int64) * S2 * D  # of (2, warpgroup, B * G, S2, D), its second half `away`
    bound = low + S2 - T
    row = gl.arange(0, 64, layout=rows_s)
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    which, _place = of_rows(row)
    for kind in gl.static_range(SUMS):
        ring_smem.index(WG * SUMS + kind).store(gl.zeros([32, D], gl.float32, pair_layout))
    old_last = gl.minimum(tile * 4 + 2 * WG, end - 1) // R + S2 - T
    step = 0
    for t in range(tile, tile + tiles):
        lo, hi, all_lo = window(t, b, reach_ptr, T, S1, w1, R, 2, HAS_DOCS)
        blocks = gl.maximum(gl.cdiv(hi - lo + 1, BN), 1)
        start = hi + 1 - blocks * BN
        pair = t * 4 + 2 * WG
        u.store(virtual_rows(q_ptr, qb_ptr, k2_ptr, k2b_ptr, pair, end, b, group, T, S2, w2, k2_bias, reach_ptr,
                             R, G, D, DETERMINANT, K2_BIAS, HAS_DOCS))  # fmt: skip
        w.store(virtual_rows(do_ptr, do_ptr, v2_ptr, v2_ptr, pair, end, b, group, T, S2, w2, v2_bias, reach_ptr,
                             R, G, D, False, V2_BIAS, HAS_DOCS))  # fmt: skip
        lse, delta = statistics(row, pair, end, lse_ptr, delta_ptr, b, group, T, S2, w2, reach_ptr, R, G, HAS_DOCS)
        all_hi = t * 4 // R + S1 - T  # last key that all rows see
        fence_async_shared()
        thread_barrier()
        du = gl.zeros([64, D], gl.float32, o_layout)
        z = gl.zeros([64, D], gl.float32, o_layout)
        if HAS_DOCS:  # noqa: SIM102 (a constant: not compiled otherwise)
            if start < lo:  # keys of before the window are of another document, and 0 * NaN is NaN
                mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
                clear_before(k_smem.index(step % STAGES).reshape([BN, D]), start, lo, D, BN)
                clear_before(v_smem.index(step % STAGES).reshape([BN, D]), start, lo, D, BN)
                thread_barrier()
        for n in range(blocks):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            first = start + n * BN
            k = k_smem.index(slot).reshape([BN, D])
            v = v_smem.index(slot).reshape([BN, D])
            mbarrier.wait(k_full.index(slot), phase)
            s_token = warpgroup_mma(u, k.permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            dp_token = warpgroup_mma(w, v.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s_token])
            p = gl.exp2(s * scale_log2 - lse[:, None])
            edge = first < all_lo
            if MANY:
                edge = edge | (first + BN - 1 > all_hi)
            if edge:
                p = _hide(p, first + column, pair + which, end, lo, b, reach_ptr, T, S1, w1, R, MANY, HAS_DOCS)
            weights = gl.convert_layout(p.to(dtype), p_layout)
            z_token = warpgroup_mma(weights, v, z, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp_token])
            d_s = p * (dp - delta[:, None])
            if edge:
                d_s = _hide(d_s, first + column, pair + which, end, lo, b, reach_ptr, T, S1, w1, R, MANY, HAS_DOCS)
            d_weights = gl.convert_layout(d_s.to(dtype), p_layout)
            du_token = warpgroup_mma(d_weights, k, du, is_async=True)
            z, du = warpgroup_mma_wait(0, deps=[z_token, du_token])
            mbarrier.arrive(k_empty.index(slot), count=1)
            mbarrier.arrive(v_empty.index(slot), count=1)
            step += 1
        old_last = merge(
            du, z, ring_smem, scratch, pair, end, old_last, q_ptr, qb_ptr, k2_ptr, k2b_ptr, do_ptr, dq_ptr, dqb_ptr,
            dk2_ptr + here, dk2b_ptr + here, dv2_ptr + here, reach_ptr, b, group, T, S2, w2, scale, k2_bias,
            bound, away, R, G, D, DETERMINANT, HAS_DOCS, WG, pair_layout,
        )  # fmt: skip
    place = gl.arange(0, 32, layout=gl.SliceLayout(1, pair_layout))
    m = old_last - ((old_last - place) & 31)
    for kind in gl.static_range(SUMS):
        out_ptr = dv2_ptr if kind == 0 else (dk2_ptr if kind == 1 else dk2b_ptr)
        sums = ring_smem.index(WG * SUMS + kind).load(pair_layout)
        leave(sums, out_ptr + here, m, m == m, bound, away, D, pair_layout)


@gluon.jit
@no_type_check
def _hide(
    x, keys, pairs, end, lo, b, reach_ptr, T, S1, w1, R: gl.constexpr, MANY: gl.constexpr, HAS_DOCS: gl.constexpr
):
    """Zero for keys that the row's query does not see."""
    if MANY:
        query = gl.minimum(pairs, end - 1) // R
        row_lo, row_hi = visible(query, reach_ptr, b, T, S1, w1, HAS_DOCS)
        x = hide(x, keys, row_lo, row_hi, 0.0)
    else:
        x = gl.where((keys >= lo)[None, :], x, 0.0)
    return x


@gluon.jit
@no_type_check
def narrow_queries_kernel(
    k_desc, v_desc, q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr,
    dq_ptr, dqb_ptr, dk2_ptr, dk2b_ptr, dv2_ptr,
    T, S1, S2, w1, w2, IC, BG, away, scale_log2, scale, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    DETERMINANT: gl.constexpr, K2_BIAS: gl.constexpr, V2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    SUMS: gl.constexpr = 3 if DETERMINANT else 2
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, BN, D], v_desc.layout)
    u_smem = gl.allocate_shared_memory(dtype, [4, 64, D], rows)  # u and w of each warpgroup
    ring_smem = gl.allocate_shared_memory(gl.float32, [2 * SUMS, 32, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    k_smem, v_smem, u_smem, ring_smem, k_full, k_empty, v_full, v_empty,
                    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr,
                    dq_ptr, dqb_ptr, dk2_ptr, dk2b_ptr, dv2_ptr,
                    T, S1, S2, w1, w2, IC, BG, away, scale_log2, scale, k2_bias, v2_bias,
                    R, G, D, BN, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, FIRST,
                ),
            ),
            (
                _consumer,
                (
                    k_smem, v_smem, u_smem, ring_smem, k_full, k_empty, v_full, v_empty,
                    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, reach_ptr,
                    dq_ptr, dqb_ptr, dk2_ptr, dk2b_ptr, dv2_ptr,
                    T, S1, S2, w1, w2, IC, BG, away, scale_log2, scale, k2_bias, v2_bias,
                    R, G, D, BN, STAGES, DETERMINANT, K2_BIAS, V2_BIAS, HAS_DOCS, SECOND,
                ),
            ),
            (
                _producer,
                (
                    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, reach_ptr, T, S1, w1, IC,
                    R, G, D, BN, STAGES, HAS_DOCS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


class Shares(NamedTuple):
    """How the queries are cut."""

    chunk: int  # queries of a program, at least as many as there are places
    programs: int


def cut(p: Problem) -> Shares:
    """Chunks of queries: long, since each meets 31 second keys of the one before, but some for every processor."""
    batch, steps, _, _, groups, _, _ = p.shape
    wanted = max(1, -(-4 * processors(p.q.device) // (batch * groups)))
    chunk = min(max(next_power(-(-steps // wanted), PLACES), PLACES), 256)
    return Shares(chunk, -(-steps // chunk))


def partial_sums(p: Problem) -> list[Tensor]:
    """Room for the shares of dk2, of dk2 again for the determinant, and of dv2 (slots, B * G, S2, D), float32."""
    batch, _, _, s2, groups, _, dim = p.shape
    like = {"dtype": torch.float32, "device": p.q.device}
    return [torch.zeros(4, batch * groups, s2, dim, **like) for _ in range(2 + p.determinant)]  # not all is written


def plan(
    p: Problem, cut: Shares, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None,
    dqs: list[Tensor], sums: list[Tensor],
) -> Launch:  # fmt: skip
    """The launch that gives dq and the shares of dk2 and dv2; the tensors may be on the meta device."""
    batch, steps, s1, s2, groups, per_group, dim = p.shape
    (q, qb), (k2, k2b) = p.right(p.q), p.left(p.k2)
    k, v = (descriptor(x.view(batch, s1, groups * dim), 1, BLOCK, dim) for x in (p.k, p.v))
    args = {
        "k_desc": k, "v_desc": v, "q_ptr": q, "qb_ptr": qb, "k2_ptr": k2, "k2b_ptr": k2b, "v2_ptr": p.v2,
        "do_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta, "reach_ptr": lse if reach is None else reach,
        "dq_ptr": dqs[0], "dqb_ptr": dqs[-1], "dk2_ptr": sums[0], "dk2b_ptr": sums[-2], "dv2_ptr": sums[-1],
        "T": steps, "S1": s1, "S2": s2, "w1": p.w1, "w2": p.w2, "IC": cut.chunk, "BG": batch * groups,
        "away": 2 * batch * groups * s2 * dim, "scale_log2": scale * LOG2E, "scale": scale, "k2_bias": p.k2_bias,
        "v2_bias": p.v2_bias,
    }  # fmt: skip
    constants = {
        "R": per_group, "G": groups, "D": dim, "BN": BLOCK, "STAGES": 2 if p.determinant else 3,  # what memory holds
        "DETERMINANT": p.determinant, "K2_BIAS": p.k2_bias != 0, "V2_BIAS": p.v2_bias != 0,
        "HAS_DOCS": reach is not None,
    }  # fmt: skip
    return Launch(narrow_queries_kernel, (cut.programs, batch * groups), args, constants, num_warps=4)


def launch(
    p: Problem, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq in dtype (q's), dk2 and dv2 (B, S2, G, D), float32."""
    sums, dqs = partial_sums(p), outputs(p, dtype)
    plan(p, cut(p), scale, grad_out, lse, delta, reach, dqs, sums).run()
    *parts, dv2 = (x.sum(0).unflatten(0, (p.q.shape[0], p.k.shape[2])).transpose(1, 2) for x in sums)
    dq = difference(p, dqs).to(dtype or p.q.dtype) if p.determinant else dqs[0]
    dk2 = -difference(p, parts) if p.determinant else parts[0]  # dU cross q = -(q cross dU)
    return dq, dk2 * scale, dv2
