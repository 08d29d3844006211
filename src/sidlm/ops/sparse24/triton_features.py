"""What the features of an activation hold: active tokens, for the split, and the largest magnitude, for a scale.

Sums and maxima of integers, so the order of additions does not show. At T = 8192, F = 21504 packed e4m3 is 0.6 bytes an
element, 0.028 ms at 4.0 TB/s; about 12 comparisons and selections for every 4 elements take as long on an H200.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.triton_groups import (
    add_positive,
    byte_of,
    in_columns,
    in_pairs,
    largest,
    quads,
    spread,
    to_nibbles,
    wide,
)
from sidlm.ops.sparse24.triton_units import features_units_kernel, selectors

PROGRAMS = 1024
"""Before one has more rows: enough to fill any device."""


@triton.jit
@no_type_check
def features_kernel(
    values_ptr, metadata_ptr, scale_ptr, counts_ptr, bits_ptr, T, steps,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, SCALED: tl.constexpr,
    COUNT: tl.constexpr, LARGEST: tl.constexpr, BT: tl.constexpr, BG: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """counts (F,), int32: values > 0, added; bits (F,) of the largest magnitude. Without BYTE the matrix is not packed.

    A program has steps * UNROLL <= 256 rows, for each of BT, of BG groups.
    """
    strips: tl.constexpr = (F // 4 + BG - 1) // BG
    strip, block = tl.program_id(0) % strips, tl.program_id(0) // strips
    rows = tl.arange(0, BT)[:, None]
    # of what is scaled the range is that of float32; counts stay within what bfloat16 counts
    kind: tl.constexpr = (tl.bfloat16 if SCALED else values_ptr.dtype.element_ty) if PACKED else tl.float32
    a0, n0 = tl.zeros([BT, BG], kind), tl.zeros([BT, BG], kind)
    a1, a2, a3, n1, n2, n3 = a0, a0, a0, n0, n0, n0
    for step in range(steps):
        for i in tl.static_range(UNROLL):
            row = ((block * steps + step) * UNROLL + i) * BT + rows
            far, inside = row.to(tl.int64), row < T
            factor = 1.0
            if SCALED:
                factor = tl.load(scale_ptr + row, mask=inside, other=0.0)
            if BYTE is None:
                c = strip * BG * 4 + tl.arange(0, 4 * BG)[None, :]
                v = tl.load(values_ptr + far * F + c, mask=inside & (c < F), other=0.0)  # [BT, 4 BG]
                x0, x1, x2, x3 = quads(scaled(v, factor, kind, SCALED), BT, 4 * BG)
            else:
                c = strip * BG * 2 + tl.arange(0, 2 * BG)[None, :]
                c_bytes = strip * (BG // 2) + tl.arange(0, BG // 2)[None, :]
                v = tl.load(values_ptr + far * (F // 2) + c, mask=inside & (c < F // 2), other=0.0)  # [BT, 2 BG]
                place = BYTE(far if WIDE else row, c_bytes, T, F)
                metadata = tl.load(metadata_ptr + place, mask=inside & (c_bytes < F // 8), other=0)
                low, high = tl.split(tl.reshape(scaled(v, factor, kind, SCALED), [BT, BG, 2]))
                x0, x1, x2, x3 = spread(low, high, to_nibbles(metadata, BT, BG), PACKED)
            if COUNT:
                n0, n1 = add_positive(n0, x0, PACKED), add_positive(n1, x1, PACKED)
                n2, n3 = add_positive(n2, x2, PACKED), add_positive(n3, x3, PACKED)
            if LARGEST:
                a0, a1 = largest(a0, x0, PACKED), largest(a1, x1, PACKED)
                a2, a3 = largest(a2, x2, PACKED), largest(a3, x3, PACKED)
    columns = strip * BG * 4 + tl.arange(0, 4 * BG)[None, :]
    if COUNT:
        counts = in_columns(total(n0), total(n1), total(n2), total(n3), 1, BG)
        tl.atomic_add(counts_ptr + columns, counts, mask=(columns < F) & (counts > 0), sem="relaxed")
    if LARGEST:
        bits = in_columns(highest(a0), highest(a1), highest(a2), highest(a3), 1, BG)
        tl.atomic_max(bits_ptr + columns, bits, mask=(columns < F) & (bits > 0), sem="relaxed")


@triton.jit
@no_type_check
def scaled(v, factor, kind: tl.constexpr, SCALED: tl.constexpr):
    if SCALED:
        v = v.to(tl.float32) * factor
    return v.to(kind)


@triton.jit
@no_type_check
def total(n):
    """[BT, BG] -> int32 [1, BG]."""
    return tl.sum(n.to(tl.float32), 0, keep_dims=True).to(tl.int32)


@triton.jit
@no_type_check
def highest(a):
    """[BT, BG] -> bits of float32 [1, BG]: as integers, for NaN is the largest of them."""
    return tl.max(a.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0, keep_dims=True)


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


def plan_features(p: Packed, counts: Tensor | None, bits: Tensor | None, layout: str | None, arch: str) -> Launch:
    """The launch that adds to counts (F,) the values > 0, and raises bits (F,), of float32, to the largest magnitude.

    p (T, F) may be packed or, where no layout is given, not; then its metadata is not looked at.
    """
    T, F = p.values.shape[0], p.values.shape[1] * (1 if layout is None else 2)
    by_pairs = in_pairs(arch, torch.bfloat16 if p.scale is not None else p.values.dtype)
    if by_pairs and p.scale is not None and layout == "plain" and bits is not None:
        return _plan_units(p, counts, bits)
    BT, BG, UNROLL = 4, 256, 4  # a warp has a row's 512 bytes at a time
    strips = -(-F // (4 * BG))
    steps = min(8, max(1, T * strips // (BT * UNROLL * PROGRAMS)))
    constants = {
        "F": F, "BYTE": None if layout is None else byte_of(layout, T, F), "WIDE": wide(T, F),
        "PACKED": by_pairs, "SCALED": p.scale is not None, "COUNT": counts is not None, "LARGEST": bits is not None,
        "BT": BT, "BG": BG, "UNROLL": UNROLL,
    }  # fmt: skip
    args = {
        "values_ptr": p.values, "metadata_ptr": p.metadata, "scale_ptr": p.scale, "counts_ptr": counts,
        "bits_ptr": bits, "T": T, "steps": steps,
    }  # fmt: skip
    return Launch(features_kernel, strips * -(-T // (BT * UNROLL * steps)), args, constants, 4)


def _plan_units(p: Packed, counts: Tensor | None, bits: Tensor) -> Launch:
    T, F = p.values.shape[0], 2 * p.values.shape[1]
    U, UNROLL, warps = 256, 8, 2  # four units of a row a thread
    strips = -(-F // (8 * U))
    steps = min(16, max(1, T * strips // (UNROLL * 2 * PROGRAMS)))
    args = {
        "values_ptr": p.values.view(torch.int32), "metadata_ptr": p.metadata, "scale_ptr": p.scale,
        "table_ptr": selectors(p.values.device), "counts_ptr": counts, "bits_ptr": bits, "T": T, "steps": steps,
    }  # fmt: skip
    constants = {"F": F, "COUNT": counts is not None, "U": U, "UNROLL": UNROLL}
    return Launch(features_units_kernel, strips * -(-T // (UNROLL * steps)), args, constants, warps)


def of_features(
    p: Packed, layout: str | None = "plain", *, count: bool = True, top: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """int32 (F,): counts of the values > 0 of each feature of p (T, F), scaled if it has a scale; and bits of its
    largest magnitude, NaN if there is one. None for what is not asked for; p as of `plan_features`."""
    F = p.values.shape[1] * (1 if layout is None else 2)
    sums = torch.zeros(2, F, dtype=torch.int32, device=p.values.device)
    counts, bits = sums[0] if count else None, sums[1] if top else None
    if p.values.numel():
        plan_features(p, counts, bits, layout, target(sums.device)).run()
    return counts, bits


def largest_of_features(p: Packed, layout: str | None = "plain") -> Tensor:
    """Bits (int32) of the largest magnitude of each feature of p (T, F) in e4m3, scaled; NaN if there is one."""
    _, bits = of_features(p, layout, count=False)
    assert bits is not None
    return bits


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
