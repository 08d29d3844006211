"""What the Hopper kernels over virtual queries share: which tile, which keys, and hiding what is out of sight.

A tile is 2 x 64 rows (pair, offset s), a pair being a (query, head of the group) in that order, so that any ratio of
query heads to key heads fills it. A program takes every n-th tile.
"""

from functools import cache
from typing import Any, no_type_check

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sidlm.ops.simplicial.prepare import LOG2E, Problem, next_power

PROCESSORS_ASSUMED = 132  # of an H200, where there is no device to ask
thread_barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier  # its name until triton 3.6  # pyright: ignore


@gluon.jit
@no_type_check
def visible(query, reach_ptr, b, T, S, w, HAS_DOCS: gl.constexpr):
    """First and last visible row of an axis of length S with window w."""
    last = query + S - T
    seen = gl.minimum(w, last + 1)
    if HAS_DOCS:
        seen = gl.minimum(seen, gl.load(reach_ptr + b * T + query))
    return last - seen + 1, last


@gluon.jit
@no_type_check
def window(local, b, reach_ptr, T, S1, w1, R: gl.constexpr, PAIRS: gl.constexpr, HAS_DOCS: gl.constexpr):
    """First and last key of a tile, and the first key that all of its rows see."""
    first = local * (2 * PAIRS) // R
    lo, hi = visible(gl.minimum(first, T - 1), reach_ptr, b, T, S1, w1, HAS_DOCS)
    all_lo = lo
    if R % (2 * PAIRS) != 0:  # the tile spans queries
        last = gl.minimum((local * (2 * PAIRS) + 2 * PAIRS - 1) // R, T - 1)
        all_lo, hi = visible(last, reach_ptr, b, T, S1, w1, HAS_DOCS)
    return lo, hi, all_lo


@gluon.jit
@no_type_check
def first_tile(tiles):
    """Tile of this program within its (batch, group), the (batch, group), and what takes both to the next tile."""
    programs = gl.num_programs(0)
    return gl.program_id(0) % tiles, gl.program_id(0) // tiles, programs % tiles, programs // tiles


@gluon.jit
@no_type_check
def next_tile(local, bg, tiles, local_stride, bg_stride):
    local += local_stride
    wrap = (local >= tiles).to(gl.int32)
    return local - wrap * tiles, bg + bg_stride + wrap


@gluon.jit
@no_type_check
def stream_keys(
    k_desc, v_desc, k_smem, v_smem, k_full, k_empty, v_full, v_empty, reach_ptr,
    T, S1, w1, tiles, total, R: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, PAIRS: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    step = 0
    local, bg, local_stride, bg_stride = first_tile(tiles)
    for _ in range(gl.program_id(0), total, gl.num_programs(0)):
        lo, hi, _all_lo = window(local, bg // G, reach_ptr, T, S1, w1, R, PAIRS, HAS_DOCS)
        row = (bg // G) * S1
        column = (bg % G) * D
        blocks = gl.maximum(gl.cdiv(hi - lo + 1, BN), 1)
        for n in range(blocks):
            j = hi + 1 - (blocks - n) * BN
            slot = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [row + j, column], k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            mbarrier.expect(v_full.index(slot), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [row + j, column], v_full.index(slot), v_smem.index(slot))
            step += 1
        local, bg = next_tile(local, bg, tiles, local_stride, bg_stride)


@gluon.jit
@no_type_check
def clear_before(v, start, lo, D: gl.constexpr, BN: gl.constexpr):
    """Zero the rows of a block of values that lie before the window: 0 * NaN is NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for c in gl.static_range(0, BN, 32):
        part = v.slice(c, 32, dim=0)
        rows = start + c + gl.arange(0, 32, layout=gl.SliceLayout(1, layout))
        values = part.load(layout)
        part.store(gl.where((rows >= lo)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


@gluon.jit
@no_type_check
def hide(s, keys, row_lo, row_hi, hidden):
    return gl.where((keys[None, :] >= row_lo[:, None]) & (keys[None, :] <= row_hi[:, None]), s, hidden)


@gluon.jit
@no_type_check
def load_pairs(
    ptr, first, b, group, T, R: gl.constexpr, G: gl.constexpr, BS: gl.constexpr, D: gl.constexpr, layout: gl.constexpr
):
    """Rows of q or dO (B, T, H, D) of the 64 // BS pairs from `first` on: [pairs, 1, D]."""
    PAIRS: gl.constexpr = 64 // BS
    pairs = gl.minimum(first + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout))), T * R - 1)
    at = ((b * T + pairs // R).to(gl.int64) * (R * G) + group * R + pairs % R) * D
    d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    at = gl.expand_dims(gl.expand_dims(at, 1), 2)
    return gl.load(ptr + (at + gl.expand_dims(gl.expand_dims(d, 0), 1)))


@gluon.jit
@no_type_check
def load_offsets(
    ptr, first, b, group, T, S2, R: gl.constexpr, G: gl.constexpr, BS: gl.constexpr, D: gl.constexpr,
    MANY: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Rows of k2 or v2 (B, S2, G, D) that the offsets of these pairs stand for, [pairs or 1, BS, D].

    Offsets before the first row get the first row: a finite stand-in that nothing is computed from.
    """
    s = gl.arange(0, BS, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    if MANY:
        PAIRS: gl.constexpr = 64 // BS
        pairs = first + gl.arange(0, PAIRS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        query = gl.minimum(pairs, T * R - 1) // R
        m = gl.expand_dims(gl.expand_dims(query, 1), 2) - gl.expand_dims(gl.expand_dims(s, 0), 2)
    else:
        m = gl.minimum(first, T * R - 1) // R - gl.expand_dims(gl.expand_dims(s, 0), 2)
    m = gl.maximum(m + S2 - T, 0)
    start = ((b * S2).to(gl.int64) * G + group) * D
    return gl.load(ptr + start + (m * (G * D) + gl.expand_dims(gl.expand_dims(d, 0), 1)))


@gluon.jit
@no_type_check
def virtual_queries(q, k2, k2_bias, K2_BIAS: gl.constexpr):
    """u = q o (k2 + bias), rounded once: every kernel must form the same u, since the LSE of one is for all."""
    dtype: gl.constexpr = q.dtype
    multiply: gl.constexpr = "mul.bf16x2 $0, $1, $2;" if dtype == gl.bfloat16 else "mul.f16x2 $0, $1, $2;"
    if K2_BIAS:
        u = (q.to(gl.float32) * (k2.to(gl.float32) + k2_bias)).to(dtype)
    else:
        q, k2 = gl.broadcast(q, k2)
        u = gl.inline_asm_elementwise(multiply, "=r,r,r", [q, k2], dtype=q.dtype, is_pure=True, pack=2)
    return u


@gluon.jit
@no_type_check
def virtual_cross(qa, qb, k2a, k2b):
    """u of the determinant form from permuted copies, k2a qb - k2b qa: the same roundings in every kernel."""
    if qa.dtype == gl.bfloat16:
        cross: gl.constexpr = "{.reg .b32 t; mul.bf16x2 t, $3, $4; neg.bf16x2 t, t; fma.rn.bf16x2 $0, $1, $2, t;}"
    else:
        cross: gl.constexpr = "{.reg .b32 t; mul.f16x2 t, $3, $4; neg.f16x2 t, t; fma.rn.f16x2 $0, $1, $2, t;}"
    k2a, qb = gl.broadcast(k2a, qb)
    k2b, qa = gl.broadcast(k2b, qa)
    return gl.inline_asm_elementwise(cross, "=r,r,r,r,r", [k2a, qb, k2b, qa], dtype=qa.dtype, is_pure=True, pack=2)


def gluon_type(x: Tensor) -> Any:
    return gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16


def pairs_of_tile(w2: int) -> int:
    """Pairs (query, head) of a tile of 128 rows: offsets are padded to a power of two, at least 8."""
    return 128 // next_power(w2, 8)


@cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return PROCESSORS_ASSUMED
    return torch.cuda.get_device_properties(device).multi_processor_count


def descriptor(x: Tensor, *box: int) -> TensorDescriptor:
    """TMA descriptor of x, a box of rows and columns at a time, laid out as the tensor cores read it."""
    layout: Any = gl.NVMMASharedLayout.get_default_for(list(box), gluon_type(x))
    return TensorDescriptor.from_tensor(x, list(box), layout)


def tile_arguments(
    p: Problem, scale: float, reach: Tensor | None, lse: Tensor, block: int, stages: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments and constants of every kernel over these tiles, which reads keys (B * S1, G * D) `block` at a time."""
    batch, steps, s1, s2, groups, per_group, dim = p.shape
    (q, qb), (k2, k2b) = p.right(p.q), p.left(p.k2)
    k, v = (descriptor(x.view(batch * s1, groups * dim), block, dim) for x in (p.k, p.v))
    pairs = pairs_of_tile(p.w2)
    tiles = -(-steps * per_group // pairs)
    args = {
        "k_desc": k, "v_desc": v, "q_ptr": q, "qb_ptr": qb, "k2_ptr": k2, "k2b_ptr": k2b, "v2_ptr": p.v2,
        "reach_ptr": lse if reach is None else reach,  # without documents any pointer will do
        "T": steps, "S1": s1, "S2": s2, "w1": p.w1, "w2": p.w2, "tiles": tiles, "total": batch * groups * tiles,
        "scale_log2": scale * LOG2E, "k2_bias": p.k2_bias, "v2_bias": p.v2_bias,
    }  # fmt: skip
    constants = {
        "R": per_group, "G": groups, "D": dim, "BN": block, "BS": next_power(p.w2, 8), "STAGES": stages,
        "DETERMINANT": p.determinant, "HAS_DOCS": reach is not None, "MANY": per_group % pairs != 0,
    }  # fmt: skip
    return args, constants
