"""Packed e4m3 by units: four values and a byte of metadata, eight columns of a row, in one thread (sm_90 and later).

To find out where values belong takes 13 instructions a unit of the pipe that has half the rate of the others. A table
says it in one load: for each byte of metadata the selectors with which `prmt` spreads the four values to the places of
two groups, first one's in the low half of a word, second one's in the high half, a word for each place in a group.
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

import functools
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

ZERO = 4  # `prmt` reads bytes 0 .. 3 of the values and then those of a zero


@functools.cache
def selectors(device: torch.device) -> Tensor:
    """int64 (256,): for each byte of metadata four times 16 bits, one for each place in a group."""
    table = []
    for byte in range(256):
        word = 0
        for place in range(4):
            for group in range(2):
                nibble = byte >> 4 * group & 15
                which = [nibble & 3, nibble >> 2]
                source = 2 * group + which.index(place) if place in which else ZERO
                word |= (source | ZERO << 4) << 16 * place + 8 * group
        table.append(word - (1 << 64) if word >> 63 else word)
    return torch.tensor(table, dtype=torch.int64, device=device)


@triton.constexpr_function
def spread_ptx(values, table, sign):
    """PTX: x0 .. x3, the e4m3 values of each place in the low bytes of two halves; without sign their magnitudes."""
    return f"""
.reg .b32 v, s01, s23, x0, x1, x2, x3;
mov.b64 {{s01, s23}}, {table};
{f"mov.b32 v, {values};" if sign else f"and.b32 v, {values}, 0x7f7f7f7f;"}
prmt.b32 x0, v, 0, s01;
shr.u32 s01, s01, 16;
prmt.b32 x1, v, 0, s01;
prmt.b32 x2, v, 0, s23;
shr.u32 s23, s23, 16;
prmt.b32 x3, v, 0, s23;"""


@triton.constexpr_function
def features_ptx(count):
    """Operands: largest magnitudes a0 .. a3, counts n0 .. n3 if count; values, table, two factors, a0 .. a3, n0 .. n3.

    The bits of e4m3 are those of a bfloat16 that is 2^-120 of it, four places further up.
    """
    outputs = 8 if count else 4
    code = "{" + spread_ptx(f"${outputs}", f"${outputs + 1}", False) + "\n.reg .b32 one, zero;\nmov.b32 zero, 0;\n"
    for i in range(4):
        code += f"""mul.lo.u32 x{i}, x{i}, 16;
mul.rn.bf16x2 x{i}, x{i}, ${outputs + 2};
mul.rn.bf16x2 x{i}, x{i}, ${outputs + 3};
max.NaN.bf16x2 ${i}, x{i}, ${outputs + 4 + i};
"""
        if count:
            code += f"set.gt.bf16x2.bf16x2 one, x{i}, zero;\nadd.rn.bf16x2 ${4 + i}, one, ${outputs + 8 + i};\n"
    return code + "}"


@triton.jit
@no_type_check
def half(x, which: tl.constexpr):
    """The low or the high half of int32, a bfloat16, as float32."""
    if which:
        return (x >> 16 << 16).to(tl.float32, bitcast=True)
    else:
        return (x << 16).to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def unit_columns(x0, x1, x2, x3, U: tl.constexpr):
    """Four words [1, U], one for each place in a group, with a half for each group -> float32 [1, 8U] by columns."""
    low = tl.join(tl.join(half(x0, 0), half(x2, 0)), tl.join(half(x1, 0), half(x3, 0)))
    high = tl.join(tl.join(half(x0, 1), half(x2, 1)), tl.join(half(x1, 1), half(x3, 1)))
    return tl.reshape(tl.permute(tl.join(low, high), [0, 1, 4, 2, 3]), [1, 8 * U])


@triton.jit
@no_type_check
def factors(scale):
    """Two bfloat16 in both halves of int32, whose product is 2^120 times the scale, a power of two; NaN for NaN."""
    exponent = (scale.to(tl.int32, bitcast=True) >> 23) - 7  # 120 - 127
    first = exponent >> 1
    one = tl.where(scale == scale, (first + 127) * 0x00800080, 0x7FC07FC0)
    return one, (exponent - first + 127) * 0x00800080


@triton.jit
@no_type_check
def features_units_kernel(
    values_ptr, metadata_ptr, scale_ptr, table_ptr, counts_ptr, bits_ptr, T, steps,
    F: tl.constexpr, COUNT: tl.constexpr, U: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`features_kernel` of packed e4m3, values as int32; a program has steps * UNROLL <= 256 rows of U units."""
    strips: tl.constexpr = (F // 8 + U - 1) // U
    strip, block = tl.program_id(0) % strips, tl.program_id(0) // strips
    u = strip * U + tl.arange(0, U)[None, :]
    a0 = tl.zeros([1, U], tl.int32)
    a1, a2, a3, n0, n1, n2, n3 = a0, a0, a0, a0, a0, a0, a0
    for step in range(steps):
        loaded = ()
        for i in tl.static_range(UNROLL):
            row = (block * steps + step) * UNROLL + i
            inside = (row < T) & (u < F // 8)
            at = row.to(tl.int64) * (F // 8) + u
            loaded = loaded + ((tl.load(values_ptr + at, mask=inside, other=0),
                                tl.load(metadata_ptr + at, mask=inside, other=0x44),
                                tl.load(scale_ptr + row, mask=row < T, other=1.0)),)  # fmt: skip
        for i in tl.static_range(UNROLL):
            table = tl.load(table_ptr + loaded[i][1].to(tl.int32))
            one, other = factors(loaded[i][2])
            one, other = tl.broadcast_to(one, [1, U]), tl.broadcast_to(other, [1, U])
            if COUNT:
                a0, a1, a2, a3, n0, n1, n2, n3 = tl.inline_asm_elementwise(
                    features_ptx(True), "=r,=r,=r,=r,=r,=r,=r,=r,r,l,r,r,r,r,r,r,r,r,r,r",
                    [loaded[i][0], table, one, other, a0, a1, a2, a3, n0, n1, n2, n3],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
                    is_pure=True, pack=1,
                )  # fmt: skip
            else:
                a0, a1, a2, a3 = tl.inline_asm_elementwise(
                    features_ptx(False), "=r,=r,=r,=r,r,l,r,r,r,r,r,r",
                    [loaded[i][0], table, one, other, a0, a1, a2, a3],
                    dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
                )  # fmt: skip
    columns = strip * U * 8 + tl.arange(0, 8 * U)[None, :]
    bits = unit_columns(a0, a1, a2, a3, U).to(tl.int32, bitcast=True)
    tl.atomic_max(bits_ptr + columns, bits, mask=(columns < F) & (bits > 0), sem="relaxed")
    if COUNT:
        counts = unit_columns(n0, n1, n2, n3, U).to(tl.int32)
        tl.atomic_add(counts_ptr + columns, counts, mask=(columns < F) & (counts > 0), sem="relaxed")
