"""Transposed e4m3 operands of the weight gradients on sm_90 and later: eight tokens of four features in one thread.

What triton_transpose.py and triton_thin.py do for any device, for e4m3 with as few instructions as there are: 32
elements are eight words, one for each token, that a table spreads from packed values (as in triton_units.py). The bits
of e4m3 are those of bfloat16, which a product with a factor makes numbers that compare; tokens are chosen for two
features at a time; and what leaves is a word or two for each feature, which shared memory turns around.
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

import functools
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.triton_groups import power_of_two
from sidlm.ops.sparse24.triton_units import ZERO


@functools.cache
def word_selectors(device: torch.device) -> Tensor:
    """int32 (256,): for each byte of metadata two times 16 bits, with which `prmt` makes words of two groups."""
    table = []
    for byte in range(256):
        word = 0
        for group in range(2):
            nibble = byte >> 4 * group & 15
            which = [nibble & 3, nibble >> 2]
            for place in range(4):
                source = 2 * group + which.index(place) if place in which else ZERO
                word |= source << 16 * group + 4 * place
        table.append(word)
    return torch.tensor(table, dtype=torch.int32, device=device)


def _keys(word: str, factor: str, number: int, signed: bool) -> str:
    """PTX: l and h of this number, features 0 and 2 and features 1 and 3 of a word as pairs of bfloat16."""
    mask = "0x007f007f" if signed else "0x00ff00ff"
    code = f"""and.b32 l{number}, {word}, {mask};
shr.u32 h{number}, {word}, 8;
and.b32 h{number}, h{number}, {mask};
mul.lo.u32 l{number}, l{number}, 16;
mul.lo.u32 h{number}, h{number}, 16;
"""
    if signed:  # lop3 0xf8: a | b & c
        code += f"""shl.b32 t, {word}, 8;
lop3.b32 l{number}, l{number}, t, 0x80008000, 0xf8;
lop3.b32 h{number}, h{number}, {word}, 0x80008000, 0xf8;
"""
    return code + "".join(f"mul.rn.bf16x2 {x}{number}, {x}{number}, {factor};\n" for x in "lh")


def _order(x: str, first: int, signed: bool) -> str:
    """PTX: which of four are the larger in both pairs, and which pair is kept whole; NaN leaves some valid choice."""
    code, k = "", [f"{x}{first + i}" for i in range(4)]
    if signed:
        for i in range(4):
            code += f"abs.bf16x2 k{i}, {k[i]};\n"
        k = [f"k{i}" for i in range(4)]
    return (
        code
        + f"""max.bf16x2 large_a, {k[0]}, {k[1]};
max.bf16x2 large_b, {k[2]}, {k[3]};
min.bf16x2 small_a, {k[0]}, {k[1]};
min.bf16x2 small_b, {k[2]}, {k[3]};
set.ge.u32.bf16x2 first, {k[0]}, {k[1]};
set.ge.u32.bf16x2 second, {k[2]}, {k[3]};
set.ge.u32.bf16x2 both_a, small_a, large_b;
set.gt.u32.bf16x2 both_b, small_b, large_a;
"""
    )


def _rounded(out: str, four: list[str], high: bool, reference: str, inverse: str) -> str:
    """PTX: a word of e4m3 of the low or the high halves of four pairs of bfloat16, times both factors."""
    code = ""
    for i in range(4):
        code += f"and.b32 t, {four[i]}, 0xffff0000;\n" if high else f"shl.b32 t, {four[i]}, 16;\n"
        code += f"mov.b32 f{i}, t;\nmul.f32 f{i}, f{i}, {reference};\nmul.f32 f{i}, f{i}, {inverse};\n"
    return (
        code
        + f"""cvt.rn.satfinite.e4m3x2.f32 p, f1, f0;
cvt.rn.satfinite.e4m3x2.f32 q, f3, f2;
mov.b32 {out}, {{p, q}};
"""
    )


def _count(number: str, x: str, wanted: str, so_far: str) -> str:
    return f"set.neu.bf16x2.bf16x2 t, {x}, zero;\nfma.rn.bf16x2 {number}, t, {wanted}, {so_far};\n"


def octet_ptx(signed: bool, thin: bool) -> str:
    """Outputs: four words of the features' kept values, a byte of metadata for each feature, counts before and after;
    or, thin, eight words, of tokens 0 .. 3 and 4 .. 7 in turn, and both counts.

    Inputs: eight words, eight factors, reference, four inverses, two pairs of what to count by, both counts; thin, two
    pairs of masks that keep all.
    """
    outputs = 10 if thin else 7
    words, factors = ([f"${outputs + 8 * j + i}" for i in range(8)] for j in range(2))
    reference, *inverse = (f"${outputs + 16 + i}" for i in range(5))
    wanted_l, wanted_h, before, after = (f"${outputs + 21 + i}" for i in range(4))
    every = {"l": f"${outputs + 25}", "h": f"${outputs + 26}"}
    code = "{.reg .b32 zero, t, k0, k1, k2, k3, large_a, large_b, small_a, small_b, first, second, both_a, both_b, n;\n"
    code += ".reg .b32 " + ", ".join(f"{x}{i}" for x in "lh" for i in range(8)) + ", keep, count, left;\n"
    code += ".reg .b32 " + ", ".join(f"{x}{i}{j}" for x in ("low", "high", "n") for i in range(2) for j in "lh") + ";\n"
    code += ".reg .f32 f0, f1, f2, f3;\n.reg .b16 p, q;\nmov.b32 zero, 0;\n"
    code += f"mov.b32 count, {before};\nmov.b32 left, {after};\n"
    for i in range(8):
        code += _keys(words[i], factors[i], i, signed)
    for x, wanted in (("l", wanted_l), ("h", wanted_h)):
        for i in range(8):
            code += _count("count", f"{x}{i}", wanted, "count")
        for quad in range(2):
            a, b, c, d = (f"{x}{4 * quad + i}" for i in range(4))
            code += _order(x, 4 * quad, signed)
            if thin:  # lop3: see triton_groups._keep_ptx; 0xe0 is a & (b | c)
                tables = (("first", "0xf2"), ("first", "0xf1"), ("second", "0xce"), ("second", "0xcd"))
                for y, (larger, table) in zip((a, b, c, d), tables, strict=True):
                    code += f"lop3.b32 keep, both_a, both_b, {larger}, {table};\n"
                    code += f"lop3.b32 {y}, {y}, keep, {every[x]}, 0xe0;\n"
                    code += _count("left", y, wanted, "left")
                continue
            low, high, n = (f"{name}{quad}{x}" for name in ("low", "high", "n"))
            code += f"""lop3.b32 {low}, first, {a}, {b}, 0xca;
lop3.b32 {low}, both_b, {c}, {low}, 0xca;
lop3.b32 {low}, both_a, {a}, {low}, 0xca;
lop3.b32 {high}, second, {c}, {d}, 0xca;
lop3.b32 {high}, both_b, {d}, {high}, 0xca;
lop3.b32 {high}, both_a, {b}, {high}, 0xca;
mov.b32 n, 0x000d000d;
lop3.b32 n, first, 0x00010001, n, 0x2a;
lop3.b32 n, second, 0x00040004, n, 0x2a;
lop3.b32 n, both_b, 0x000e000e, n, 0xca;
lop3.b32 {n}, both_a, 0x00040004, n, 0xca;
"""
            code += _count("left", low, wanted, "left") + _count("left", high, wanted, "left")
    for feature in range(4):
        x = "lh"[feature % 2]
        if thin:
            for quad in range(2):
                four = [f"{x}{4 * quad + i}" for i in range(4)]
                code += _rounded(f"${2 * feature + quad}", four, feature >= 2, reference, inverse[feature])
        else:
            four = [f"low0{x}", f"high0{x}", f"low1{x}", f"high1{x}"]
            code += _rounded(f"${feature}", four, feature >= 2, reference, inverse[feature])
    if not thin:
        code += """mad.lo.u32 n0l, n1l, 16, n0l;
mad.lo.u32 n0h, n1h, 16, n0h;
mad.lo.u32 $4, n0h, 256, n0l;
"""
    return code + f"mov.b32 ${outputs - 2}, count;\nmov.b32 ${outputs - 1}, left;\n}}"


def _constraints(thin: bool) -> str:
    outputs, inputs = (10, "r,r") if thin else (7, "")
    parts = ["=r"] * outputs + ["r"] * 16 + ["f"] * 5 + ["r"] * 4
    return ",".join(parts) + (f",{inputs}" if thin else "")


@triton.constexpr_function
def _prmt():
    return "prmt.b32 $0, $1, 0, $2;"


@triton.jit
@no_type_check
def pairs_of(x0, x1, x2, x3):
    """Flags of four features as bfloat16 1 or 0: features 0 and 2, features 1 and 3."""
    return tl.where(x0, 0x3F80, 0) | tl.where(x2, 0x3F800000, 0), tl.where(x1, 0x3F80, 0) | tl.where(x3, 0x3F800000, 0)


@triton.jit
@no_type_check
def four_columns(x, G: tl.constexpr):
    """[1, 4G] -> four [1, G]."""
    even, odd = tl.split(tl.reshape(x, [1, G, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
@no_type_check
def turn_kernel(
    words_ptr, metadata_ptr, scale_ptr, table_ptr, perm_ptr, to_ptr, bits_ptr, out_ptr, out_metadata_ptr,
    out_scale_ptr, totals_ptr, T, out_stride,
    F: tl.constexpr, THIN: tl.constexpr, PTX: tl.constexpr, CONSTRAINTS: tl.constexpr,
    BO: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Packed e4m3 (T, F), values as int32, four of eight columns -> int32 rows of features.

    THIN: (F, T' / 4), all tokens of features f with to[f] != 0; else values (n, T' / 8) and metadata (n, T' / 8),
    feature f in row to[f] if that is not negative. A program has BO octets of tokens and BG groups of features.
    """
    strips: tl.constexpr = (F // 4 + BG - 1) // BG
    first_group, first_octet = tl.program_id(0) % strips * BG, tl.program_id(0) // strips * BO
    octet = first_octet + tl.arange(0, BO)[:, None]
    f = first_group * 4 + tl.arange(0, 4 * BG)[None, :]
    to = tl.load(to_ptr + f, mask=f < F, other=1 if THIN else -1)
    out_scale, inverse = power_of_two(tl.load(bits_ptr + f, mask=f < F, other=0))
    if THIN:
        tl.store(out_scale_ptr + f, out_scale, mask=(f < F) & (first_octet == 0))
    else:
        tl.store(out_scale_ptr + to, out_scale, mask=(to >= 0) & (first_octet == 0))
    words, exponents, valid = (), (), ()
    for i in tl.static_range(8):
        t = octet * 8 + i
        inside = t < T
        row = tl.load(perm_ptr + t, mask=inside, other=0)
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0)  # [BO, 1]
        exponents = exponents + (tl.where(scale == scale, (scale.to(tl.int32, bitcast=True) >> 23) - 127, -127),)
        valid = valid + (scale == scale,)
        u = first_group // 2 + tl.arange(0, BG // 2)[None, :]
        mask = inside & (u < F // 8)
        v = tl.load(words_ptr + row * (F // 8) + u, mask=mask, other=0)
        metadata = tl.load(metadata_ptr + row * (F // 8) + u, mask=mask, other=0x44).to(tl.int32)
        select = tl.load(table_ptr + metadata)
        one = tl.inline_asm_elementwise(_prmt(), "=r,r,r", [v, select], dtype=tl.int32, is_pure=True, pack=1)
        other = tl.inline_asm_elementwise(_prmt(), "=r,r,r", [v, select >> 16], dtype=tl.int32, is_pure=True, pack=1)
        words = words + (tl.reshape(tl.join(one, other), [BO, BG]),)
    top = tl.maximum(tl.maximum(exponents[0], exponents[1]), tl.maximum(exponents[2], exponents[3]))
    top = tl.maximum(top, tl.maximum(exponents[4], exponents[5]))
    top = tl.maximum(top, tl.maximum(tl.maximum(exponents[6], exponents[7]), -126))
    reference = tl.broadcast_to((top + 127 << 23).to(tl.float32, bitcast=True), [BO, BG])
    factors = ()
    for i in tl.static_range(8):
        factor = tl.maximum(exponents[i] - top + 247, 1) * 0x00800080  # 2^120 and what the scale is to the largest
        factors = factors + (tl.broadcast_to(tl.where(valid[i], factor, 0x7FC07FC0), [BO, BG]),)
    i0, i1, i2, i3 = four_columns(inverse, BG)
    to0, to1, to2, to3 = four_columns(to, BG)
    if THIN:
        wanted_l, wanted_h = pairs_of(to0 == 0, to1 == 0, to2 == 0, to3 == 0)
        every_l, every_h = tl.where(to0 == 0, 0, 0xFFFF), tl.where(to1 == 0, 0, 0xFFFF)
        every_l, every_h = every_l | tl.where(to2 == 0, 0, -65536), every_h | tl.where(to3 == 0, 0, -65536)
        every = [tl.broadcast_to(every_l, [BO, BG]), tl.broadcast_to(every_h, [BO, BG])]
    else:
        wanted_l, wanted_h = pairs_of(to0 >= 0, to1 >= 0, to2 >= 0, to3 >= 0)
        every = []
    none = tl.zeros([BO, BG], tl.int32)
    given = [
        words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7],
        factors[0], factors[1], factors[2], factors[3], factors[4], factors[5], factors[6], factors[7],
        reference, tl.broadcast_to(i0, [BO, BG]), tl.broadcast_to(i1, [BO, BG]), tl.broadcast_to(i2, [BO, BG]),
        tl.broadcast_to(i3, [BO, BG]), tl.broadcast_to(wanted_l, [BO, BG]), tl.broadcast_to(wanted_h, [BO, BG]),
        none, none,
    ]  # fmt: skip
    if THIN:
        a0, b0, a1, b1, a2, b2, a3, b3, before, after = tl.inline_asm_elementwise(
            PTX, CONSTRAINTS, given + every,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True, pack=1,
        )  # fmt: skip
        out = tl.join(tl.join(tl.join(a0, a2), tl.join(a1, a3)), tl.join(tl.join(b0, b2), tl.join(b1, b3)))
        out = tl.reshape(tl.permute(out, [1, 2, 3, 0, 4]), [4 * BG, 2 * BO])
        rows = first_group * 4 + tl.arange(0, 4 * BG)[:, None]
        c = first_octet * 2 + tl.arange(0, 2 * BO)[None, :]
        tl.store(out_ptr + rows.to(tl.int64) * out_stride + c, out, mask=(rows < F) & (c < out_stride))
    else:
        o0, o1, o2, o3, metadata, before, after = tl.inline_asm_elementwise(
            PTX, CONSTRAINTS, given,
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
        rows = tl.reshape(to, [4 * BG])[:, None]
        c = first_octet + tl.arange(0, BO)[None, :]
        mask = (rows >= 0) & (c < out_stride)
        out = tl.join(tl.join(o0, o2), tl.join(o1, o3))
        out = tl.reshape(tl.permute(out, [1, 2, 3, 0]), [4 * BG, BO])
        at = rows.to(tl.int64) * out_stride + c
        tl.store(out_ptr + at, out, mask=mask)
        m0, m1 = metadata.to(tl.uint8), (metadata >> 8).to(tl.uint8)
        m2, m3 = (metadata >> 16).to(tl.uint8), (metadata >> 24).to(tl.uint8)
        out = tl.join(tl.join(m0, m2), tl.join(m1, m3))
        out = tl.reshape(tl.permute(out, [1, 2, 3, 0]), [4 * BG, BO])
        tl.store(out_metadata_ptr + at, out, mask=mask)
    tl.atomic_add(totals_ptr, tl.sum(both_halves(before)).to(tl.int32), sem="relaxed")
    tl.atomic_add(totals_ptr + 1, tl.sum(both_halves(after)).to(tl.int32), sem="relaxed")


@triton.jit
@no_type_check
def both_halves(x):
    """Sum of the two bfloat16 of int32, float32."""
    return (x << 16).to(tl.float32, bitcast=True) + (x >> 16 << 16).to(tl.float32, bitcast=True)


def plan(
    p: Packed, to: Tensor, perm: Tensor, bits: Tensor, out: Tensor, out_metadata: Tensor | None, scale: Tensor,
    totals: Tensor, by: str,
) -> Launch:  # fmt: skip
    """The launch that fills out, e4m3 (n, T' / 2), and its metadata, or, without that, out (F, T'); its scale; totals.

    p (T, F) is packed, plainly. to (F,): int32, the row of each feature, or -1; or uint8, not 0 where all is
    kept.
    """
    T, F, thin = len(perm), 2 * p.values.shape[1], out_metadata is None
    BO, BG = (16, 32) if thin else (32, 32)
    constants = {
        "F": F, "THIN": thin, "PTX": octet_ptx(by == "magnitude", thin),
        "CONSTRAINTS": _constraints(thin), "BO": BO, "BG": BG,
    }  # fmt: skip
    words = out.view(torch.int32)
    args = {
        "words_ptr": p.values.view(torch.int32), "metadata_ptr": p.metadata, "scale_ptr": p.scale,
        "table_ptr": word_selectors(p.values.device), "perm_ptr": perm, "to_ptr": to, "bits_ptr": bits,
        "out_ptr": words, "out_metadata_ptr": out_metadata, "out_scale_ptr": scale, "totals_ptr": totals, "T": T,
        "out_stride": words.shape[1],
    }  # fmt: skip
    octets = -(-words.shape[1] // (2 if thin else 1))
    return Launch(turn_kernel, -(-F // (4 * BG)) * -(-octets // BO), args, constants, 8)
