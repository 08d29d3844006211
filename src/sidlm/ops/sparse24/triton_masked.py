"""2:4 activations that are not packed, for products that are dense: relu^2 with zeros where packing drops it.

For few tokens packing costs more than sparse products save. The function is the same, selection and rounding included,
and what is read and written is what dense squared ReLU reads and writes: 2 + 2 bytes an element in 16 bits, where the
result may take the place of y1, and 2 + 1 in fp8; of the gradient 2 + 2 + 2 and 2 + 1 + 1.
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.triton_groups import (
    add_positive,
    in_columns,
    in_pairs,
    kept,
    lanes,
    largest,
    power_of_two,
    quads,
    relu,
    root,
)


@triton.jit
@no_type_check
def activation_tiles_kernel(
    y_ptr, out_ptr, counts_ptr, totals_ptr, T, steps,
    F: tl.constexpr, PACKED: tl.constexpr, COUNT: tl.constexpr, BF: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """y1 (T, F) -> out (T, F), which may be y1; a program has steps * UNROLL <= 64 rows of BF columns."""
    G: tl.constexpr = BF // 4
    strips: tl.constexpr = (F + BF - 1) // BF
    strip, block = tl.program_id(0) % strips, tl.program_id(0) // strips
    c = strip * BF + tl.arange(0, BF)[None, :]
    kind: tl.constexpr = y_ptr.dtype.element_ty if PACKED else tl.float32
    before = tl.zeros([1, G], kind)  # at most 4 * 64, which bfloat16 still counts
    n0, n1, n2, n3 = before, before, before, before
    for step in range(steps):
        loaded = ()
        for i in tl.static_range(UNROLL):  # before anything is written: the compiler moves no load past a store
            row = (block * steps + step) * UNROLL + i
            loaded = loaded + (tl.load(y_ptr + row.to(tl.int64) * F + c, mask=(row < T) & (c < F), other=0.0),)
        for i in tl.static_range(UNROLL):
            row = (block * steps + step) * UNROLL + i
            x0, x1, x2, x3 = quads(lanes(loaded[i], PACKED), 1, BF)
            if COUNT:
                before = add_positive(add_positive(before, x0, PACKED), x1, PACKED)
                before = add_positive(add_positive(before, x2, PACKED), x3, PACKED)
            x0, x1, x2, x3 = kept(x0, x1, x2, x3, False, PACKED)
            x0, x1 = square(relu(x0, PACKED), out_ptr), square(relu(x1, PACKED), out_ptr)
            x2, x3 = square(relu(x2, PACKED), out_ptr), square(relu(x3, PACKED), out_ptr)
            if COUNT:
                n0, n1 = add_positive(n0, lanes(x0, PACKED), PACKED), add_positive(n1, lanes(x1, PACKED), PACKED)
                n2, n3 = add_positive(n2, lanes(x2, PACKED), PACKED), add_positive(n3, lanes(x3, PACKED), PACKED)
            out = out_ptr + row.to(tl.int64) * F + c
            tl.store(out, in_columns(x0, x1, x2, x3, 1, G), mask=(row < T) & (c < F))
    if COUNT:
        counts = in_columns(n0, n1, n2, n3, 1, G).to(tl.float32).to(tl.int32)
        tl.atomic_add(counts_ptr + c, counts, mask=(c < F) & (counts > 0), sem="relaxed")
        tl.atomic_add(totals_ptr, tl.sum(before.to(tl.float32)).to(tl.int32), sem="relaxed")
        tl.atomic_add(totals_ptr + 1, tl.sum(counts), sem="relaxed")


@triton.jit
@no_type_check
def square(x, out_ptr):
    x = x.to(tl.float32)
    return (x * x).to(out_ptr.dtype.element_ty)


@triton.jit
@no_type_check
def activation_rows_kernel(
    y_ptr, out_ptr, scale_ptr, totals_ptr, T,
    F: tl.constexpr, PACKED: tl.constexpr, COUNT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """y1 (T, F) -> e4m3 out (T, F), scale (T,); a program has one row."""
    G: tl.constexpr = BF // 4
    CHUNKS: tl.constexpr = (F + BF - 1) // BF
    row = tl.program_id(0)
    base = row.to(tl.int64) * F
    c = tl.arange(0, BF)[None, :]
    kind: tl.constexpr = y_ptr.dtype.element_ty if PACKED else tl.float32
    top = tl.zeros([1, G], kind)
    before = tl.zeros([1, G], kind)
    rows, loaded = (), ()
    for chunk in tl.static_range(CHUNKS):
        loaded = loaded + (tl.load(y_ptr + base + chunk * BF + c, mask=c < F - chunk * BF, other=0.0),)
    for chunk in tl.static_range(CHUNKS):
        x0, x1, x2, x3 = quads(lanes(loaded[chunk], PACKED), 1, BF)
        if COUNT:
            before = add_positive(add_positive(before, x0, PACKED), x1, PACKED)
            before = add_positive(add_positive(before, x2, PACKED), x3, PACKED)
        x0, x1, x2, x3 = kept(x0, x1, x2, x3, False, PACKED)
        x0, x1, x2, x3 = relu(x0, PACKED), relu(x1, PACKED), relu(x2, PACKED), relu(x3, PACKED)
        top = largest(largest(largest(largest(top, x0, PACKED), x1, PACKED), x2, PACKED), x3, PACKED)
        rows = rows + ((x0, x1, x2, x3),)
    top = top.to(tl.float32)
    # as integers, for NaN is the largest of them
    scale, inverse = power_of_two(tl.max((top * top).to(tl.int32, bitcast=True) & 0x7FFFFFFF))
    tl.store(scale_ptr + row, scale)
    for chunk in tl.static_range(CHUNKS):
        x0, x1 = rows[chunk][0].to(tl.float32), rows[chunk][1].to(tl.float32)
        x2, x3 = rows[chunk][2].to(tl.float32), rows[chunk][3].to(tl.float32)
        out = in_columns(x0 * x0 * inverse, x1 * x1 * inverse, x2 * x2 * inverse, x3 * x3 * inverse, 1, G)
        at = out_ptr + base + chunk * BF + c
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=c < F - chunk * BF)
    if COUNT:
        tl.atomic_add(totals_ptr, tl.sum(before.to(tl.float32)).to(tl.int32), sem="relaxed")


@triton.jit
@no_type_check
def gradient_rows_kernel(
    dy2_ptr, act_ptr, act_scale_ptr, out_ptr, scale_ptr, T,
    F: tl.constexpr, PACKED: tl.constexpr, FP8: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """dy2 (T, F), act (T, F) -> out (T, F), which may be dy2, and scale (T,); a program has one row."""
    CHUNKS: tl.constexpr = (F + BF - 1) // BF
    row = tl.program_id(0)
    base = row.to(tl.int64) * F
    c = tl.arange(0, BF)
    before, after = 1.0, 2.0
    if FP8:  # the root of a power of two, which is odd or even
        act_scale = tl.load(act_scale_ptr + row)
        exponent = (act_scale.to(tl.int32, bitcast=True) >> 23) - 127
        before = tl.where((exponent & 1) == 1, 2.0, 1.0)
        twice = ((exponent >> 1) + 128 << 23).to(tl.float32, bitcast=True)
        after = tl.where(act_scale == act_scale, twice, float("nan"))
    top = tl.zeros([BF], tl.float32)
    loaded, rows = (), ()
    for chunk in tl.static_range(CHUNKS):
        at, inside = base + chunk * BF + c, c < F - chunk * BF
        dy2 = tl.load(dy2_ptr + at, mask=inside, other=0.0)
        loaded = loaded + ((dy2, tl.load(act_ptr + at, mask=inside, other=0.0)),)
    for chunk in tl.static_range(CHUNKS):
        act = loaded[chunk][1].to(tl.float32) * before
        gradient = after * root(act, FP8, PACKED) * loaded[chunk][0].to(tl.float32)
        if FP8:
            top = largest(top, gradient, False)
            rows = rows + (gradient,)
        else:
            tl.store(out_ptr + base + chunk * BF + c, gradient.to(out_ptr.dtype.element_ty), mask=c < F - chunk * BF)
    if FP8:
        scale, inverse = power_of_two(tl.max(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF))
        tl.store(scale_ptr + row, scale)
        for chunk in tl.static_range(CHUNKS):
            out = (rows[chunk] * inverse).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + base + chunk * BF + c, out, mask=c < F - chunk * BF)


UNROLL, PROGRAMS, TILE = 4, 2048, 1024
"""As in triton_pack.py"""


def whole_rows(F: int) -> tuple[int, int]:
    """Columns of a chunk and warps for programs that keep whole rows: a thread keeps about 48 elements."""
    warps = 4 if F <= 6 << 10 else 8 if F <= 12 << 10 else 16
    return min(256 * warps, 1 << (max(F, 128 * warps) - 1).bit_length()), warps


def plan_activation(
    y1: Tensor, out: Tensor, scale: Tensor | None, counts: Tensor | None, totals: Tensor | None, arch: str
) -> Launch:
    """The launch that fills out, scale, counts and totals; meta tensors will do to compile it."""
    T, F = y1.shape
    constants = {"F": F, "PACKED": in_pairs(arch, y1.dtype), "COUNT": totals is not None}
    args = {"y_ptr": y1, "out_ptr": out}
    if scale is not None:
        columns, warps = whole_rows(F)
        args |= {"scale_ptr": scale, "totals_ptr": totals, "T": T}
        return Launch(activation_rows_kernel, T, args, constants | {"BF": columns}, warps)
    strips = -(-F // TILE)
    steps = min(8, max(1, T * strips // (UNROLL * PROGRAMS)))
    args |= {"counts_ptr": counts, "totals_ptr": totals, "T": T, "steps": steps}
    grid = strips * -(-T // (UNROLL * steps))
    return Launch(activation_tiles_kernel, grid, args, constants | {"BF": TILE, "UNROLL": UNROLL}, 4)


def plan_gradient(
    dy2: Tensor, act: Tensor, act_scale: Tensor | None, out: Tensor, scale: Tensor | None, arch: str
) -> Launch:
    """The launch that fills out and scale; meta tensors will do to compile it."""
    T, F = dy2.shape
    columns, warps = whole_rows(F)
    constants = {"F": F, "PACKED": in_pairs(arch, dy2.dtype), "FP8": scale is not None, "BF": columns}
    args = {
        "dy2_ptr": dy2, "act_ptr": act, "act_scale_ptr": act_scale, "out_ptr": out, "scale_ptr": scale, "T": T
    }  # fmt: skip
    return Launch(gradient_rows_kernel, T, args, constants, warps)


def activation(y1: Tensor, fp8: bool, count: bool = True) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """relu(y1)^2 (T, F) with zeros but for the two largest y1 of every four features; scale (T,) in fp8, or None.

    In 16 bits it is written over y1. Then int32 counts (F,), the values > 0 of each feature, which in fp8 are left to
    `triton_features.of_features`, and int32 totals (2,): how many y1 are > 0, and the sum of counts; zeros unless
    count. y1 is contiguous, F a multiple of 4.
    """
    T, F = y1.shape
    out, scale = (y1.new_empty(T, F, dtype=FP8), y1.new_empty(T, dtype=torch.float32)) if fp8 else (y1, None)
    sums = y1.new_zeros(F + 2, dtype=torch.int32)
    counts, totals = sums[:F], sums[F:]
    if y1.numel():
        given = (counts, totals) if count else (None, None)
        plan_activation(y1, out, scale, *given, target(y1.device)).run()
    return out, scale, counts, totals


def gradient(dy2: Tensor, act: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """2 sqrt(act) dy2 (T, F) in dy2's memory or, if act has a scale, in e4m3, with its scale (T,).

    dy2 is contiguous.
    """
    out, scale = dy2, None
    if act_scale is not None:
        out, scale = dy2.new_empty(dy2.shape, dtype=FP8), dy2.new_empty(len(dy2), dtype=torch.float32)
    if dy2.numel():
        plan_gradient(dy2, act, act_scale, out, scale, target(dy2.device)).run()
    return out, scale
