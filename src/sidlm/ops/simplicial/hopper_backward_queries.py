"""The gradient of q on Hopper: the row-stationary half of the backward pass over virtual queries, in Gluon.

Tiles and warps are those of hopper_forward.py. Each warpgroup has two sets of virtual queries and virtual output
gradients, and the result of a tile, float32, takes the place of the set it was made from: the shaper merges tile t,
then forms tile t + 2 there. Per pair it takes three products, S = U K', dP = dO' V'
with dO' = dO o v2, and dU = dS K; the softmax is known from the LSE. At the end of a tile dq = sum_s dU o k2. No row is
shared between programs: the same bits every time.
"""

from typing import no_type_check

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

from sidlm.ops.simplicial.hopper_tiles import (
    clear_before,
    first_tile,
    hide,
    load_offsets,
    load_pairs,
    next_tile,
    processors,
    stream_keys,
    tile_arguments,
    virtual_cross,
    visible,
    window,
)
from sidlm.ops.simplicial.prepare import Launch, Problem


@gluon.jit
@no_type_check
def _shaper(
    u_smem, z_smem, lse_smem, delta_smem, u_full, z_full,
    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dqb_ptr, reach_ptr,
    T, S2, w2, tiles, total, scale, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr, DETERMINANT: gl.constexpr,
    HAS_DOCS: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """Virtual queries and virtual output gradients in, gradients of q out, two tiles behind."""
    local, bg, local_stride, bg_stride = first_tile(tiles)
    old_local, old_bg, _a, _b = first_tile(tiles)
    steps = gl.cdiv(total - gl.program_id(0), gl.num_programs(0))
    for step in range(steps):
        if step >= 2:
            _merge(z_smem, z_full, step - 2, old_local, old_bg, k2_ptr, k2b_ptr, dq_ptr, dqb_ptr, reach_ptr,
                   T, S2, w2, scale, k2_bias, R, G, D, BS, DETERMINANT, HAS_DOCS, MANY)  # fmt: skip
            old_local, old_bg = next_tile(old_local, old_bg, tiles, local_stride, bg_stride)
        first = local * (2 * (64 // BS))
        q, d_out, lse, delta = _fetch(first, bg, q_ptr, do_ptr, lse_ptr, delta_ptr, T, R, G, D, BS)
        second = first + 64 // BS
        q2, d_out2, lse2, delta2 = _fetch(second, bg, q_ptr, do_ptr, lse_ptr, delta_ptr, T, R, G, D, BS)
        place = step & 1
        _form(u_smem, 2 * place, first, bg, q, d_out, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, T, S2, k2_bias, v2_bias,
              R, G, D, BS, DETERMINANT, MANY)  # fmt: skip
        _form(u_smem, 4 + 2 * place, second, bg, q2, d_out2, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, T, S2, k2_bias, v2_bias,
              R, G, D, BS, DETERMINANT, MANY)  # fmt: skip
        _statistics(lse_smem, delta_smem, place, first, bg, lse, delta, reach_ptr, T, S2, w2, R, G, BS, HAS_DOCS)
        _statistics(lse_smem, delta_smem, 2 + place, second, bg, lse2, delta2, reach_ptr, T, S2, w2, R, G, BS, HAS_DOCS)
        fence_async_shared()
        mbarrier.arrive(u_full.index(place), count=1)
        local, bg = next_tile(local, bg, tiles, local_stride, bg_stride)
    for step in range(gl.maximum(steps, 2), steps + 2):
        if step > steps:  # one signal more than tiles: it lets the last result in
            mbarrier.arrive(u_full.index(steps & 1), count=1)
        _merge(z_smem, z_full, step - 2, old_local, old_bg, k2_ptr, k2b_ptr, dq_ptr, dqb_ptr, reach_ptr,
               T, S2, w2, scale, k2_bias, R, G, D, BS, DETERMINANT, HAS_DOCS, MANY)  # fmt: skip
        old_local, old_bg = next_tile(old_local, old_bg, tiles, local_stride, bg_stride)


@gluon.jit
@no_type_check
def _fetch(
    first, bg, q_ptr, do_ptr, lse_ptr, delta_ptr, T,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr,
):  # fmt: skip
    """What memory alone has of 64 // BS pairs: q and dO [pairs, 1, D], LSE and delta [pairs]."""
    PAIRS: gl.constexpr = 64 // BS
    layout: gl.constexpr = gl.BlockedLayout([PAIRS, 1, 8], [1, 256 // D, D // 8], [1, 4, 1], [2, 1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])  # [PAIRS, BS]
    b = bg // G
    q = load_pairs(q_ptr, first, b, bg % G, T, R, G, BS, D, layout)
    d_out = load_pairs(do_ptr, first, b, bg % G, T, R, G, BS, D, layout)
    pairs = first + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, flat))
    at = (b * T + pairs // R).to(gl.int64) * (R * G) + (bg % G) * R + pairs % R
    lse = gl.load(lse_ptr + at, mask=pairs < T * R, other=-float("inf"))
    delta = gl.load(delta_ptr + at, mask=pairs < T * R, other=0.0)
    return q, d_out, lse, delta


@gluon.jit
@no_type_check
def _form(
    u_smem, place, first, bg, q, d_out, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, T, S2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr, DETERMINANT: gl.constexpr,
    MANY: gl.constexpr,
):  # fmt: skip
    """u and dO o v2 of the 64 rows of a warpgroup."""
    dtype: gl.constexpr = u_smem.dtype
    layout: gl.constexpr = gl.BlockedLayout([64 // BS, 1, 8], [1, 256 // D, D // 8], [1, 4, 1], [2, 1, 0])
    b = bg // G
    k2 = load_offsets(k2_ptr, first, b, bg % G, T, S2, R, G, BS, D, MANY, layout)
    v2 = load_offsets(v2_ptr, first, b, bg % G, T, S2, R, G, BS, D, MANY, layout).to(gl.float32)
    if DETERMINANT:
        k2b = load_offsets(k2b_ptr, first, b, bg % G, T, S2, R, G, BS, D, MANY, layout)
        qb = load_pairs(qb_ptr, first, b, bg % G, T, R, G, BS, D, layout)
        u = virtual_cross(q, qb, k2, k2b)
    else:
        u = (q.to(gl.float32) * (k2.to(gl.float32) + k2_bias)).to(dtype)
    u_smem.index(place).store(gl.reshape(u, [64, D]))
    o = d_out.to(gl.float32) * (v2 + v2_bias)
    u_smem.index(place + 1).store(gl.reshape(o.to(dtype), [64, D]))


@gluon.jit
@no_type_check
def _statistics(
    lse_smem, delta_smem, place, first, bg, lse, delta, reach_ptr, T, S2, w2,
    R: gl.constexpr, G: gl.constexpr, BS: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    """For every row its pair's LSE, in powers of two, infinite for offsets out of sight, and delta."""
    PAIRS: gl.constexpr = 64 // BS
    LOG2E: gl.constexpr = 1.4426950408889634
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])  # [PAIRS, BS]
    table: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    pairs = first + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, flat))
    lo, hi = visible(gl.minimum(pairs // R, T - 1), reach_ptr, bg // G, T, S2, w2, HAS_DOCS)
    seen = hi[:, None] - gl.arange(0, BS, layout=gl.SliceLayout(0, flat))[None, :] >= lo[:, None]
    seen = seen & (lse > -float("inf"))[:, None]
    lse = gl.where(seen, (lse * LOG2E)[:, None], float("inf"))
    lse_smem._reinterpret(gl.float32, [4, PAIRS, BS], table).index(place).store(lse)
    delta = gl.where(seen, delta[:, None], 0.0)
    delta_smem._reinterpret(gl.float32, [4, PAIRS, BS], table).index(place).store(delta)


@gluon.jit
@no_type_check
def _merge(
    z_smem, z_full, step, local, bg, k2_ptr, k2b_ptr, dq_ptr, dqb_ptr, reach_ptr,
    T, S2, w2, scale, k2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr, DETERMINANT: gl.constexpr,
    HAS_DOCS: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """dq = scale * sum_s dU o k2; for the determinant the two sums with permuted k2, still to be put in place."""
    PAIRS: gl.constexpr = 64 // BS
    wide: gl.constexpr = gl.BlockedLayout([2, 2], [256 // D, D // 8], [1, 4], [1, 0])  # sums over rows stay in a warp
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    s = gl.arange(0, BS, layout=gl.SliceLayout(1, wide))
    b = bg // G
    parts = z_smem._reinterpret(gl.float32, [4 * PAIRS, BS, D], z_smem.layout)
    start = ((b * S2).to(gl.int64) * G + bg % G) * D
    if not MANY:  # one query, so one set of k2 for all pairs of the tile
        m_lo, m_hi = visible(gl.minimum(local * (2 * PAIRS) // R, T - 1), reach_ptr, b, T, S2, w2, HAS_DOCS)
        m = m_hi - s
        at = start + m[:, None] * (G * D) + d[None, :]
        k2 = gl.load(k2_ptr + at, mask=(m >= m_lo)[:, None], other=0.0)
        k2b = k2
        if DETERMINANT:
            k2b = gl.load(k2b_ptr + at, mask=(m >= m_lo)[:, None], other=0.0)
    for wg in range(2):
        place = (2 * wg + (step & 1)) * PAIRS
        mbarrier.wait(z_full.index(wg), step & 1)
        for i in range(PAIRS):
            pair = local * (2 * PAIRS) + wg * PAIRS + i
            query = gl.minimum(pair // R, T - 1)
            if MANY:
                m_lo, m_hi = visible(query, reach_ptr, b, T, S2, w2, HAS_DOCS)
                m = m_hi - s
                at = start + m[:, None] * (G * D) + d[None, :]
                k2 = gl.load(k2_ptr + at, mask=(m >= m_lo)[:, None], other=0.0)
                k2b = k2
                if DETERMINANT:
                    k2b = gl.load(k2b_ptr + at, mask=(m >= m_lo)[:, None], other=0.0)
            z = gl.where((m >= m_lo)[:, None], parts.index(place + i).load(wide), 0.0)
            out_at = ((b * T + query).to(gl.int64) * (R * G) + (bg % G) * R + pair % R) * D
            inside = (pair < T * R) & (d < D)
            if DETERMINANT:
                gl.store(dq_ptr + out_at + d, gl.sum(z * k2.to(gl.float32), 0) * scale, mask=inside)
                gl.store(dqb_ptr + out_at + d, gl.sum(z * k2b.to(gl.float32), 0) * scale, mask=inside)
            else:
                out = gl.sum(z * (k2.to(gl.float32) + k2_bias), 0) * scale
                gl.store(dq_ptr + out_at + d, out.to(dq_ptr.dtype.element_ty), mask=inside)


@gluon.jit
@no_type_check
def _hand_over(acc, z_smem, z_full, turn, WG: gl.constexpr):
    z_smem.index(2 * WG + (turn & 1)).store(acc)
    mbarrier.arrive(z_full.index(WG), count=1)


@gluon.jit
@no_type_check
def _consumer(
    k_smem, v_smem, u_smem, z_smem, lse_smem, delta_smem,
    k_full, k_empty, v_full, v_empty, u_full, z_full, order, reach_ptr,
    T, S1, w1, tiles, total, scale_log2,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, BS: gl.constexpr, STAGES: gl.constexpr,
    HAS_DOCS: gl.constexpr, MANY: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """dU of 64 virtual queries a tile; each block's S and dP run beside the dU of the block before."""
    dtype: gl.constexpr = k_smem.dtype
    PAIRS: gl.constexpr = 64 // BS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)

    row = gl.arange(0, 64, layout=rows_s)
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    acc = gl.zeros([64, D], gl.float32, o_layout)
    d_s = gl.zeros([64, BN], dtype, p_layout)
    step = 0  # blocks taken
    turn = 0  # tiles taken
    local, bg, local_stride, bg_stride = first_tile(tiles)
    for _ in range(gl.program_id(0), total, gl.num_programs(0)):
        lo, hi, all_lo = window(local, bg // G, reach_ptr, T, S1, w1, R, PAIRS, HAS_DOCS)
        blocks = gl.maximum(gl.cdiv(hi - lo + 1, BN), 1)
        start = hi + 1 - blocks * BN
        if MANY:
            query = gl.minimum((local * (2 * PAIRS) + WG * PAIRS + row // BS) // R, T - 1)
            row_lo, row_hi = visible(query, reach_ptr, bg // G, T, S1, w1, HAS_DOCS)
        u = u_smem.index(4 * WG + 2 * (turn & 1))
        o = u_smem.index(4 * WG + 2 * (turn & 1) + 1)
        mbarrier.wait(u_full.index(turn & 1), (turn >> 1) & 1)
        lse = lse_smem.index(2 * WG + (turn & 1)).load(rows_s)
        delta = delta_smem.index(2 * WG + (turn & 1)).load(rows_s)
        for n in range(blocks):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            before = (step + STAGES - 1) % STAGES
            mbarrier.wait(k_full.index(slot), phase)
            mbarrier.wait(order.index(WG), (step & 1) ^ 1 ^ WG)  # in turns: one multiplies while the other weighs
            s_token = warpgroup_mma(u, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            dp_token = warpgroup_mma(o, v_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            acc_token = warpgroup_mma(d_s, k_smem.index(before), acc, is_async=True)
            mbarrier.arrive(order.index(1 - WG), count=1)
            s, dp = warpgroup_mma_wait(1, deps=[s_token, dp_token])
            mbarrier.arrive(v_empty.index(slot), count=1)
            p = gl.exp2(s * scale_log2 - lse[:, None])
            next_d_s = p * (dp - delta[:, None])
            if MANY:
                next_d_s = gl.where(p == 0.0, 0.0, hide(next_d_s, start + n * BN + column, row_lo, row_hi, 0.0))
            elif start + n * BN < all_lo:  # only the first block can hold keys out of sight
                next_d_s = gl.where((start + n * BN + column >= all_lo)[None, :], next_d_s, 0.0)
            next_d_s = gl.convert_layout(next_d_s.to(dtype), p_layout)
            acc, d_s = warpgroup_mma_wait(0, deps=[acc_token, next_d_s])
            mbarrier.arrive(k_empty.index(before), count=1, pred=step > 0)
            if n == 0:
                if turn > 0:
                    _hand_over(acc, z_smem, z_full, turn - 1, WG)
                acc = gl.zeros([64, D], gl.float32, o_layout)
                if start < lo:
                    clear_before(k_smem.index(slot), start, lo, D, BN)
            step += 1
        turn += 1
        local, bg = next_tile(local, bg, tiles, local_stride, bg_stride)
    before = (step + STAGES - 1) % STAGES
    acc_token = warpgroup_mma(d_s, k_smem.index(before), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    mbarrier.wait(u_full.index(turn & 1), (turn >> 1) & 1)
    _hand_over(acc, z_smem, z_full, turn - 1, WG)


@gluon.jit
@no_type_check
def backward_queries_kernel(
    k_desc, v_desc, q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dqb_ptr, reach_ptr,
    T, S1, S2, w1, w2, tiles, total, scale_log2, scale, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, BS: gl.constexpr, STAGES: gl.constexpr,
    DETERMINANT: gl.constexpr, HAS_DOCS: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    PAIRS: gl.constexpr = 64 // BS
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    CONSUMER: gl.constexpr = 176 if DETERMINANT else 184  # registers; its shaper has twice as much to load
    SHAPER: gl.constexpr = 136 if DETERMINANT else 120
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v_desc.layout)
    u_smem = gl.allocate_shared_memory(dtype, [8, 64, D], rows)  # (warpgroup, set, u or dO o v2)
    z_smem = u_smem._reinterpret(gl.float32, [4, 64, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    lse_smem = gl.allocate_shared_memory(gl.float32, [4, 64], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [4, 64], line)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    u_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    z_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(u_full.index(i), count=1)
        mbarrier.init(z_full.index(i), count=1)
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    k_smem, v_smem, u_smem, z_smem, lse_smem, delta_smem,
                    k_full, k_empty, v_full, v_empty, u_full, z_full, order, reach_ptr,
                    T, S1, w1, tiles, total, scale_log2, R, G, D, BN, BS, STAGES, HAS_DOCS, MANY, FIRST,
                ),
            ),
            (
                _consumer,
                (
                    k_smem, v_smem, u_smem, z_smem, lse_smem, delta_smem,
                    k_full, k_empty, v_full, v_empty, u_full, z_full, order, reach_ptr,
                    T, S1, w1, tiles, total, scale_log2, R, G, D, BN, BS, STAGES, HAS_DOCS, MANY, SECOND,
                ),
            ),
            (
                _shaper,
                (
                    u_smem, z_smem, lse_smem, delta_smem, u_full, z_full,
                    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, dqb_ptr, reach_ptr,
                    T, S2, w2, tiles, total, scale, k2_bias, v2_bias, R, G, D, BS, DETERMINANT, HAS_DOCS, MANY,
                ),
            ),
            (
                stream_keys,
                (
                    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, reach_ptr,
                    T, S1, w1, tiles, total, R, G, D, BN, STAGES, PAIRS, HAS_DOCS,
                ),
            ),
        ],
        [4, 4, 1],
        [CONSUMER, SHAPER, 24],
    )  # fmt: skip


def plan(
    p: Problem, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None, dqs: list[Tensor]
) -> Launch:
    """The launch that fills `outputs(p)`; the tensors may be on the meta device if it is only to be compiled."""
    args, constants = tile_arguments(p, scale, reach, lse, block=64, stages=3)
    args |= {"do_ptr": grad_out, "lse_ptr": lse, "delta_ptr": delta, "dq_ptr": dqs[0], "dqb_ptr": dqs[-1]}
    args["scale"] = scale
    grid = min(args["total"], processors(grad_out.device))
    return Launch(backward_queries_kernel, grid, args, constants, num_warps=4)


def outputs(p: Problem, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Room for what `launch` returns."""
    return [torch.empty_like(p.q, dtype=torch.float32 if p.determinant else dtype) for _ in range(1 + p.determinant)]


def launch(
    p: Problem, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, reach: Tensor | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dq in dtype (q's); for the determinant the two float32 sums of `prepare.Problem.rotations`."""
    dqs = outputs(p, dtype)
    plan(p, scale, grad_out, lse, delta, reach, dqs).run()
    return tuple(dqs)
