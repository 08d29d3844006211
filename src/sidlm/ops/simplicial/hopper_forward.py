"""The forward pass for Hopper: flash attention over virtual queries, warp-specialised, in Gluon.

One block of threads owns an SM and walks over tiles of 128 rows (query, head, offset s) with four roles. One warp
streams the keys and values of the tile's window through shared memory by TMA, 128 positions at a time. Two warpgroups
of 64 rows each run the loop of flash attention over their virtual queries ``u = q o k2``, the scores of block n + 1
issued before the values of block n. One warpgroup, the shaper, forms the virtual queries of the next tile and merges
the rows of the last: a joint softmax over the offsets s of a (query, head), times v2. README.md has the derivation.

Nobody waits for the shaper as long as it takes less than a tile's time for both. Each warpgroup has three slots of
64 x D in half precision. The virtual queries of tile t lie in slot t % 3; its result in float32 takes that slot and the
one before, (t + 2) % 3, while those of tile t + 1 are in the third. The shaper merges tile t before it forms tile
t + 2, so one signal a direction is enough.

Rows are packed in the order (query, head of the group, offset): any ratio of query heads to key heads fills the tile.
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
    virtual_queries,
    visible,
    window,
)
from sidlm.ops.simplicial.prepare import Launch, Problem


@gluon.jit
@no_type_check
def _shaper(
    u_smem, z_smem, top_smem, sum_smem, u_full, z_full,
    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, out_ptr, lse_ptr, reach_ptr,
    T, S2, w2, tiles, total, scale_log2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """The elementwise ends of every tile: virtual queries in, merged outputs out, two tiles behind."""
    local, bg, local_stride, bg_stride = first_tile(tiles)
    old_local, old_bg, _a, _b = first_tile(tiles)
    steps = gl.cdiv(total - gl.program_id(0), gl.num_programs(0))
    for step in range(steps + 2):
        if step >= 2:
            _merge(z_smem, top_smem, sum_smem, z_full, step - 2, old_local, old_bg, v2_ptr, out_ptr,
                   lse_ptr, reach_ptr, T, S2, w2, scale_log2, v2_bias, R, G, D, BS, HAS_DOCS, MANY)  # fmt: skip
            old_local, old_bg = next_tile(old_local, old_bg, tiles, local_stride, bg_stride)
        if step < steps:
            _form(u_smem, step, local, bg, q_ptr, qb_ptr, k2_ptr, k2b_ptr, T, S2, k2_bias,
                  R, G, D, BS, DETERMINANT, K2_BIAS, MANY)  # fmt: skip
            local, bg = next_tile(local, bg, tiles, local_stride, bg_stride)
            fence_async_shared()
        if step <= steps:  # one signal more than tiles: it lets the last result in
            mbarrier.arrive(u_full.index(step & 1), count=1)


@gluon.jit
@no_type_check
def _form(
    u_smem, step, local, bg, q_ptr, qb_ptr, k2_ptr, k2b_ptr, T, S2, k2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    """u = q o k2, or k2 x q from permuted copies, into shared memory."""
    layout: gl.constexpr = gl.BlockedLayout([64 // BS, 1, 8], [1, 256 // D, D // 8], [1, 4, 1], [2, 1, 0])
    first = local * (2 * (64 // BS))
    second = first + 64 // BS
    b = bg // G
    k2 = load_offsets(k2_ptr, first, b, bg % G, T, S2, R, G, BS, D, MANY, layout)
    q = load_pairs(q_ptr, first, b, bg % G, T, R, G, BS, D, layout)
    q_second = q
    if not DETERMINANT:  # on the way while u is formed; the determinant has no registers for it
        q_second = load_pairs(q_ptr, second, b, bg % G, T, R, G, BS, D, layout)
    k2b = k2
    qb = q
    if DETERMINANT:
        k2b = load_offsets(k2b_ptr, first, b, bg % G, T, S2, R, G, BS, D, MANY, layout)
        qb = load_pairs(qb_ptr, first, b, bg % G, T, R, G, BS, D, layout)
    _combine(u_smem.index(step % 3), q, qb, k2, k2b, k2_bias, D, BS, DETERMINANT, K2_BIAS)
    if MANY:
        k2 = load_offsets(k2_ptr, second, b, bg % G, T, S2, R, G, BS, D, MANY, layout)
        k2b = k2
        if DETERMINANT:
            k2b = load_offsets(k2b_ptr, second, b, bg % G, T, S2, R, G, BS, D, MANY, layout)
    qb_second = q_second
    if DETERMINANT:
        q_second = load_pairs(q_ptr, second, b, bg % G, T, R, G, BS, D, layout)
        qb_second = load_pairs(qb_ptr, second, b, bg % G, T, R, G, BS, D, layout)
    _combine(u_smem.index(3 + step % 3), q_second, qb_second, k2, k2b, k2_bias, D, BS, DETERMINANT, K2_BIAS)


@gluon.jit
@no_type_check
def _combine(
    u_smem, q, qb, k2, k2b, k2_bias,
    D: gl.constexpr, BS: gl.constexpr, DETERMINANT: gl.constexpr, K2_BIAS: gl.constexpr,
):  # fmt: skip
    u = virtual_cross(q, qb, k2, k2b) if DETERMINANT else virtual_queries(q, k2, k2_bias, K2_BIAS)
    u_smem.store(gl.reshape(u, [64, D]))


@gluon.jit
@no_type_check
def _merge(
    z_smem, top_smem, sum_smem, z_full, step, local, bg, v2_ptr, out_ptr, lse_ptr, reach_ptr,
    T, S2, w2, scale_log2, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BS: gl.constexpr, HAS_DOCS: gl.constexpr,
    MANY: gl.constexpr,
):  # fmt: skip
    """Joint softmax over the offsets of each (query, head), times v2, into the output."""
    PAIRS: gl.constexpr = 64 // BS
    LN2: gl.constexpr = 0.6931471805599453
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])  # [PAIRS, BS]
    half: gl.constexpr = gl.BlockedLayout([2, 2], [512 // D, D // 16], [1, 4], [1, 0])  # sums over rows stay in a warp
    d = gl.arange(0, D // 2, layout=gl.SliceLayout(0, half))
    s = gl.arange(0, BS, layout=gl.SliceLayout(1, half))
    b = bg // G
    table: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    parts = z_smem._reinterpret(gl.float32, [6 * PAIRS, BS, D // 2], z_smem.layout)
    weights = sum_smem._reinterpret(gl.float32, [2 * PAIRS, BS], sum_smem.layout)
    tops = top_smem._reinterpret(gl.float32, [2, PAIRS, BS], table)
    sums_in = sum_smem._reinterpret(gl.float32, [2, PAIRS, BS], table)
    v2_start = ((b * S2).to(gl.int64) * G + bg % G) * D
    if not MANY:  # one query, so one set of v2 for all pairs of the tile
        m_lo, m_hi = visible(gl.minimum(local * (2 * PAIRS) // R, T - 1), reach_ptr, b, T, S2, w2, HAS_DOCS)
        m = m_hi - s
        at = v2_ptr + v2_start + (m[:, None] * (G * D) + d[None, :])
        v2_low = gl.load(at, mask=(m >= m_lo)[:, None], other=0.0)
        v2_high = gl.load(at + D // 2, mask=(m >= m_lo)[:, None], other=0.0)
    for wg in range(2):
        first = local * (2 * PAIRS) + wg * PAIRS
        low = (3 * wg + step % 3) * PAIRS
        high = (3 * wg + (step + 2) % 3) * PAIRS
        pairs = first + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, flat))
        lo, hi = visible(gl.minimum(pairs // R, T - 1), reach_ptr, b, T, S2, w2, HAS_DOCS)
        seen = hi[:, None] - gl.arange(0, BS, layout=gl.SliceLayout(0, flat))[None, :] >= lo[:, None]
        mbarrier.wait(z_full.index(wg), step & 1)
        top = gl.where(seen, tops.index(wg).load(flat), -1.0e30)
        joint = gl.max(top, 1)
        weight = gl.where(seen, gl.exp2((top - joint[:, None]) * scale_log2), 0.0)
        sums = gl.sum(gl.where(seen, weight * sums_in.index(wg).load(flat), 0.0), 1)
        some = sums > 0
        weight = weight * gl.where(some, 1.0 / sums, 0.0)[:, None]
        lse = gl.where(some, (joint * scale_log2 + gl.log2(sums)) * LN2, -float("inf"))
        lse_at = (b * T + pairs // R).to(gl.int64) * (R * G) + (bg % G) * R + pairs % R
        gl.store(lse_ptr + lse_at, lse, mask=pairs < T * R)
        sums_in.index(wg).store(weight)
        for i in range(PAIRS):
            query = gl.minimum((first + i) // R, T - 1)
            if MANY:
                m_lo, m_hi = visible(query, reach_ptr, b, T, S2, w2, HAS_DOCS)
                m = m_hi - s
                at = v2_ptr + v2_start + (m[:, None] * (G * D) + d[None, :])
                v2_low = gl.load(at, mask=(m >= m_lo)[:, None], other=0.0)
                v2_high = gl.load(at + D // 2, mask=(m >= m_lo)[:, None], other=0.0)
            w = weights.index(wg * PAIRS + i).load(gl.SliceLayout(1, half))
            row = (b * T + query).to(gl.int64) * (R * G) + (bg % G) * R + (first + i) % R
            here = out_ptr + row * D + d
            inside = (first + i < T * R) & (d < D)
            out = _weigh(parts.index(low + i), v2_low, v2_bias, w, m >= m_lo, half)
            gl.store(here, out.to(out_ptr.dtype.element_ty), mask=inside)
            out = _weigh(parts.index(high + i), v2_high, v2_bias, w, m >= m_lo, half)
            gl.store(here + D // 2, out.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
@no_type_check
def _weigh(part, v2, v2_bias, w, seen, layout: gl.constexpr):
    """sum_s w_s part_s o (v2_s + bias) [D // 2]; rows out of sight may be NaN."""
    return gl.sum(gl.where(seen[:, None], part.load(layout) * w[:, None] * (v2.to(gl.float32) + v2_bias), 0.0), 0)


@gluon.jit
@no_type_check
def _hand_over(acc, top, weight_sum, z_smem, top_smem, sum_smem, z_full, turn, D: gl.constexpr, WG: gl.constexpr):
    """The result of a tile to the shaper: halves of the columns in the slots that do not hold virtual queries."""
    low, high = gl.split(gl.permute(gl.reshape(acc, [64, 2, D // 2]), (0, 2, 1)))
    z_smem.index(3 * WG + turn % 3).store(low)
    z_smem.index(3 * WG + (turn + 2) % 3).store(high)
    top_smem.index(WG).store(top)
    sum_smem.index(WG).store(weight_sum)
    mbarrier.arrive(z_full.index(WG), count=1)


@gluon.jit
@no_type_check
def _consumer(
    k_smem, v_smem, u_smem, z_smem, top_smem, sum_smem,
    k_full, k_empty, v_full, v_empty, u_full, z_full, reach_ptr,
    T, S1, w1, tiles, total, scale_log2,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, BS: gl.constexpr, STAGES: gl.constexpr,
    HAS_DOCS: gl.constexpr, MANY: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    """Flash attention of 64 virtual queries a tile; its first scores beside the last values of the tile before."""
    dtype: gl.constexpr = k_smem.dtype
    PAIRS: gl.constexpr = 64 // BS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows_s: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows_o: gl.constexpr = gl.SliceLayout(1, o_layout)

    row = gl.arange(0, 64, layout=rows_s)
    column = gl.arange(0, BN, layout=gl.SliceLayout(0, s_layout))
    zero = gl.zeros([64, BN], gl.float32, s_layout)
    acc = gl.zeros([64, D], gl.float32, o_layout)
    p = gl.zeros([64, BN], dtype, p_layout)
    top = gl.zeros([64], gl.float32, rows_s)
    weight_sum = gl.zeros([64], gl.float32, rows_s)
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
        u = u_smem.index(3 * WG + turn % 3)
        mbarrier.wait(u_full.index(turn & 1), (turn >> 1) & 1)
        for n in range(blocks):
            slot = step % STAGES
            phase = (step // STAGES) & 1
            before = (step + STAGES - 1) % STAGES
            mbarrier.wait(k_full.index(slot), phase)
            token = warpgroup_mma(u, k_smem.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((step + STAGES - 1) // STAGES + 1) & 1, pred=step > 0)
            acc_token = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(k_empty.index(slot), count=1)
            if MANY:
                s = hide(s, start + n * BN + column, row_lo, row_hi, -float("inf"))
            elif start + n * BN < all_lo:  # blocks end at the last key: only the first can hold keys out of sight
                s = gl.where((start + n * BN + column >= all_lo)[None, :], s, -float("inf"))
            old_top = gl.where(n == 0, -1.0e30, top)
            new_top = gl.maximum(old_top, gl.max(s, 1))
            alpha = gl.exp2((old_top - new_top) * scale_log2)
            weights = gl.exp2(s * scale_log2 - (new_top * scale_log2)[:, None])
            new_sum = gl.where(n == 0, 0.0, weight_sum) * alpha + gl.sum(weights, 1)
            next_p = gl.convert_layout(weights.to(dtype), p_layout)
            acc, p = warpgroup_mma_wait(0, deps=[acc_token, next_p])
            mbarrier.arrive(v_empty.index(before), count=1, pred=step > 0)
            if n == 0:
                if turn > 0:
                    _hand_over(acc, top, weight_sum, z_smem, top_smem, sum_smem, z_full, turn - 1, D, WG)
                acc = gl.zeros([64, D], gl.float32, o_layout)
                if start < lo:
                    mbarrier.wait(v_full.index(slot), phase)
                    clear_before(v_smem.index(slot), start, lo, D, BN)
            else:
                acc = acc * gl.convert_layout(alpha, rows_o)[:, None]
            top = new_top
            weight_sum = new_sum
            step += 1
        turn += 1
        local, bg = next_tile(local, bg, tiles, local_stride, bg_stride)
    before = (step + STAGES - 1) % STAGES
    mbarrier.wait(v_full.index(before), ((step + STAGES - 1) // STAGES + 1) & 1)
    acc_token = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc_token])
    mbarrier.wait(u_full.index(turn & 1), (turn >> 1) & 1)
    _hand_over(acc, top, weight_sum, z_smem, top_smem, sum_smem, z_full, turn - 1, D, WG)


@gluon.jit
@no_type_check
def forward_kernel(
    k_desc, v_desc, q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, out_ptr, lse_ptr, reach_ptr,
    T, S1, S2, w1, w2, tiles, total, scale_log2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr, BS: gl.constexpr, STAGES: gl.constexpr,
    DETERMINANT: gl.constexpr, K2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr, MANY: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    PAIRS: gl.constexpr = 64 // BS
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    CONSUMER: gl.constexpr = 192 if DETERMINANT else 200  # registers; its shaper has twice as much to load
    SHAPER: gl.constexpr = 104 if DETERMINANT else 88
    spread: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])  # no bank twice when results are written or read
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, BN, D], v_desc.layout)
    u_smem = gl.allocate_shared_memory(dtype, [6, 64, D], gl.NVMMASharedLayout.get_default_for([64, D], dtype))
    z_smem = u_smem._reinterpret(gl.float32, [6, 64, D // 2], spread)
    top_smem = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    sum_smem = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    u_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    z_full = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(u_full.index(i), count=1)
        mbarrier.init(z_full.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    k_smem, v_smem, u_smem, z_smem, top_smem, sum_smem,
                    k_full, k_empty, v_full, v_empty, u_full, z_full, reach_ptr,
                    T, S1, w1, tiles, total, scale_log2,
                    R, G, D, BN, BS, STAGES, HAS_DOCS, MANY, FIRST,
                ),
            ),
            (
                _consumer,
                (
                    k_smem, v_smem, u_smem, z_smem, top_smem, sum_smem,
                    k_full, k_empty, v_full, v_empty, u_full, z_full, reach_ptr,
                    T, S1, w1, tiles, total, scale_log2,
                    R, G, D, BN, BS, STAGES, HAS_DOCS, MANY, SECOND,
                ),
            ),
            (
                _shaper,
                (
                    u_smem, z_smem, top_smem, sum_smem, u_full, z_full,
                    q_ptr, qb_ptr, k2_ptr, k2b_ptr, v2_ptr, out_ptr, lse_ptr, reach_ptr,
                    T, S2, w2, tiles, total, scale_log2, k2_bias, v2_bias,
                    R, G, D, BS, DETERMINANT, K2_BIAS, HAS_DOCS, MANY,
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


def plan(p: Problem, scale: float, reach: Tensor | None, out: Tensor, lse: Tensor) -> Launch:
    """The forward launch; the tensors may be on the meta device if it is only to be compiled."""
    args, constants = tile_arguments(p, scale, reach, lse, block=128, stages=2)
    args |= {"out_ptr": out, "lse_ptr": lse}
    constants["K2_BIAS"] = p.k2_bias != 0
    return Launch(forward_kernel, min(args["total"], processors(out.device)), args, constants, num_warps=4)


def launch(p: Problem, scale: float, reach: Tensor | None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D) in dtype (q's) and natural-log LSE (B, T, H). D 64 or 128, w2 <= 64, scale > 0."""
    out = torch.empty_like(p.q, dtype=dtype)
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    plan(p, scale, reach, out, lse).run()
    return out, lse
