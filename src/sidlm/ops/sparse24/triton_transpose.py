"""Transposed operands of the weight gradients: tokens along rows, in any order, packed anew along them or dense.

A program takes a tile of tokens and features, all in the natural order of the features: a group of four of them is read
together, and each goes to the row of the result that it belongs to. Eight neighbouring tokens (in their new order) and
four features stay in one thread until the tokens are chosen; only what is left, a quarter, goes through shared memory
to be turned. In fp8 a feature's scale comes from a pass of its own (triton_features.py).

At T = 8192, F = 21504 and 4.0 TB/s `transpose_pack` moves 9/8 + 9/8 bytes an element in 16 bits, 0.099 ms, and
5/8 + 5/8 in fp8, 0.055 ms, after 0.028 ms for the scales. In fp8 that is less than what it computes: 31 comparisons and
selections for every 4 elements, 0.086 ms of an H200 if nothing else delays them.
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
from sidlm.ops.sparse24.triton_features import largest_of_columns, largest_of_features
from sidlm.ops.sparse24.triton_groups import (
    add_nonzero,
    byte_of,
    choose,
    in_pairs,
    lanes,
    power_of_two,
    quads,
    spread,
    to_nibbles,
    wide,
)


@triton.jit
@no_type_check
def by_feature(x0, x1, x2, x3):
    """Four tensors, one for each feature of a group -> one with two axes more: feature // 2, feature % 2."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3))


@triton.jit
@no_type_check
def in_order(columns, R: tl.constexpr, C: tl.constexpr):
    """Columns [R], C <= 1024 of them, a power of two -> [R, C]."""
    for level in tl.static_range(10):
        if C >> level > 1:
            joined = ()
            for i in tl.static_range(C >> level + 1):
                joined = joined + (tl.join(columns[i], columns[(C >> level + 1) + i]),)
            columns = joined
    return tl.reshape(columns[0], [R, C])


@triton.jit
@no_type_check
def transpose_pack_kernel(
    values_ptr, metadata_ptr, scale_ptr, perm_ptr, to_ptr, bits_ptr,
    out_values_ptr, out_metadata_ptr, out_scale_ptr, totals_ptr, T, N, LENGTH, value_stride,
    F: tl.constexpr, BYTE: tl.constexpr, OUT_BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    MAGNITUDE: tl.constexpr, FP8: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Packed (T, F) -> packed (N, LENGTH): feature f to row to[f], none if that is negative.

    A program has BO octets of tokens and BG groups of features.
    """
    strips: tl.constexpr = (F // 4 + BG - 1) // BG
    first_group, first_octet = tl.program_id(0) % strips * BG, tl.program_id(0) // strips * BO
    octet = first_octet + tl.arange(0, BO)
    c = first_group * 2 + tl.arange(0, 2 * BG)[None, :]
    c_bytes = first_group // 2 + tl.arange(0, BG // 2)[None, :]
    f = first_group * 4 + tl.arange(0, 4 * BG)
    to = tl.load(to_ptr + f, mask=f < F, other=-1)
    tokens = ()
    for i in tl.static_range(8):
        t = octet * 8 + i
        inside = t < T
        row = tl.load(perm_ptr + t, mask=inside, other=0)[:, None]
        v = tl.load(values_ptr + row * (F // 2) + c, mask=inside[:, None] & (c < F // 2), other=0.0)  # [BO, 2 BG]
        place = BYTE(row if WIDE else row.to(tl.int32), c_bytes, T, F)
        metadata = tl.load(metadata_ptr + place, mask=inside[:, None] & (c_bytes < F // 8), other=0)
        if FP8:
            v = v.to(tl.float32) * tl.load(scale_ptr + row, mask=inside[:, None], other=0.0)
            if PACKED:
                v = v.to(tl.bfloat16)  # exact but for subnormals: e4m3 times a power of two
        low, high = tl.split(tl.reshape(lanes(v, PACKED), [BO, BG, 2]))
        tokens = tokens + (spread(low, high, to_nibbles(metadata, BO, BG), PACKED),)
    wanted = quads(tl.reshape(to, [1, 4 * BG]) >= 0, 1, 4 * BG)  # four [1, BG]
    values, bytes = (), ()
    before, after = tl.zeros([BO, BG], tl.float32), tl.zeros([BO, BG], tl.float32)
    for j in tl.static_range(4):
        low0, high0, n0 = choose(tokens[0][j], tokens[1][j], tokens[2][j], tokens[3][j], MAGNITUDE, PACKED)
        low1, high1, n1 = choose(tokens[4][j], tokens[5][j], tokens[6][j], tokens[7][j], MAGNITUDE, PACKED)
        values = values + (tl.join(tl.join(low0, low1), tl.join(high0, high1)),)  # [BO, BG, which four, low or high]
        bytes = bytes + ((n0 | n1 << 4).to(tl.uint8),)
        some = tl.zeros([BO, BG], low0.dtype)
        for i in tl.static_range(8):
            some = add_nonzero(some, tokens[i][j], PACKED)
        before += tl.where(wanted[j], some.to(tl.float32), 0.0)
        some = add_nonzero(add_nonzero(tl.zeros([BO, BG], low0.dtype), low0, PACKED), high0, PACKED)
        some = add_nonzero(add_nonzero(some, low1, PACKED), high1, PACKED)
        after += tl.where(wanted[j], some.to(tl.float32), 0.0)
    tl.atomic_add(totals_ptr, tl.sum(before).to(tl.int32), sem="relaxed")
    tl.atomic_add(totals_ptr + 1, tl.sum(after).to(tl.int32), sem="relaxed")

    out = by_feature(values[0], values[1], values[2], values[3])  # [BO, BG, 2, 2, 2, 2]
    if FP8:
        scale, inverse = power_of_two(tl.load(bits_ptr + f, mask=f < F, other=0))
        tl.store(out_scale_ptr + to, scale, mask=(to >= 0) & (first_octet == 0))
        out = out.to(tl.float32) * tl.reshape(inverse, [1, BG, 1, 1, 2, 2])
    out = tl.permute(out.to(out_values_ptr.dtype.element_ty), [1, 4, 5, 0, 2, 3])
    row, column = to[:, None].to(tl.int64), first_octet * 4 + tl.arange(0, 4 * BO)[None, :]
    keep = (to >= 0)[:, None]
    out_values_ptr += row * value_stride + column
    tl.store(out_values_ptr, tl.reshape(out, [4 * BG, 4 * BO]), mask=keep & (column < value_stride))
    out = tl.permute(by_feature(bytes[0], bytes[1], bytes[2], bytes[3]), [1, 2, 3, 0])  # [BG, 2, 2, BO]
    place = OUT_BYTE(row if WIDE else to[:, None], octet[None, :], N, LENGTH)
    tl.store(out_metadata_ptr + place, tl.reshape(out, [4 * BG, BO]), mask=keep & (octet < LENGTH // 8)[None, :])


@triton.jit
@no_type_check
def transpose_dense_kernel(
    pairs_ptr, metadata_ptr, scale_ptr, perm_ptr, features_ptr, bits_ptr, out_ptr, out_scale_ptr, T, N, LENGTH,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, FP8: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Packed (T, F), its values as integers, two in each -> dense (N, LENGTH) of the features listed.

    A thread has BT tokens of its feature. All it reads is asked for before any of it is used.
    """
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    integer: tl.constexpr = tl.int8 if FP8 else tl.int32 if dtype == tl.float32 else tl.int16
    tiles = tl.cdiv(N, BN)
    first = tl.program_id(0) // tiles * BT
    n = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    f = tl.load(features_ptr + n, mask=n < N, other=0).to(tl.int32)
    rows, read = (), ()
    for i in tl.static_range(BT):
        rows = rows + (tl.load(perm_ptr + tl.minimum(first + i, T - 1)),)
    for i in tl.static_range(BT):
        pair = tl.load(pairs_ptr + rows[i] * (F // 4) + f // 4)
        metadata = tl.load(metadata_ptr + BYTE(rows[i] if WIDE else rows[i].to(tl.int32), f // 8, T, F))
        scale = 1.0
        if FP8:
            scale = tl.load(scale_ptr + rows[i])
        read = read + ((pair, metadata, scale),)
    inverse = 1.0
    if FP8:
        scale, inverse = power_of_two(tl.load(bits_ptr + f))
        tl.store(out_scale_ptr + n, scale, mask=(n < N) & (first == 0))
    tokens = ()
    for i in tl.static_range(BT):
        pair, metadata, scale = read[i]
        low = pair.to(integer).to(dtype, bitcast=True)
        high = (pair >> integer.primitive_bitwidth).to(integer).to(dtype, bitcast=True)
        nibble = metadata.to(tl.int32) >> f // 4 % 2 * 4 & 15
        x = tl.where(nibble >> 2 == f % 4, high.to(tl.float32), 0.0)
        x = tl.where((nibble & 3) == f % 4, low.to(tl.float32), x) * scale
        tokens = tokens + ((tl.where(first + i < T, x, 0.0) * inverse).to(dtype),)
    t = first + tl.arange(0, BT)[None, :]
    out = out_ptr + n[:, None].to(tl.int64) * LENGTH + t
    tl.store(out, in_order(tokens, BN, BT), mask=(n < N)[:, None] & (t < LENGTH))


@triton.jit
@no_type_check
def transpose_rows_kernel(
    x_ptr, scale_ptr, perm_ptr, bits_ptr, out_ptr, out_scale_ptr, T, D, LENGTH,
    SCALED: tl.constexpr, FP8: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x (T, D), SCALED: times a factor for each row -> (D, LENGTH)."""
    tiles = tl.cdiv(D, BD)
    first_token = tl.program_id(0) // tiles * BT
    d, t = tl.program_id(0) % tiles * BD + tl.arange(0, BD), first_token + tl.arange(0, BT)
    row = tl.load(perm_ptr + t, mask=t < T, other=0)[:, None]
    x = tl.load(x_ptr + row * D + d[None, :], mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)  # [BT, BD]
    if FP8:
        scale, inverse = power_of_two(tl.load(bits_ptr + d, mask=d < D, other=0))
        tl.store(out_scale_ptr + d, scale, mask=(d < D) & (first_token == 0))
        x = x.to(tl.float32)
        if SCALED:
            x = x * tl.load(scale_ptr + row, mask=(t < T)[:, None], other=0.0)
        x = x * inverse[None, :]
    out = out_ptr + d[:, None].to(tl.int64) * LENGTH + t[None, :]
    tl.store(out, tl.trans(x.to(out_ptr.dtype.element_ty)), mask=(d < D)[:, None] & (t < LENGTH)[None, :])


PAIRS = {1: torch.int16, 2: torch.int32, 4: torch.int64}
"""Bytes of a value -> integers that hold two."""


def plan_pack(
    p: Packed, to: Tensor, perm: Tensor, bits: Tensor | None, out: Packed, totals: Tensor, by: str, layout: str,
    arch: str,
) -> Launch:  # fmt: skip
    """The launch that fills out (n, T') with feature f of p (T, F) in row to[f]; meta tensors will do to compile it."""
    T, F, (n, half) = len(perm), 2 * p.values.shape[1], out.values.shape
    BO, BG = 32, 32
    constants = {
        "F": F, "BYTE": byte_of(layout, T, F), "OUT_BYTE": byte_of(layout, n, 2 * half),
        "WIDE": wide(T, F) or wide(n, 2 * half),
        "PACKED": in_pairs(arch, torch.bfloat16 if bits is not None else p.values.dtype),
        "MAGNITUDE": by == "magnitude", "FP8": bits is not None, "BO": BO, "BG": BG,
    }  # fmt: skip
    args = {
        "values_ptr": p.values, "metadata_ptr": p.metadata, "scale_ptr": p.scale, "perm_ptr": perm, "to_ptr": to,
        "bits_ptr": bits, "out_values_ptr": out.values, "out_metadata_ptr": out.metadata, "out_scale_ptr": out.scale,
        "totals_ptr": totals, "T": T, "N": n, "LENGTH": 2 * half, "value_stride": half,
    }  # fmt: skip
    grid = -(-F // (4 * BG)) * -(-2 * half // (8 * BO))
    return Launch(transpose_pack_kernel, grid, args, constants, 8)


def plan_dense(
    p: Packed, features: Tensor, perm: Tensor, bits: Tensor | None, out: Tensor, scale: Tensor | None, layout: str
) -> Launch:
    """The launch that fills out (n, T') and its scale; meta tensors will do to compile it."""
    T, F, (n, length) = len(perm), 2 * p.values.shape[1], out.shape
    BT, BN = 16, 128
    constants = {
        "F": F, "BYTE": byte_of(layout, T, F), "WIDE": wide(T, F), "FP8": bits is not None, "BT": BT, "BN": BN,
    }  # fmt: skip
    args = {
        "pairs_ptr": p.values.view(PAIRS[p.values.element_size()]), "metadata_ptr": p.metadata, "scale_ptr": p.scale,
        "perm_ptr": perm, "features_ptr": features, "bits_ptr": bits, "out_ptr": out, "out_scale_ptr": scale, "T": T,
        "N": n, "LENGTH": length,
    }  # fmt: skip
    return Launch(transpose_dense_kernel, -(-n // BN) * -(-length // BT), args, constants, 4)


def plan_rows(
    x: Tensor, x_scale: Tensor | None, perm: Tensor, bits: Tensor | None, out: Tensor, scale: Tensor | None
) -> Launch:
    """The launch that fills out (d, T') and its scale; meta tensors will do to compile it."""
    d, length = out.shape
    BT, BD = 128, 64
    args = {
        "x_ptr": x, "scale_ptr": x_scale, "perm_ptr": perm, "bits_ptr": bits, "out_ptr": out, "out_scale_ptr": scale,
        "T": len(perm), "D": d, "LENGTH": length,
    }  # fmt: skip
    constants = {"SCALED": x_scale is not None, "FP8": bits is not None, "BT": BT, "BD": BD}
    return Launch(transpose_rows_kernel, -(-d // BD) * -(-length // BT), args, constants, 4)


def _check_length(length: int, tokens: int, multiple: int) -> None:
    if length < tokens or length % multiple:
        raise ValueError(f"the length must be a multiple of {multiple}, at least the {tokens} tokens, got {length}")


def _scale(rows: int, like: Tensor, fp8: bool) -> Tensor | None:
    return torch.empty(rows, dtype=torch.float32, device=like.device) if fp8 else None


def transpose_pack(
    p: Packed, features: Tensor, perm: Tensor, length: int, by: str, fp8: bool, layout: str = "plain",
    bits: Tensor | None = None, values: Tensor | None = None, metadata: Tensor | None = None,
) -> tuple[Packed, Tensor]:  # fmt: skip
    """p[perm][:, features].T with zeros up to length, of it the two largest of every four tokens: packed (n, length).

    p (T, F) is in e4m3 if fp8, else has no scale; features int64 (n,), perm int64 (T,). by is "value" or "magnitude".
    In fp8 the result has a scale for each feature, from bits, `largest_of_features(p)`, which is computed if not given.
    Metadata are read and written in the layout named. values (n, length / 2) and metadata (n, length / 8), both
    contiguous, are written to if they are given. Also returns int32 totals (2,): the non-zeros, and how many of them
    are kept. Raises ValueError if length is less than T or no multiple of 8, or the layout does not take a size.
    """
    if by not in ("value", "magnitude"):
        raise ValueError(f"by must be 'value' or 'magnitude', got {by!r}")
    _check_length(length, len(perm), 8)
    n, F = len(features), 2 * p.values.shape[1]
    if values is None:
        values = p.values.new_empty(n, length // 2, dtype=FP8 if fp8 else p.values.dtype)
    if metadata is None:
        metadata = p.metadata.new_empty(n, length // 8)
    out = Packed(values, metadata, _scale(n, p.values, fp8))
    totals = torch.zeros(2, dtype=torch.int32, device=p.values.device)
    if values.numel():
        arch = target(out.values.device)
        if fp8 and bits is None:
            bits = largest_of_features(p, layout)
        to = torch.full((F,), -1, dtype=torch.int32, device=features.device)
        to[features] = torch.arange(n, dtype=torch.int32, device=features.device)
        if fp8 and layout == "plain" and in_pairs(arch, torch.bfloat16):
            assert bits is not None and out.scale is not None
            triton_turn.plan(p, to, perm, bits, out.values, out.metadata, out.scale, totals, by).run()
        else:
            plan_pack(p, to, perm, bits if fp8 else None, out, totals, by, layout, arch).run()
    return out, totals


def transpose_dense(
    p: Packed, features: Tensor, perm: Tensor, length: int, fp8: bool, layout: str = "plain",
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """p[perm][:, features].T with zeros up to length (n, length), and in fp8 a scale for each feature.

    Arguments as of `transpose_pack`; features that are neighbours in memory are best neighbours in the list.
    """
    _check_length(length, len(perm), 1)
    n = len(features)
    out, scale = p.values.new_empty(n, length, dtype=FP8 if fp8 else p.values.dtype), _scale(n, p.values, fp8)
    if not len(perm):
        return out.zero_(), scale if scale is None else scale.fill_(1.0)
    if out.numel():
        if fp8 and bits is None:
            bits = largest_of_features(p, layout)
        plan_dense(p, features, perm, bits if fp8 else None, out, scale, layout).run()
    return out, scale


def transpose_rows(
    x: Tensor, perm: Tensor, length: int, fp8: bool, x_scale: Tensor | None = None, bits: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x[perm].T with zeros up to length (d, length), for x (T, d); in fp8 with a scale for each of its rows.

    x may be e4m3 with a scale (T,), and then bits (d,) are those of the largest magnitudes of its scaled columns.
    """
    _check_length(length, len(perm), 1)
    x, d = x.contiguous(), x.shape[1]
    out, scale = x.new_empty(d, length, dtype=FP8 if fp8 else x.dtype), _scale(d, x, fp8)
    if out.numel():
        bits = largest_of_columns(x) if fp8 and bits is None else bits
        plan_rows(x, x_scale, perm, bits, out, scale).run()
    return out, scale
