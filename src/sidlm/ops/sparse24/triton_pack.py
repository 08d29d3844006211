"""Squared ReLU, 2:4 selection, rounding and packing in one kernel (arXiv 2503.16672, section 3).

A thread reads eight neighbouring pre-activations at a time, 16 bytes in half precision, and keeps them to itself until
it writes four values and a byte of metadata: nothing goes through shared memory, and what a warp writes is whole
sectors. A program has one of two shapes:

* 16-bit values: a strip of columns over a few rows. It counts the active tokens of its features on the way.
* e4m3 values: one row, for its largest element has to be known before any is rounded. The chosen half of the row waits
  in registers, so pre-activations are read once. Counting is a kernel of its own over the result (triton_features.py).

At T = 8192, F = 21504 and 4.0 TB/s: 16 bits move 2 + 1 + 1/8 bytes an element, 0.138 ms; fp8 moves 2 + 1/2 + 1/8,
0.116 ms. Without counts both run at the speed of a copy (T = 16384, H200: 4.23 and 4.24 TB/s, a copy 4.23).
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24 import triton_features
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.triton_groups import (
    add_positive,
    byte_of,
    choose,
    in_pairs,
    lanes,
    largest,
    power_of_two,
    quads,
    relu,
    to_bytes,
    wide,
)


@triton.jit
@no_type_check
def add_columns(active, counts_ptr, totals_ptr, first, F: tl.constexpr, G: tl.constexpr):
    """Add the counts in the four bytes of int32 [G] to columns first .. first + 4G - 1, and their sum to totals."""
    even, odd = tl.join(active & 255, active >> 16 & 255), tl.join(active >> 8 & 255, active >> 24 & 255)
    counts = tl.reshape(tl.join(even, odd), [4 * G])
    columns = first + tl.arange(0, 4 * G)
    tl.atomic_add(counts_ptr + columns, counts, mask=(columns < F) & (counts > 0), sem="relaxed")
    tl.atomic_add(totals_ptr, tl.sum(counts), sem="relaxed")


@triton.jit
@no_type_check
def pack_tiles_kernel(
    y_ptr, values_ptr, metadata_ptr, counts_ptr, totals_ptr, T, steps,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, COUNT: tl.constexpr,
    BF: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y1 (T, F) -> values (T, F / 2), metadata; a program has steps * UNROLL <= 64 rows of BF columns."""
    G: tl.constexpr = BF // 4
    strips: tl.constexpr = (F + BF - 1) // BF
    strip, block = tl.program_id(0) % strips, tl.program_id(0) // strips
    c = strip * BF + tl.arange(0, BF)[None, :]
    c_values = strip * (BF // 2) + tl.arange(0, BF // 2)[None, :]
    c_bytes = strip * (G // 2) + tl.arange(0, G // 2)[None, :]
    # a byte for each of four columns; at most 4 * 64 in a lane, which bfloat16 still counts
    active = tl.zeros([1, G], tl.int32)
    before = tl.zeros([1, G], y_ptr.dtype.element_ty if PACKED else tl.float32)
    for step in range(steps):
        loaded = ()
        for i in tl.static_range(UNROLL):  # before anything is written: the compiler moves no load past a store
            row = (block * steps + step) * UNROLL + i
            y = tl.load(y_ptr + row.to(tl.int64) * F + c, mask=(row < T) & (c < F), other=0.0)
            loaded = loaded + (y,)
        for i in tl.static_range(UNROLL):
            row = (block * steps + step) * UNROLL + i
            base, inside = row.to(tl.int64), row < T
            x0, x1, x2, x3 = quads(lanes(loaded[i], PACKED), 1, BF)
            low, high, nibbles = choose(x0, x1, x2, x3, False, PACKED)
            low, high = relu(low, PACKED).to(tl.float32), relu(high, PACKED).to(tl.float32)
            values = tl.join(low * low, high * high).to(values_ptr.dtype.element_ty)
            if COUNT:
                before = add_positive(add_positive(before, x0, PACKED), x1, PACKED)
                before = add_positive(add_positive(before, x2, PACKED), x3, PACKED)
                low, high = tl.split(values.to(tl.float32))
                active += tl.where(low > 0, 1 << 8 * (nibbles & 3), 0)
                active += tl.where(high > 0, 1 << 8 * (nibbles >> 2), 0)
            out = values_ptr + base * (F // 2) + c_values
            tl.store(out, tl.reshape(values, [1, BF // 2]), mask=inside & (c_values < F // 2))
            out = metadata_ptr + BYTE(base if WIDE else row, c_bytes, T, F)
            tl.store(out, to_bytes(nibbles, 1, G), mask=inside & (c_bytes < F // 8))
    if COUNT:
        tl.atomic_add(totals_ptr, tl.sum(before.to(tl.float32)).to(tl.int32), sem="relaxed")
        add_columns(tl.reshape(active, [G]), counts_ptr, totals_ptr + 1, strip * BF, F, G)


@triton.jit
@no_type_check
def pack_rows_kernel(
    y_ptr, values_ptr, metadata_ptr, scale_ptr, totals_ptr, T,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, COUNT: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """y1 (T, F) -> e4m3 values (T, F / 2), metadata, scale (T,); a program has one row."""
    G: tl.constexpr = BF // 4
    CHUNKS: tl.constexpr = (F + BF - 1) // BF
    row = tl.program_id(0)
    base = row.to(tl.int64)
    c = tl.arange(0, BF)[None, :]
    c_values, c_bytes = tl.arange(0, BF // 2)[None, :], tl.arange(0, G // 2)[None, :]
    top = tl.zeros([1, G], y_ptr.dtype.element_ty if PACKED else tl.float32)
    before = tl.zeros([1, G], y_ptr.dtype.element_ty if PACKED else tl.float32)
    kept, loaded = (), ()
    for chunk in tl.static_range(CHUNKS):  # before anything is written: the compiler moves no load past a store
        loaded = loaded + (tl.load(y_ptr + base * F + chunk * BF + c, mask=c < F - chunk * BF, other=0.0),)
    for chunk in tl.static_range(CHUNKS):
        x0, x1, x2, x3 = quads(lanes(loaded[chunk], PACKED), 1, BF)
        low, high, nibbles = choose(x0, x1, x2, x3, False, PACKED)
        if COUNT:
            before = add_positive(add_positive(before, x0, PACKED), x1, PACKED)
            before = add_positive(add_positive(before, x2, PACKED), x3, PACKED)
        low, high = relu(low, PACKED), relu(high, PACKED)
        top = largest(largest(top, low, PACKED), high, PACKED)
        kept = kept + ((low, high),)
        out = metadata_ptr + BYTE(base if WIDE else row, chunk * (G // 2) + c_bytes, T, F)
        tl.store(out, to_bytes(nibbles, 1, G), mask=c_bytes < F // 8 - chunk * (G // 2))
    top = top.to(tl.float32)
    # as integers, for NaN is the largest of them
    scale, inverse = power_of_two(tl.max((top * top).to(tl.int32, bitcast=True) & 0x7FFFFFFF))
    tl.store(scale_ptr + row, scale)
    for chunk in tl.static_range(CHUNKS):
        low, high = kept[chunk][0].to(tl.float32), kept[chunk][1].to(tl.float32)
        values = tl.join(low * low * inverse, high * high * inverse).to(values_ptr.dtype.element_ty)
        out = values_ptr + base * (F // 2) + chunk * (BF // 2) + c_values
        tl.store(out, tl.reshape(values, [1, BF // 2]), mask=c_values < F // 2 - chunk * (BF // 2))
    if COUNT:
        tl.atomic_add(totals_ptr, tl.sum(before.to(tl.float32)).to(tl.int32), sem="relaxed")


UNROLL = 4
"""Rows of a 16-bit tile that are loaded at once."""
PROGRAMS = 2048
"""Of 16-bit tiles, before one has more rows: enough to fill any device."""
TILE = 1024
"""Columns of a 16-bit tile: 8 for each of 128 threads."""


def row_shape(F: int) -> tuple[int, int]:
    """Columns of a chunk and warps for programs that own whole rows: a thread keeps at most 24 groups of four."""
    warps = 4 if F <= 12 << 10 else 8 if F <= 24 << 10 else 16
    return 256 * warps, warps


def plan(y1: Tensor, act: Packed, counts: Tensor | None, totals: Tensor | None, layout: str, arch: str) -> Launch:
    """The launch that fills act, counts and totals[0] for a target; tensors may be on the meta device to compile it."""
    (T, F), fp8 = y1.shape, act.scale is not None
    constants = {
        "F": F, "BYTE": byte_of(layout, T, F), "WIDE": wide(T, F), "PACKED": in_pairs(arch, y1.dtype),
        "COUNT": totals is not None,
    }  # fmt: skip
    args = {"y_ptr": y1, "values_ptr": act.values, "metadata_ptr": act.metadata}
    if fp8:
        columns, warps = row_shape(F)
        args |= {"scale_ptr": act.scale, "totals_ptr": totals, "T": T}
        return Launch(pack_rows_kernel, T, args, constants | {"BF": columns}, warps)
    strips = -(-F // TILE)
    # few programs have few sums to add, and many, where nothing is added, keep the memory busier: 4.2 against 4.0 TB/s
    steps = 1 if totals is None else min(8, max(1, T * strips // (UNROLL * PROGRAMS)))
    args |= {"counts_ptr": counts, "totals_ptr": totals, "T": T, "steps": steps}
    grid = strips * -(-T // (UNROLL * steps))
    return Launch(pack_tiles_kernel, grid, args, constants | {"BF": TILE, "UNROLL": UNROLL}, 4)


def pack_activation(
    y1: Tensor, fp8: bool, layout: str = "plain", values: Tensor | None = None, metadata: Tensor | None = None,
    count: bool = True,
) -> tuple[Packed, Tensor, Tensor]:  # fmt: skip
    """relu(y1)^2 at the two largest y1 of every four features, rounded to y1's dtype or, by rows, to e4m3.

    y1 (T, F) is float32, bfloat16 or float16. values (T, F / 2) and metadata (T, F / 8), both contiguous, are written
    to if they are given. Also returns int32 counts (F,), the values > 0 of each feature, and int32 totals (2,): how
    many y1 are > 0, and the sum of counts; zeros unless count. Raises ValueError if F is no multiple of 8 or the layout
    of the metadata does not take (T, F).
    """
    byte_of(layout, *y1.shape)
    y1, arch = y1.contiguous(), target(y1.device)
    T, F = y1.shape
    if values is None:
        values = y1.new_empty(T, F // 2, dtype=FP8 if fp8 else y1.dtype)
    if metadata is None:
        metadata = y1.new_empty(T, F // 8, dtype=torch.uint8)
    act = Packed(values, metadata, y1.new_empty(T, dtype=torch.float32) if fp8 else None)
    sums = y1.new_zeros(F + 2, dtype=torch.int32)
    counts, totals = sums[:F], sums[F:]
    if y1.numel():
        plan(y1, act, *((counts, totals) if count else (None, None)), layout, arch).run()
        if fp8 and count:
            triton_features.plan_features(act, counts, None, layout, arch).run()
            torch.sum(counts, 0, dtype=torch.int32, out=totals[1])
    return act, counts, totals
