"""What the Triton kernels share: groups of four, metadata, scales.

`choose`, `spread`, `pick` and what follows them work element by element on tensors of one shape, one for each place in
a group. Each has two forms of one meaning. The portable one works in float32. The other (PACKED: NVIDIA's sm_90 and
later) is inline PTX on pairs of half-precision elements: a multiprocessor compares and selects at half the rate of
other instructions, and that is most of what these kernels do.
"""

import os
from collections.abc import Callable
from typing import no_type_check

import torch
import triton
import triton.language as tl

from sidlm.ops.sparse24.layouts import LAYOUTS, layout_for

WIDE = 1 << 31
"""Bytes of metadata from which their offsets take 64 bits."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# the interpreter calls plain functions, and takes for its own only those of modules that import triton.language
BYTE = {name: x.byte if INTERPRETED else triton.jit(x.byte) for name, x in LAYOUTS.items() if x.byte is not None}
"""Layouts of the metadata as functions for kernels."""


def byte_of(layout: str, M: int, K: int) -> Callable:
    """The function of a layout, for a constant of a kernel; ValueError if it does not take a matrix (M, K)."""
    layout_for(layout, M, K)
    if layout not in BYTE:
        raise ValueError(f"kernels have metadata in one of the layouts {', '.join(BYTE)}, not in {layout!r}")
    return BYTE[layout]


def wide(M: int, K: int) -> bool:
    """Whether offsets of the metadata of a matrix (M, K) overflow 32 bits."""
    return M * K // 8 >= WIDE


def in_pairs(arch: str, dtype: torch.dtype) -> bool:
    """PACKED, for a target and the dtype of what is compared."""
    return arch.startswith("sm_") and int(arch[3:]) >= 90 and dtype in (torch.bfloat16, torch.float16)


@triton.constexpr_function
def _masks_ptx(nibble):
    """Masks of the places that a nibble names: low is 0, 1 or else 2, high is 1, 2 or else 3.

    Read as numbers nibbles are subnormal, which comparisons do not mind.
    """
    return f"""
.reg .b32 low, high, low0, low1, high1, high2, zero, one, four, eight, t;
and.b32 low, {nibble}, 0x00030003;
and.b32 high, {nibble}, 0x000c000c;
mov.b32 zero, 0;
mov.b32 one, 0x00010001;
mov.b32 four, 0x00040004;
mov.b32 eight, 0x00080008;
set.eq.u32.f16x2 low0, low, zero;
set.eq.u32.f16x2 low1, low, one;
set.eq.u32.f16x2 high1, high, four;
set.eq.u32.f16x2 high2, high, eight;"""


@triton.constexpr_function
def _choose_ptx(dtype, magnitude):
    """Operands: low, high, nibble; x0 .. x3.

    A nibble is 13 where both pairs give their second element, 1 less where the first pair gives its first one and 4
    less where the second pair does; pairs kept whole are 4 and 14. lop3: 0xca is a ? b : c, 0x2a is c & ~(a & b).
    """
    t, infinity = ("bf16x2", "0x7f807f80") if dtype == tl.bfloat16 else ("f16x2", "0x7c007c00")
    keys = ""
    for i in range(4):
        source = f"${i + 3}"
        if magnitude:
            keys += f"abs.{t} k{i}, {source};\n"
            source = f"k{i}"
        keys += f"min.{t} k{i}, {source}, infinity;\n"  # the number of the two if one is NaN
    return f"""{{
.reg .b32 k0, k1, k2, k3, large_a, large_b, small_a, small_b, first, second, both_a, both_b, low, high, n, infinity;
mov.b32 infinity, {infinity};
{keys}
max.{t} large_a, k0, k1;
max.{t} large_b, k2, k3;
min.{t} small_a, k0, k1;
min.{t} small_b, k2, k3;
set.ge.u32.{t} first, k0, k1;
set.ge.u32.{t} second, k2, k3;
set.ge.u32.{t} both_a, small_a, large_b;
set.gt.u32.{t} both_b, small_b, large_a;
lop3.b32 low, first, $3, $4, 0xca;
lop3.b32 low, both_b, $5, low, 0xca;
lop3.b32 $0, both_a, $3, low, 0xca;
lop3.b32 high, second, $5, $6, 0xca;
lop3.b32 high, both_b, $6, high, 0xca;
lop3.b32 $1, both_a, $4, high, 0xca;
mov.b32 n, 0x000d000d;
lop3.b32 n, first, 0x00010001, n, 0x2a;
lop3.b32 n, second, 0x00040004, n, 0x2a;
lop3.b32 n, both_b, 0x000e000e, n, 0xca;
lop3.b32 $2, both_a, 0x00040004, n, 0xca;
}}"""


@triton.constexpr_function
def _keep_ptx(dtype, magnitude):
    """Operands: x0 .. x3 where they are kept, else 0; x0 .. x3. Kept are those of `_choose_ptx`.

    lop3: 0xf2 is a | ~b & c, 0xf1 is a | ~b & ~c, 0xce is b | ~a & c, 0xcd is b | ~a & ~c.
    """
    t, infinity = ("bf16x2", "0x7f807f80") if dtype == tl.bfloat16 else ("f16x2", "0x7c007c00")
    keys = ""
    for i in range(4):
        source = f"${i + 4}"
        if magnitude:
            keys += f"abs.{t} k{i}, {source};\n"
            source = f"k{i}"
        keys += f"min.{t} k{i}, {source}, infinity;\n"
    return f"""{{
.reg .b32 k0, k1, k2, k3, large_a, large_b, small_a, small_b, first, second, both_a, both_b, keep, infinity;
mov.b32 infinity, {infinity};
{keys}
max.{t} large_a, k0, k1;
max.{t} large_b, k2, k3;
min.{t} small_a, k0, k1;
min.{t} small_b, k2, k3;
set.ge.u32.{t} first, k0, k1;
set.ge.u32.{t} second, k2, k3;
set.ge.u32.{t} both_a, small_a, large_b;
set.gt.u32.{t} both_b, small_b, large_a;
lop3.b32 keep, both_a, both_b, first, 0xf2;
and.b32 $0, $4, keep;
lop3.b32 keep, both_a, both_b, first, 0xf1;
and.b32 $1, $5, keep;
lop3.b32 keep, both_a, both_b, second, 0xce;
and.b32 $2, $6, keep;
lop3.b32 keep, both_a, both_b, second, 0xcd;
and.b32 $3, $7, keep;
}}"""


@triton.constexpr_function
def _root_ptx():
    """Operands: root, x >= 0 or NaN. Of 0 and infinity the first guess is NaN, and the root is x itself.

    One step of Newton's from a guess right to 2^-22 leaves an error of 2^-44, and the roots of numbers of few bits are
    not that near to the middle between two of float32: the result is the nearest.
    """
    return """{
.reg .f32 y, g, h, e;
.reg .pred none;
rsqrt.approx.f32 y, $1;
mul.f32 g, $1, y;
mul.f32 h, y, 0f3f000000;
neg.f32 e, g;
fma.rn.f32 e, e, g, $1;
fma.rn.f32 g, e, h, g;
setp.nan.f32 none, g, g;
selp.f32 $0, $1, g, none;
}"""


@triton.constexpr_function
def _small_root_ptx():
    """Operands: root, x: 0, at least 2^-9 and finite, or NaN. As above, but nothing is out of the range of a guess."""
    return """{
.reg .f32 y, g, h, e;
max.f32 y, $1, 0f35800000;
rsqrt.approx.ftz.f32 y, y;
mul.f32 g, $1, y;
mul.f32 h, y, 0f3f000000;
neg.f32 e, g;
fma.rn.f32 e, e, g, $1;
fma.rn.f32 $0, e, h, g;
}"""


@triton.constexpr_function
def _spread_ptx():
    """Operands: d0 .. d3; low, high, nibble. lop3: 0xea is a & b | c, 0x02 is ~a & ~b & c."""
    return f"""{{{_masks_ptx("$6")}
and.b32 $0, low0, $4;
and.b32 t, low1, $4;
lop3.b32 $1, high1, $5, t, 0xea;
lop3.b32 t, low0, low1, $4, 0x02;
lop3.b32 $2, high2, $5, t, 0xea;
lop3.b32 $3, high1, high2, $5, 0x02;
}}"""


@triton.constexpr_function
def _pick_ptx():
    """Operands: low, high; x0 .. x3, nibble."""
    return f"""{{{_masks_ptx("$6")}
lop3.b32 t, low1, $3, $4, 0xca;
lop3.b32 $0, low0, $2, t, 0xca;
lop3.b32 t, high2, $4, $5, 0xca;
lop3.b32 $1, high1, $3, t, 0xca;
}}"""


@triton.constexpr_function
def _add_ptx(dtype, test):
    """Operands: count + 1 where the test of x with zero holds; count, x."""
    t = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return f"""{{
.reg .b32 zero, one;
mov.b32 zero, 0;
set.{test}.{t}.{t} one, $2, zero;
add.rn.{t} $0, $1, one;
}}"""


@triton.constexpr_function
def _largest_ptx(dtype):
    """Operands: the largest magnitude, NaN if there is one; so far, x."""
    t = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return f"{{ .reg .b32 m; abs.{t} m, $2; max.NaN.{t} $0, $1, m; }}"


@triton.constexpr_function
def _relu_ptx(dtype):
    """Operands: max(x, 0), NaN for NaN; x."""
    t = "bf16x2" if dtype == tl.bfloat16 else "f16x2"
    return f"{{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.{t} $0, $1, zero; }}"


@triton.jit
@no_type_check
def quads(x, R: tl.constexpr, C: tl.constexpr):
    """Columns 4g, .., 4g + 3 of x [R, C] as four tensors [R, C / 4]."""
    even, odd = tl.split(tl.reshape(x, [R, C // 4, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
@no_type_check
def to_bytes(nibbles, R: tl.constexpr, G: tl.constexpr):
    """int32 [R, G] -> uint8 [R, G / 2]."""
    low, high = tl.split(tl.reshape(nibbles, [R, G // 2, 2]))
    return (low | high << 4).to(tl.uint8)


@triton.jit
@no_type_check
def to_nibbles(metadata, R: tl.constexpr, G: tl.constexpr):
    """uint8 [R, G / 2] -> int32 [R, G]."""
    metadata = metadata.to(tl.int32)
    return tl.reshape(tl.join(metadata & 15, metadata >> 4), [R, G])


@triton.jit
@no_type_check
def power_of_two(bits):
    """`power_of_two_scale` of the float32 >= 0 with these bits (int32), and its inverse, a power of two as well."""
    exponent = bits >> 23
    biased = tl.maximum(exponent - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    biased = tl.where(bits == 0, 127, biased)
    finite = exponent < 255
    scale = tl.where(finite, (biased << 23).to(tl.float32, bitcast=True), float("nan"))
    return scale, tl.where(finite, (254 - biased << 23).to(tl.float32, bitcast=True), float("nan"))


@triton.jit
@no_type_check
def lanes(x, PACKED: tl.constexpr):
    """x as the functions below take it: in half precision, as it is, or in float32."""
    if PACKED:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
@no_type_check
def choose(x0, x1, x2, x3, MAGNITUDE: tl.constexpr, PACKED: tl.constexpr):
    """The two largest of four, by value or MAGNITUDE, and their nibble (int32): `select_2to4`.

    Two pairs, each with a larger and a smaller element: one of each is kept, or all of one pair.
    """
    if PACKED:
        low, high, nibble = tl.inline_asm_elementwise(
            _choose_ptx(x0.dtype, MAGNITUDE), "=r,=r,=r,r,r,r,r", [x0, x1, x2, x3],
            dtype=(x0.dtype, x0.dtype, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
        return low, high, nibble.to(tl.int32)
    else:
        k0, k1, k2, k3 = x0, x1, x2, x3
        if MAGNITUDE:
            k0, k1, k2, k3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
        # infinity for NaN
        inf = float("inf")
        k0, k1, k2, k3 = (
            tl.where(k0 < inf, k0, inf),
            tl.where(k1 < inf, k1, inf),
            tl.where(k2 < inf, k2, inf),
            tl.where(k3 < inf, k3, inf),
        )
        first, second = k0 >= k1, k2 >= k3
        both_a = tl.minimum(k0, k1) >= tl.maximum(k2, k3)
        both_b = tl.minimum(k2, k3) > tl.maximum(k0, k1)
        low = tl.where(both_a, x0, tl.where(both_b, x2, tl.where(first, x0, x1)))
        high = tl.where(both_a, x1, tl.where(both_b, x3, tl.where(second, x2, x3)))
        one_each = tl.where(first, 0, 1) + tl.where(second, 8, 12)
        return low, high, tl.where(both_a, 4, tl.where(both_b, 14, one_each))


@triton.jit
@no_type_check
def kept(x0, x1, x2, x3, MAGNITUDE: tl.constexpr, PACKED: tl.constexpr):
    """The four, but zeros for those that `choose` leaves out."""
    if PACKED:
        return tl.inline_asm_elementwise(
            _keep_ptx(x0.dtype, MAGNITUDE), "=r,=r,=r,=r,r,r,r,r", [x0, x1, x2, x3],
            dtype=(x0.dtype, x0.dtype, x0.dtype, x0.dtype), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        low, high, nibble = choose(x0, x1, x2, x3, MAGNITUDE, False)
        return spread(low, high, nibble, False)


@triton.jit
@no_type_check
def root(x, SMALL: tl.constexpr, PACKED: tl.constexpr):
    """The nearest float32 to the square root of x, float32 with no more bits than half precision has, >= 0 or NaN.

    SMALL: x is 0, or finite and at least 2^-9.
    """
    if PACKED and SMALL:
        return tl.inline_asm_elementwise(_small_root_ptx(), "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif PACKED:
        return tl.inline_asm_elementwise(_root_ptx(), "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        # of most it is 0, whose root takes the slow way
        return tl.where(x == 0, 0.0, tl.sqrt_rn(tl.where(x == 0, 1.0, x)))


@triton.jit
@no_type_check
def in_columns(x0, x1, x2, x3, R: tl.constexpr, G: tl.constexpr):
    """Four tensors [R, G] -> [R, 4G] in the order of the columns."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [R, 4 * G])


@triton.jit
@no_type_check
def spread(low, high, nibble, PACKED: tl.constexpr):
    """The four elements of which the nibble names two, zeros the others."""
    if PACKED:
        return tl.inline_asm_elementwise(
            _spread_ptx(), "=r,=r,=r,=r,r,r,r", [low, high, nibble.to(tl.int16)],
            dtype=(low.dtype, low.dtype, low.dtype, low.dtype), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        at_low, at_high = nibble & 3, nibble >> 2
        x1 = tl.where(at_low == 1, low, tl.where(at_high == 1, high, 0.0))
        x2 = tl.where(at_low == 2, low, tl.where(at_high == 2, high, 0.0))
        return tl.where(at_low == 0, low, 0.0), x1, x2, tl.where(at_high == 3, high, 0.0)


@triton.jit
@no_type_check
def pick(x0, x1, x2, x3, nibble, PACKED: tl.constexpr):
    """The two of four that the nibble names."""
    if PACKED:
        return tl.inline_asm_elementwise(
            _pick_ptx(), "=r,=r,r,r,r,r,r", [x0, x1, x2, x3, nibble.to(tl.int16)],
            dtype=(x0.dtype, x0.dtype), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        at_low, at_high = nibble & 3, nibble >> 2
        low = tl.where(at_low == 0, x0, tl.where(at_low == 1, x1, x2))
        return low, tl.where(at_high == 1, x1, tl.where(at_high == 2, x2, x3))


@triton.jit
@no_type_check
def add_positive(count, x, PACKED: tl.constexpr):
    """count + (x > 0), both as floating-point numbers: exact up to 256 in bfloat16."""
    if PACKED:
        return tl.inline_asm_elementwise(
            _add_ptx(x.dtype, "gt"), "=r,r,r", [count, x], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return count + tl.where(x > 0, 1.0, 0.0)


@triton.jit
@no_type_check
def add_nonzero(count, x, PACKED: tl.constexpr):
    """count + (x != 0), likewise."""
    if PACKED:
        return tl.inline_asm_elementwise(
            _add_ptx(x.dtype, "neu"), "=r,r,r", [count, x], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return count + tl.where(x != 0, 1.0, 0.0)


@triton.jit
@no_type_check
def relu(x, PACKED: tl.constexpr):
    """max(x, 0), NaN for NaN."""
    if PACKED:
        return tl.inline_asm_elementwise(_relu_ptx(x.dtype), "=r,r", [x], dtype=x.dtype, is_pure=True, pack=2)
    else:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def largest(so_far, x, PACKED: tl.constexpr):
    """The larger of so_far and |x|, NaN if either is."""
    if PACKED:
        return tl.inline_asm_elementwise(
            _largest_ptx(x.dtype), "=r,r,r", [so_far, x], dtype=x.dtype, is_pure=True, pack=2
        )
    else:
        return tl.maximum(so_far, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
