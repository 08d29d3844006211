"""Operands of the weight gradients for dense products: of every four tokens of a feature two, the others zero.

The selection is that of triton_transpose.py, and so is the function; only the result is not packed. In 16 bits a dense
product reads a matrix as it lies, so tokens keep their places, and which four are neighbours is all that their order
says: the result is (T, F). In fp8 it is (F, T'), in the order of the tokens, as tensor cores want e4m3.

A program has BQ times four tokens and BG groups of four features.
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24 import triton_turn
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.triton_groups import (
    add_nonzero,
    byte_of,
    in_columns,
    in_pairs,
    kept,
    lanes,
    power_of_two,
    quads,
    spread,
    to_nibbles,
    wide,
)


@triton.jit
@no_type_check
def load_tokens(
    values_ptr, metadata_ptr, scale_ptr, row, inside, first_group, T,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr, PACKED: tl.constexpr,
    BQ: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Of the rows [BQ, 1] the BG groups from the first one on: four tensors [BQ, BG], one for each place in a group."""
    scale = 1.0
    if FP8:
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
    c = first_group * 2 + tl.arange(0, 2 * BG)[None, :]
    c_bytes = first_group // 2 + tl.arange(0, BG // 2)[None, :]
    v = tl.load(values_ptr + row * (F // 2) + c, mask=inside & (c < F // 2), other=0.0)
    place = BYTE(row if WIDE else row.to(tl.int32), c_bytes, T, F)
    metadata = tl.load(metadata_ptr + place, mask=inside & (c_bytes < F // 8), other=0)
    low, high = tl.split(tl.reshape(in_lanes(v, scale, FP8, PACKED), [BQ, BG, 2]))
    return spread(low, high, to_nibbles(metadata, BQ, BG), PACKED)


@triton.jit
@no_type_check
def in_lanes(v, scale, FP8: tl.constexpr, PACKED: tl.constexpr):
    if FP8:
        v = v.to(tl.float32) * scale
        if PACKED:
            v = v.to(tl.bfloat16)  # exact but for subnormals: e4m3 times a power of two
    return lanes(v, PACKED)


@triton.jit
@no_type_check
def thin_kernel(
    values_ptr, metadata_ptr, scale_ptr, perm_ptr, dense_ptr, bits_ptr, out_ptr, out_scale_ptr, totals_ptr, T, LENGTH,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, MAGNITUDE: tl.constexpr,
    FP8: tl.constexpr, BQ: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Packed (T, F) -> out (T, F), or, in fp8, (F, LENGTH) and its scale (F,).

    Features f with dense[f] keep all their tokens.
    """
    strips: tl.constexpr = (F // 4 + BG - 1) // BG
    first_group, first_quad = tl.program_id(0) % strips * BG, tl.program_id(0) // strips * BQ
    quad = first_quad + tl.arange(0, BQ)[:, None]
    f = first_group * 4 + tl.arange(0, 4 * BG)[None, :]
    all_tokens = quads(tl.load(dense_ptr + f, mask=f < F, other=1), 1, 4 * BG)  # four [1, BG]
    tokens, rows = (), ()
    for i in tl.static_range(4):
        inside = quad * 4 + i < T
        row = tl.load(perm_ptr + quad * 4 + i, mask=inside, other=0)
        rows = rows + ((row, inside),)
        x = load_tokens(
            values_ptr, metadata_ptr, scale_ptr, row, inside, first_group, T, F, BYTE, WIDE, FP8, PACKED, BQ, BG
        )
        tokens = tokens + (x,)
    turned = ()
    before, after = tl.zeros([BQ, BG], tl.float32), tl.zeros([BQ, BG], tl.float32)
    for j in tl.static_range(4):
        x0, x1, x2, x3 = tokens[0][j], tokens[1][j], tokens[2][j], tokens[3][j]
        y0, y1, y2, y3 = kept(x0, x1, x2, x3, MAGNITUDE, PACKED)
        every = all_tokens[j] > 0
        none = tl.zeros([BQ, BG], x0.dtype)
        some = add_nonzero(add_nonzero(add_nonzero(add_nonzero(none, x0, PACKED), x1, PACKED), x2, PACKED), x3, PACKED)
        before += tl.where(every, 0.0, some.to(tl.float32))
        left = add_nonzero(add_nonzero(add_nonzero(add_nonzero(none, y0, PACKED), y1, PACKED), y2, PACKED), y3, PACKED)
        after += tl.where(every, 0.0, left.to(tl.float32))
        y0, y1 = tl.where(every, x0, y0), tl.where(every, x1, y1)
        y2, y3 = tl.where(every, x2, y2), tl.where(every, x3, y3)
        turned = turned + ((y0, y1, y2, y3),)
    tl.atomic_add(totals_ptr, tl.sum(before).to(tl.int32), sem="relaxed")
    tl.atomic_add(totals_ptr + 1, tl.sum(after).to(tl.int32), sem="relaxed")
    kind: tl.constexpr = out_ptr.dtype.element_ty
    if FP8:
        scale, inverse = power_of_two(tl.load(bits_ptr + f, mask=f < F, other=0))  # [1, 4 BG]
        tl.store(out_scale_ptr + f, scale, mask=(f < F) & (first_quad == 0))
        inverse = quads(inverse, 1, 4 * BG)
        columns = ()
        for j in tl.static_range(4):
            y0, y1 = turned[j][0].to(tl.float32) * inverse[j], turned[j][1].to(tl.float32) * inverse[j]
            y2, y3 = turned[j][2].to(tl.float32) * inverse[j], turned[j][3].to(tl.float32) * inverse[j]
            columns = columns + (tl.join(tl.join(y0, y2), tl.join(y1, y3)).to(kind),)  # [BQ, BG, token // 2, token % 2]
        # [BQ, BG, token // 2, token % 2, feature // 2, feature % 2]
        out = tl.join(tl.join(columns[0], columns[2]), tl.join(columns[1], columns[3]))
        out = tl.reshape(tl.permute(out, [1, 4, 5, 0, 2, 3]), [4 * BG, 4 * BQ])
        f = first_group * 4 + tl.arange(0, 4 * BG)[:, None]
        t = first_quad * 4 + tl.arange(0, 4 * BQ)[None, :]
        tl.store(out_ptr + f.to(tl.int64) * LENGTH + t, out, mask=(f < F) & (t < LENGTH))
    else:
        for i in tl.static_range(4):
            out = in_columns(turned[0][i], turned[1][i], turned[2][i], turned[3][i], BQ, BG)
            tl.store(out_ptr + rows[i][0] * F + f, out.to(kind), mask=rows[i][1] & (f < F))


def plan(
    p: Packed, dense: Tensor, perm: Tensor, bits: Tensor | None, out: Tensor, scale: Tensor | None, totals: Tensor,
    by: str, layout: str, arch: str,
) -> Launch:  # fmt: skip
    """The launch that fills out, its scale and totals; meta tensors will do to compile it."""
    T, F, fp8 = len(perm), 2 * p.values.shape[1], bits is not None
    BQ, BG = (16, 32) if fp8 else (8, 64)
    constants = {
        "F": F, "BYTE": byte_of(layout, T, F), "WIDE": wide(T, F),
        "PACKED": in_pairs(arch, torch.bfloat16 if fp8 else p.values.dtype), "MAGNITUDE": by == "magnitude",
        "FP8": fp8, "BQ": BQ, "BG": BG,
    }  # fmt: skip
    length = out.shape[1] if fp8 else T
    args = {
        "values_ptr": p.values, "metadata_ptr": p.metadata, "scale_ptr": p.scale, "perm_ptr": perm,
        "dense_ptr": dense, "bits_ptr": bits, "out_ptr": out, "out_scale_ptr": scale, "totals_ptr": totals, "T": T,
        "LENGTH": length,
    }  # fmt: skip
    return Launch(thin_kernel, -(-F // (4 * BG)) * -(-length // (4 * BQ)), args, constants, 8)


def thinned(
    p: Packed, is_dense: Tensor, perm: Tensor, by: str, layout: str = "plain", bits: Tensor | None = None,
    multiple: int = 16,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """p (T, F) with zeros where packing along tokens drops it, but for features f with is_dense[f], uint8 (F,).

    (T, F) in the order of p; in fp8, which bits (F,) of the features' largest magnitudes go with, e4m3 (F, T') in the
    order of perm (T,), T' a multiple of `multiple`, and the scale (F,), else None. Then int32 totals (2,): non-zeros of
    the other features, and how many of them are kept. by is "value" or "magnitude".
    """
    T, F = len(perm), 2 * p.values.shape[1]
    if bits is None:
        out, scale = p.values.new_empty(T, F), None
    else:
        out = p.values.new_empty(F, -(-T // multiple) * multiple, dtype=FP8)
        scale = torch.empty(F, dtype=torch.float32, device=out.device)
    totals = torch.zeros(2, dtype=torch.int32, device=out.device)
    if out.numel():
        arch = target(out.device)
        if bits is not None and layout == "plain" and in_pairs(arch, torch.bfloat16):
            assert scale is not None
            triton_turn.plan(p, is_dense, perm, bits, out, None, scale, totals, by).run()
        else:
            plan(p, is_dense, perm, bits, out, scale, totals, by, layout, arch).run()
    return out, scale, totals
