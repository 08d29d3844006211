"""Gradients of k, v, k2 and v2 on Hopper: the backward pass of attention over virtual keys, in Gluon.

With ``kappa[j, m] = k_j o k2_m`` and ``nu[j, m] = v_j o v2_m`` the logits are ``q . kappa`` and the output is a plain
weighted sum of ``nu``: attention of the plain queries over pairs. For a fixed m its backward pass takes four products a
pair (S, dP, d nu, d kappa), while q and d out stream past, and yields

    dk_j = sum_m dkappa[j, m] o k2_m        dk2_m = sum_j dkappa[j, m] o k_j        (v, v2 alike)

Only S is not taken from kappa but from k and the virtual queries ``u = q o k2_m`` of the forward pass, rounded as
there: P = exp(S - LSE) needs the S of that LSE.

**The determinant** has kappa = k cross k2. With p1, p2 the rotations of prepare.py, u = k2 cross q in the order p1 is
``u[p1 e] = k2[p2 e] q[e] - k2[e] q[p2 e]``: besides q, which dkappa needs, one permuted copy of it streams past, and
the keys that S is taken with are in the order p1 too. A cross product is the difference of two products, so dk and dk2
are two sums each. Those of dk do not fit into shared memory: they grow in their slots in global memory.

A block of threads owns 64 keys j and a run of positions m, two at a time, one a warpgroup. S and dP are computed
transposed, (pairs, rows), so that both weights are operands from registers. Partial sums go to slots that no other
block writes and are added in a fixed order: the same bits every time.
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sidlm.ops.simplicial.hopper_keys_walk import job, next_pass, rows_of, skip_tile, stream_rows
from sidlm.ops.simplicial.hopper_tiles import (
    descriptor,
    processors,
    thread_barrier,
    virtual_cross,
    virtual_queries,
)
from sidlm.ops.simplicial.prepare import LOG2E, Launch, Problem, next_power
from sidlm.ops.simplicial.triton_backward_keys import difference


@gluon.jit
@no_type_check
def _fold(d_pair, same, pair_row, kept, sums, scratch, out_ptr, D: gl.constexpr, o_layout: gl.constexpr):
    """sums[j] += d_pair[j] o (row of m); out[:] = sum_j d_pair[j] o kept[j], over the keys of the document of m."""
    product = gl.where(same, d_pair * pair_row[None, :], 0.0)
    sums.store(sums.load(o_layout) + product)
    _sum_keys(gl.where(same, d_pair * kept.load(o_layout).to(gl.float32), 0.0), scratch, out_ptr, D)


@gluon.jit
@no_type_check
def _sum_keys(product, scratch, out_ptr, D: gl.constexpr):
    """out[:] = sum_j product[j]."""
    scratch.store(gl.sum(gl.reshape(product, [4, 16, D]), 1))  # over the rows of each warp
    column: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [0, 1])
    total = gl.sum(scratch.load(column), 0)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, column))
    gl.store(out_ptr + d, total, mask=d < D)


@gluon.jit
@no_type_check
def _clear_outside(tile, row, lo, hi, D: gl.constexpr):
    """Zero the rows of a tile, the first of which is `row`, that are not in [lo, hi)."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    values = tile.load(layout)
    tile.store(gl.where(((rows >= lo) & (rows < hi))[:, None], values, gl.zeros_like(values)))


@gluon.jit
@no_type_check
def _prepare(
    u, q_smem, qb_smem, do_smem, delta_smem, full, step, k2, k2_ptr, k2_bias, row, all_lo, all_hi,
    R: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr, K2_BIAS: gl.constexpr,
):  # fmt: skip
    """The virtual queries u of a tile, as soon as it is there; k2 is for the trilinear form."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot = step % STAGES
    q = q_smem.index(slot)
    if DETERMINANT:  # read again for every tile: during the products registers are short
        d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
        k2 = gl.load(k2_ptr + d)
        k2b = gl.load(k2_ptr + 2 * D + d)
    mbarrier.wait(full.index(slot), (step // STAGES) & 1)
    if R % 64 != 0:  # noqa: SIM102 (a constant: not compiled otherwise)
        # rows of another document, or none: 0 * NaN is NaN. Not so their u: where it enters, P is selected to be zero
        if (row // R < all_lo) | ((row + 63) // R > all_hi):
            _clear_outside(q, row, all_lo * R, (all_hi + 1) * R, D)
            _clear_outside(do_smem.index(slot), row, all_lo * R, (all_hi + 1) * R, D)
            rows = row + gl.arange(0, 64, layout=flat)
            delta = delta_smem.index(slot).load(flat)
            inside = (rows >= all_lo * R) & (rows < (all_hi + 1) * R)
            delta_smem.index(slot).store(gl.where(inside, delta, 0.0))
            thread_barrier()
    if DETERMINANT:
        u.store(virtual_cross(qb_smem.index(slot).load(wide), q.load(wide), k2b[None, :], k2[None, :]))
    else:
        u.store(virtual_queries(q.load(wide), k2[None, :], k2_bias, K2_BIAS))
    fence_async_shared()
    thread_barrier()


@gluon.jit
@no_type_check
def _consumer(
    q_smem, qb_smem, do_smem, lse_smem, delta_smem, full, empty, turns, pair_smem, kept_smem, sums_smem,
    k_ptr, k2_ptr, v2_ptr, dk_ptr, dv_ptr, dk2_ptr, dv2_ptr, last_ptr,
    T, S1, S2, w1, w2, MC, slots, BG, scale_log2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr, WG: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_smem.dtype
    COPIES2: gl.constexpr = 3 if DETERMINANT else 1  # of a second key, side by side in memory
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    bg = gl.program_id(1)
    b = bg // G
    j, m, end = job(S1, S2, w1, w2, MC, slots)
    u = pair_smem.index(2 * WG)
    nu = pair_smem.index(2 * WG + 1)
    scratch = u._reinterpret(gl.float32, [32, D], plain).slice(0, 4, dim=0)
    k_kept = kept_smem.index(0)
    v_kept = kept_smem.index(1)
    zero = gl.zeros([64, 64], gl.float32, s_layout)
    column = gl.arange(0, 64, layout=columns)
    jt = j - (S1 - T) + gl.arange(0, 64, layout=gl.SliceLayout(1, s_layout))
    d_wide = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    d_o = gl.arange(0, D, layout=gl.SliceLayout(0, o_layout))
    keys_o = j + gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))
    block = gl.program_id(0) // slots
    step = 0
    turn = 0
    while m < end:
        mine = m + WG
        t = mine - (S2 - T)
        count, all_lo, all_hi, row, tiles = next_pass(m, end, j, last_ptr, b, T, S1, S2, w1, w2, R, HAS_DOCS)
        lo, hi = rows_of(mine, j, last_ptr, b, T, S1, S2, w1, w2, HAS_DOCS)
        if count <= WG:
            hi = lo - 1
        at = ((b * S2).to(gl.int64) + gl.minimum(mine, S2 - 1)) * (G * D) + (bg % G) * D
        at2 = at * COPIES2
        k2 = gl.load(k2_ptr + at2 + d_wide)
        v2 = gl.load(v2_ptr + at + d_wide).to(gl.float32) + v2_bias
        nu.store((v_kept.load(wide).to(gl.float32) * v2[None, :]).to(dtype))
        # tiles of rows that see this m: the two m of a pass differ by one query
        mine_from = gl.maximum(lo * R - row, 0) // 64
        mine_to = gl.minimum(gl.cdiv((hi + 1) * R - row, 64), tiles)
        if lo > hi:
            mine_from = 0
            mine_to = 0
        # of them, those whose queries all see all the keys and m (with documents it may be seen by fewer than w2)
        whole_from = gl.cdiv(gl.maximum(t, j - (S1 - T) + 63) * R - row, 64)
        whole_to = (gl.minimum(gl.minimum(t + w2, j - (S1 - T) + w1), hi + 1) * R - row) // 64
        begin = 0
        if HAS_DOCS:  # the queries are of the document of m: so must the keys be
            begin = gl.load(last_ptr + (BG // G + b) * S2 + gl.minimum(mine, S2 - 1))
            if j - (S1 - T) < begin:
                whole_to = 0
        for _ in range(mine_from):
            skip_tile(full, empty, step, STAGES)
            step += 1
        d_kappa = gl.zeros([64, D], gl.float32, o_layout)
        d_nu = gl.zeros([64, D], gl.float32, o_layout)
        if mine_to > mine_from:
            _prepare(u, q_smem, qb_smem, do_smem, delta_smem, full, step, k2, k2_ptr + at2, k2_bias,
                     row + mine_from * 64, all_lo, all_hi, R, D, STAGES, DETERMINANT, K2_BIAS)  # fmt: skip
        for n in range(mine_from, mine_to):
            slot = step % STAGES
            q = q_smem.index(slot)
            d_out = do_smem.index(slot)
            # what dP is summed upon: later, registers would be short
            less_delta = zero - delta_smem.index(slot).load(columns)[None, :]
            s_token = warpgroup_mma(k_kept, u.permute((1, 0)), zero, use_acc=False, is_async=True)
            dp_token = warpgroup_mma(nu, d_out.permute((1, 0)), less_delta, is_async=True)
            lse = lse_smem.index(slot).load(columns)
            s = warpgroup_mma_wait(1, deps=[s_token])
            p = gl.exp2(s * scale_log2 - lse[None, :])
            whole = (n >= whole_from) & (n < whole_to)
            if not whole:
                i = (row + n * 64 + column) // R
                seen = (i >= t) & (i < t + w2) & (i <= hi)
                both = (jt[:, None] <= i[None, :]) & (jt[:, None] > (i - w1)[None, :]) & seen[None, :]
                if HAS_DOCS:
                    both = both & (jt >= begin)[:, None]
                p = gl.where(both, p, 0.0)
            weights = gl.convert_layout(p.to(dtype), p_layout)
            d_nu_token = warpgroup_mma(weights, d_out, d_nu, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp_token])
            d_weights = gl.convert_layout((p * dp).to(dtype), p_layout)
            d_kappa_token = warpgroup_mma(d_weights, q, d_kappa, is_async=True)
            if n + 1 < mine_to:  # while the products run
                _prepare(u, q_smem, qb_smem, do_smem, delta_smem, full, step + 1, k2, k2_ptr + at2, k2_bias,
                         row + (n + 1) * 64, all_lo, all_hi, R, D, STAGES, DETERMINANT, K2_BIAS)  # fmt: skip
            d_nu, d_kappa = warpgroup_mma_wait(0, deps=[d_nu_token, d_kappa_token])
            mbarrier.arrive(empty.index(slot), count=1)
            step += 1
        for _ in range(mine_to, tiles):
            skip_tile(full, empty, step, STAGES)
            step += 1
        # one warpgroup at a time adds to the shared sums, always in the same order
        mbarrier.wait(turns.index(1 - WG), (turn & 1) ^ (1 - WG))
        if lo <= hi:
            home = (((block - gl.maximum(mine - (S2 - S1) - w1 + 1, 0) // 64) * BG + bg).to(gl.int64) * S2 + mine) * D
            same = keys_o < S1
            if HAS_DOCS:  # the products with NaN of another document were with zeros
                jt_o = keys_o - (S1 - T)
                same = (jt_o >= begin) & (jt_o <= gl.load(last_ptr + b * S2 + mine))
            same = same[:, None]
            if DETERMINANT:
                v2_o = gl.load(v2_ptr + at + d_o).to(gl.float32) + v2_bias
                _fold(d_nu, same, v2_o, v_kept, sums_smem.index(0), scratch, dv2_ptr + home, D, o_layout)
                inside = keys_o[:, None] < S1
                row_o = gl.arange(0, 64, layout=gl.SliceLayout(1, o_layout))[:, None]
                here_k = k_ptr + ((b * S1 + j).to(gl.int64) * G + bg % G) * (2 * D)
                here_dk = dk_ptr + (((gl.program_id(0) % slots) * BG + bg).to(gl.int64) * S1 + j) * (2 * D)
                for copy in gl.static_range(2):
                    k2_o = gl.load(k2_ptr + at2 + (1 + copy) * D + d_o).to(gl.float32)
                    sums_ptr = here_dk + copy * D + (row_o * (2 * D) + d_o[None, :])
                    product = gl.where(same, d_kappa * k2_o[None, :], 0.0)
                    gl.store(sums_ptr, gl.load(sums_ptr, mask=inside, other=0.0) + product, mask=inside)
                    if copy == 0:
                        keys = k_kept.load(o_layout)
                    else:
                        keys_ptr = here_k + D + (row_o * (2 * G * D) + d_o[None, :])
                        keys = gl.load(keys_ptr, mask=inside, other=0.0)
                    product = gl.where(same, d_kappa * keys.to(gl.float32), 0.0)
                    _sum_keys(product, scratch, dk2_ptr + 2 * home + copy * D, D)
            else:
                k2_o = gl.load(k2_ptr + at + d_o).to(gl.float32) + k2_bias
                _fold(d_kappa, same, k2_o, k_kept, sums_smem.index(0), scratch, dk2_ptr + home, D, o_layout)
                v2_o = gl.load(v2_ptr + at + d_o).to(gl.float32) + v2_bias
                _fold(d_nu, same, v2_o, v_kept, sums_smem.index(1), scratch, dv2_ptr + home, D, o_layout)
        if DETERMINANT:
            thread_barrier()  # the sums in global memory are complete, as those in shared memory are
        mbarrier.arrive(turns.index(WG), count=1)
        turn += 1
        m += count
    if DETERMINANT:  # the sums of dk are where they belong
        if WG == 1:
            home = (((gl.program_id(0) % slots) * BG + bg).to(gl.int64) * S1 + keys_o)[:, None] * D + d_o[None, :]
            gl.store(dv_ptr + home, sums_smem.index(0).load(o_layout), mask=keys_o[:, None] < S1)
    else:
        if WG == 0:  # the other's last turn comes after this one's
            mbarrier.wait(turns.index(1), (turn & 1) ^ 1)
        total = sums_smem.index(WG).load(o_layout)
        home = (((gl.program_id(0) % slots) * BG + bg).to(gl.int64) * S1 + keys_o)[:, None] * D + d_o[None, :]
        if WG == 0:
            gl.store(dk_ptr + home, total, mask=keys_o[:, None] < S1)
        else:
            gl.store(dv_ptr + home, total, mask=keys_o[:, None] < S1)


@gluon.jit
@no_type_check
def backward_keys_kernel(
    q_desc, qb_desc, do_desc, lse_desc, delta_desc, k_ptr, v_ptr, k2_ptr, v2_ptr, dk_ptr, dv_ptr, dk2_ptr, dv2_ptr,
    last_ptr, T, S1, S2, w1, w2, MC, slots, pitch, BG, scale_log2, k2_bias, v2_bias,
    R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr,
    K2_BIAS: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    FIRST: gl.constexpr = 0
    SECOND: gl.constexpr = 1
    SUMS: gl.constexpr = 1 if DETERMINANT else 2  # in shared memory: of dk and of dv, or of dv alone
    COPIES: gl.constexpr = 2 if DETERMINANT else 1  # of a key, side by side in memory
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], q_desc.layout)
    qb_smem = q_smem
    if DETERMINANT:
        qb_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(dtype, [STAGES, 64, D], do_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 64], delta_desc.layout)
    pair_smem = gl.allocate_shared_memory(dtype, [4, 64, D], q_desc.layout)  # u and nu of each warpgroup
    kept_smem = gl.allocate_shared_memory(dtype, [2, 64, D], q_desc.layout)
    sums_smem = gl.allocate_shared_memory(gl.float32, [SUMS, 64, D], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bars)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    j, _m, _end = job(S1, S2, w1, w2, MC, slots)
    bg = gl.program_id(1)
    keys = j + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, wide))
    at = (((bg // G) * S1 + keys).to(gl.int64) * G + bg % G)[:, None] * D + d[None, :]
    at_k = (((bg // G) * S1 + keys).to(gl.int64) * G + bg % G)[:, None] * (COPIES * D) + d[None, :]
    kept_smem.index(0).store(gl.load(k_ptr + at_k, mask=keys[:, None] < S1, other=0.0))
    kept_smem.index(1).store(gl.load(v_ptr + at, mask=keys[:, None] < S1, other=0.0))
    for i in gl.static_range(SUMS):
        sums_smem.index(i).store(gl.zeros([64, D], gl.float32, wide))
    if DETERMINANT:
        at = (((gl.program_id(0) % slots) * BG + bg).to(gl.int64) * S1 + keys)[:, None] * (2 * D) + d[None, :]
        for copy in gl.static_range(2):
            gl.store(dk_ptr + at + copy * D, gl.zeros([64, D], gl.float32, wide), mask=keys[:, None] < S1)
    fence_async_shared()
    thread_barrier()
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    q_smem, qb_smem, do_smem, lse_smem, delta_smem, full, empty, turns, pair_smem, kept_smem, sums_smem,
                    k_ptr, k2_ptr, v2_ptr, dk_ptr, dv_ptr, dk2_ptr, dv2_ptr, last_ptr,
                    T, S1, S2, w1, w2, MC, slots, BG, scale_log2, k2_bias, v2_bias,
                    R, G, D, STAGES, DETERMINANT, K2_BIAS, HAS_DOCS, FIRST,
                ),
            ),
            (
                _consumer,
                (
                    q_smem, qb_smem, do_smem, lse_smem, delta_smem, full, empty, turns, pair_smem, kept_smem, sums_smem,
                    k_ptr, k2_ptr, v2_ptr, dk_ptr, dv_ptr, dk2_ptr, dv2_ptr, last_ptr,
                    T, S1, S2, w1, w2, MC, slots, BG, scale_log2, k2_bias, v2_bias,
                    R, G, D, STAGES, DETERMINANT, K2_BIAS, HAS_DOCS, SECOND,
                ),
            ),
            (
                stream_rows,
                (
                    q_desc, qb_desc, do_desc, lse_desc, delta_desc,
                    q_smem, qb_smem, do_smem, lse_smem, delta_smem, full, empty, last_ptr,
                    T, S1, S2, w1, w2, MC, slots, pitch, R, G, STAGES, DETERMINANT, HAS_DOCS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


class Shares(NamedTuple):
    """How the work is cut, and what that takes in slots."""

    blocks: int  # of 64 keys
    chunk: int  # positions m of a program
    slots: int  # programs that share a block of keys
    slots2: int  # blocks of keys that meet a position m


def cut(p: Problem) -> Shares:
    """Chunks of m: few (each costs memory), but forty programs of a processor, for their sizes differ."""
    batch, _, s1, _, groups, _, _ = p.shape
    blocks = -(-s1 // 64)
    span = 64 + p.w1 + p.w2 - 2  # positions m that meet a block of keys
    wanted = max(1, -(-40 * processors(p.q.device) // (blocks * batch * groups)))
    chunk = next_power(-(-span // wanted), 16)
    return Shares(blocks, chunk, -(-(span - 1) // chunk) + 1, -(-(p.w1 + p.w2 - 2) // 64) + 1)


def partial_sums(p: Problem, cut: Shares) -> list[Tensor]:
    """Room for the shares of dk, dv (slots, B * G, S1, C, D) and of dk2, dv2 (slots2, B * G, S2, C, D), float32.

    C is 1, and 2 for dk and dk2 of the determinant. A program writes all of its shares of the first two, but of the
    others only the m that some query sees.
    """
    batch, _, s1, s2, groups, _, dim = p.shape
    like = {"dtype": torch.float32, "device": p.q.device}
    copies = (2 if p.determinant else 1, 1)
    one = [torch.empty(cut.slots, batch * groups, s1, c, dim, **like) for c in copies]
    return one + [torch.zeros(cut.slots2, batch * groups, s2, c, dim, **like) for c in copies]


def plan(
    p: Problem, cut: Shares, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, last: Tensor | None,
    sums: list[Tensor],
) -> Launch:  # fmt: skip
    """The launch that gives the shares; the tensors may be on the meta device if it is only to be compiled."""
    batch, steps, s1, s2, groups, per_group, dim = p.shape
    pitch = -(-steps * per_group // 4) * 4

    def rows(x: Tensor) -> Tensor:
        """(B, T, H, ...) -> (B * G * pitch, ...): the rows of a group of heads follow one another."""
        x = x.unflatten(2, (groups, per_group)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        if pitch > x.shape[1]:
            x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, pitch - x.shape[1]))
        return x.flatten(0, 1).contiguous()

    line = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    lse2 = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E)
    q, d_out = (descriptor(rows(x), 64, dim) for x in (p.q, grad_out))
    lse2, delta_rows = (TensorDescriptor.from_tensor(rows(x), [64], line) for x in (lse2, delta))
    qb, k, k2 = q, p.k, p.k2
    if p.determinant:
        qb = descriptor(rows(p.left(p.q)[1]), 64, dim)
        k, k2 = torch.stack(p.left(p.k), -2), torch.stack((p.k2, *p.right(p.k2)), -2)
    args = {
        "q_desc": q, "qb_desc": qb, "do_desc": d_out, "lse_desc": lse2, "delta_desc": delta_rows,
        "k_ptr": k, "v_ptr": p.v, "k2_ptr": k2, "v2_ptr": p.v2,
        **dict(zip(("dk_ptr", "dv_ptr", "dk2_ptr", "dv2_ptr"), sums, strict=True)),
        "last_ptr": lse if last is None else last,
        "T": steps, "S1": s1, "S2": s2, "w1": p.w1, "w2": p.w2, "MC": cut.chunk, "slots": cut.slots, "pitch": pitch,
        "BG": batch * groups, "scale_log2": scale * LOG2E, "k2_bias": p.k2_bias, "v2_bias": p.v2_bias,
    }  # fmt: skip
    constants = {
        "R": per_group,
        "G": groups,
        "D": dim,
        "STAGES": 2,
        "DETERMINANT": p.determinant,
        "K2_BIAS": p.k2_bias != 0,
        "HAS_DOCS": last is not None,
    }
    return Launch(backward_keys_kernel, (cut.blocks * cut.slots, batch * groups), args, constants, num_warps=4)


def launch(p: Problem, scale: float, grad_out: Tensor, lse: Tensor, delta: Tensor, last: Tensor | None) -> list[Tensor]:
    """dk, dv (B, S1, G, D) and dk2, dv2 (B, S2, G, D), float32.

    last (2, B, S2): the last and the first position of each second key's document, if there are documents.
    """
    batch, groups = p.q.shape[0], p.k.shape[2]
    shares = cut(p)
    sums = partial_sums(p, shares)
    plan(p, shares, scale, grad_out, lse, delta, last, sums).run()

    def home(x: Tensor, factor: float) -> Tensor:
        """The sum over slots, the two of a cross product put together, (B, S, G, D)."""
        parts = list(x.sum(0).unbind(-2))
        total = difference(p, parts) if len(parts) == 2 else parts[0]
        return (total * factor).unflatten(0, (batch, groups)).transpose(1, 2)

    sign = -1.0 if p.determinant else 1.0  # k cross k2 = -(k2 cross k)
    return [home(x, factor) for x, factor in zip(sums, (sign * scale, 1.0, scale, 1.0), strict=True)]
