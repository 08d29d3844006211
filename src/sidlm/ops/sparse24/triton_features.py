"""What the features of a packed matrix hold: active tokens, for the split, or the largest magnitude, for a scale.

Sums and maxima of integers, so the order of additions does not show. At T = 8192, F = 21504 one reads 0.6 bytes an
element, 0.028 ms at 4.0 TB/s; about 12 comparisons and selections for every 4 elements take as long on an H200.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.triton_groups import add_positive, byte_of, in_pairs, largest, spread, to_nibbles, wide

PROGRAMS = 1024
"""Before one has more rows: enough to fill any device."""


@triton.jit
@no_type_check
def in_columns(x0, x1, x2, x3, G: tl.constexpr):
    """Four tensors [G] -> [4G] in the order of the columns."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [4 * G])


@triton.jit
@no_type_check
def features_kernel(
    values_ptr, metadata_ptr, scale_ptr, out_ptr, totals_ptr, T, steps,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, COUNT: tl.constexpr,
    BT: tl.constexpr, BG: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out (F,), int32: counts of values > 0, added, or bits of the largest magnitude.

    A program has steps * UNROLL <= 256 rows, for each of BT, of BG groups.
    """
    strips: tl.constexpr = (F // 4 + BG - 1) // BG
    strip, block = tl.program_id(0) % strips, tl.program_id(0) // strips
    rows = tl.arange(0, BT)[:, None]
    c = strip * BG * 2 + tl.arange(0, 2 * BG)[None, :]
    c_bytes = strip * (BG // 2) + tl.arange(0, BG // 2)[None, :]
    # counts stay within what 16 bits count; magnitudes, and 16-bit values of which none may vanish, need their range
    EIGHT: tl.constexpr = values_ptr.dtype.element_ty.primitive_bitwidth == 8
    dtype: tl.constexpr = (tl.float16 if COUNT and EIGHT else tl.bfloat16) if PACKED else tl.float32
    a0 = tl.zeros([BT, BG], dtype)
    a1, a2, a3 = a0, a0, a0
    for step in range(steps):
        for i in tl.static_range(UNROLL):
            row = ((block * steps + step) * UNROLL + i) * BT + rows
            far, inside = row.to(tl.int64), row < T
            v = tl.load(values_ptr + far * (F // 2) + c, mask=inside & (c < F // 2), other=0.0)  # [BT, 2 BG]
            place = BYTE(far if WIDE else row, c_bytes, T, F)
            metadata = tl.load(metadata_ptr + place, mask=inside & (c_bytes < F // 8), other=0)
            if COUNT:
                v = v.to(dtype)
            else:
                v = (v.to(tl.float32) * tl.load(scale_ptr + row, mask=inside, other=0.0)).to(dtype)
            low, high = tl.split(tl.reshape(v, [BT, BG, 2]))
            x0, x1, x2, x3 = spread(low, high, to_nibbles(metadata, BT, BG), PACKED)
            if COUNT:
                a0, a1 = add_positive(a0, x0, PACKED), add_positive(a1, x1, PACKED)
                a2, a3 = add_positive(a2, x2, PACKED), add_positive(a3, x3, PACKED)
            else:
                a0, a1 = largest(a0, x0, PACKED), largest(a1, x1, PACKED)
                a2, a3 = largest(a2, x2, PACKED), largest(a3, x3, PACKED)
    columns = strip * BG * 4 + tl.arange(0, 4 * BG)
    a0, a1, a2, a3 = a0.to(tl.float32), a1.to(tl.float32), a2.to(tl.float32), a3.to(tl.float32)
    if COUNT:
        counts = in_columns(tl.sum(a0, 0), tl.sum(a1, 0), tl.sum(a2, 0), tl.sum(a3, 0), BG).to(tl.int32)
        tl.atomic_add(out_ptr + columns, counts, mask=(columns < F) & (counts > 0), sem="relaxed")
        tl.atomic_add(totals_ptr, tl.sum(counts), sem="relaxed")
    else:
        # as integers, for NaN is the largest of them
        a0, a1 = tl.max(a0.to(tl.int32, bitcast=True), 0), tl.max(a1.to(tl.int32, bitcast=True), 0)
        a2, a3 = tl.max(a2.to(tl.int32, bitcast=True), 0), tl.max(a3.to(tl.int32, bitcast=True), 0)
        bits = in_columns(a0, a1, a2, a3, BG) & 0x7FFFFFFF
        tl.atomic_max(out_ptr + columns, bits, mask=(columns < F) & (bits > 0), sem="relaxed")


@triton.jit
@no_type_check
def columns_kernel(x_ptr, out_ptr, T, D, steps, BT: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr):
    """x (T, D) -> out (D,), bits of the largest magnitude of each column."""
    tiles = tl.cdiv(D, BD)
    d, block = tl.program_id(0) % tiles * BD + tl.arange(0, BD), tl.program_id(0) // tiles
    top = tl.zeros([BT, BD], tl.float32)
    for step in range(steps):
        for i in tl.static_range(UNROLL):
            row = ((block * steps + step) * UNROLL + i) * BT + tl.arange(0, BT)[:, None]
            x = tl.load(x_ptr + row.to(tl.int64) * D + d[None, :], mask=(row < T) & (d < D)[None, :], other=0.0)
            top = largest(top, x.to(tl.float32), False)
    bits = tl.max(top.to(tl.int32, bitcast=True), 0) & 0x7FFFFFFF
    tl.atomic_max(out_ptr + d, bits, mask=(d < D) & (bits > 0), sem="relaxed")


def _plan(p: Packed, out: Tensor, totals: Tensor | None, layout: str, arch: str) -> Launch:
    T, F = p.values.shape[0], 2 * p.values.shape[1]
    BT, BG, UNROLL = 4, 256, 4  # a warp has a row's 512 bytes at a time
    strips = -(-F // (4 * BG))
    steps = min(8, max(1, T * strips // (BT * UNROLL * PROGRAMS)))
    constants = {
        "F": F, "BYTE": byte_of(layout, T, F), "WIDE": wide(T, F), "PACKED": in_pairs(arch, torch.bfloat16),
        "COUNT": totals is not None, "BT": BT, "BG": BG, "UNROLL": UNROLL,
    }  # fmt: skip
    args = {
        "values_ptr": p.values, "metadata_ptr": p.metadata, "scale_ptr": p.scale, "out_ptr": out, "totals_ptr": totals,
        "T": T, "steps": steps,
    }  # fmt: skip
    return Launch(features_kernel, strips * -(-T // (BT * UNROLL * steps)), args, constants, 4)


def plan_counts(act: Packed, counts: Tensor, total: Tensor, layout: str, arch: str) -> Launch:
    """The launch that adds the values > 0 of act to counts (F,) and to total (1,)."""
    return _plan(act, counts, total, layout, arch)


def plan_largest(p: Packed, bits: Tensor, layout: str, arch: str) -> Launch:
    """The launch that raises bits (F,), of float32, to the largest magnitude of each feature."""
    return _plan(p, bits, None, layout, arch)


def largest_of_features(p: Packed, layout: str = "plain") -> Tensor:
    """Bits (int32) of the largest magnitude of each feature of p (T, F) in e4m3, scaled; NaN if there is one."""
    bits = torch.zeros(2 * p.values.shape[1], dtype=torch.int32, device=p.values.device)
    if p.values.numel():
        plan_largest(p, bits, layout, target(bits.device)).run()
    return bits


def counts_of_features(act: Packed) -> Tensor:
    """int32 (F,): values > 0 of each feature of act (T, F), e4m3 or bfloat16, plain metadata."""
    sums = torch.zeros(2 * act.values.shape[1] + 1, dtype=torch.int32, device=act.values.device)
    if act.values.numel():
        plan_counts(act, sums[:-1], sums[-1:], "plain", target(sums.device)).run()
    return sums[:-1]


def plan_columns(x: Tensor, bits: Tensor) -> Launch:
    """The launch that raises bits (d,), of float32, to the largest magnitude of each column of x (T, d)."""
    T, D = x.shape
    BT, BD, UNROLL = 4, 256, 4
    tiles = -(-D // BD)
    steps = min(8, max(1, T * tiles // (BT * UNROLL * PROGRAMS)))
    args = {"x_ptr": x, "out_ptr": bits, "T": T, "D": D, "steps": steps}
    grid = tiles * -(-T // (BT * UNROLL * steps))
    return Launch(columns_kernel, grid, args, {"BT": BT, "BD": BD, "UNROLL": UNROLL}, 4)


def largest_of_columns(x: Tensor) -> Tensor:
    """Bits (int32) of the largest magnitude of each column of x (T, d), contiguous; NaN if there is one."""
    bits = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    if x.numel():
        plan_columns(x, bits).run()
    return bits
