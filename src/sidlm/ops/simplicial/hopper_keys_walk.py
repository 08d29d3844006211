"""How hopper_backward_keys.py walks: which positions m a program takes and in which passes, and the warp that streams.

A pass takes one or two positions m, and tiles of 64 rows (query, head of the group) that see them and a key.
"""

from typing import no_type_check

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma


@gluon.jit
@no_type_check
def job(S1, S2, w1, w2, MC, slots):
    """This program's first key j (row of k), and its range of m (rows of k2)."""
    block = gl.program_id(0) // slots
    j = block * 64
    shift = S2 - S1
    first = gl.maximum(j + shift - w2 + 1, 0)
    end = gl.minimum(j + shift + 64 + w1 - 1, S2)
    chunk = first // MC + gl.program_id(0) % slots
    return j, gl.maximum(first, chunk * MC), gl.minimum(end, chunk * MC + MC)


@gluon.jit
@no_type_check
def rows_of(m, j, last_ptr, b, T, S1, S2, w1, w2, HAS_DOCS: gl.constexpr):
    """First and last query that sees the second key m and one of the 64 keys from j on."""
    t = m - (S2 - T)
    j -= S1 - T
    lo = gl.maximum(gl.maximum(t, j), 0)
    hi = gl.minimum(gl.minimum(t + w2 - 1, j + 63 + w1 - 1), T - 1)
    if m >= S2:
        hi = lo - 1
    elif HAS_DOCS:
        hi = gl.minimum(hi, gl.load(last_ptr + b * S2 + m))
    return lo, hi


@gluon.jit
@no_type_check
def next_pass(m, end, j, last_ptr, b, T, S1, S2, w1, w2, R: gl.constexpr, HAS_DOCS: gl.constexpr):
    """What one pass of the loop takes: 1 or 2 positions m, their queries, the first row and the number of tiles.

    Positions of two documents never share a pass. Rows start at a multiple of four, as copies of the LSE must.
    """
    lo, hi = rows_of(m, j, last_ptr, b, T, S1, S2, w1, w2, HAS_DOCS)
    count = 2
    if m + 1 >= end:
        count = 1
    if HAS_DOCS and gl.load(last_ptr + b * S2 + m) <= m - (S2 - T):
        count = 1
    if count == 2:
        lo2, hi2 = rows_of(m + 1, j, last_ptr, b, T, S1, S2, w1, w2, HAS_DOCS)
        if lo > hi:
            lo = lo2
        hi = gl.maximum(hi, hi2)
    row = lo * R // 4 * 4
    return count, lo, hi, row, gl.cdiv(gl.maximum((hi + 1) * R - row, 0), 64)


@gluon.jit
@no_type_check
def stream_rows(
    q_desc, qb_desc, do_desc, lse_desc, delta_desc, q_smem, qb_smem, do_smem, lse_smem, delta_smem, full, empty,
    last_ptr, T, S1, S2, w1, w2, MC, slots, pitch,
    R: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, DETERMINANT: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    TILES: gl.constexpr = 3 if DETERMINANT else 2
    j, m, end = job(S1, S2, w1, w2, MC, slots)
    bg = gl.program_id(1)
    step = 0
    while m < end:
        count, _lo, _hi, row, tiles = next_pass(m, end, j, last_ptr, bg // G, T, S1, S2, w1, w2, R, HAS_DOCS)
        for n in range(tiles):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), ((step // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, TILES * q_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes)
            at = bg * pitch + row + n * 64
            tma.async_copy_global_to_shared(q_desc, [at, 0], bar, q_smem.index(slot))
            if DETERMINANT:
                tma.async_copy_global_to_shared(qb_desc, [at, 0], bar, qb_smem.index(slot))
            tma.async_copy_global_to_shared(lse_desc, [at], bar, lse_smem.index(slot))
            tma.async_copy_global_to_shared(delta_desc, [at], bar, delta_smem.index(slot))
            tma.async_copy_global_to_shared(do_desc, [at, 0], bar, do_smem.index(slot))
            step += 1
        m += count


@gluon.jit
@no_type_check
def skip_tile(full, empty, step, STAGES: gl.constexpr):
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    mbarrier.arrive(empty.index(step % STAGES), count=1)
