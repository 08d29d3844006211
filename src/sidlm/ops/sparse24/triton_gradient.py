"""Gradient of squared ReLU where the activation was kept, rounded and packed by the activation's metadata.

The activation holds all that the gradient needs: 2 relu(y1) = 2 sqrt(act). Programs are like those of triton_pack.py,
whole rows, for both precisions; the metadata is read and not written again.

At T = 8192, F = 21504 and 4.0 TB/s: 16 bits move 2 + 1 + 1/8 + 1 bytes an element, 0.182 ms; fp8 moves
2 + 1/2 + 1/8 + 1/2, 0.138 ms.
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.triton_groups import (
    byte_of,
    in_pairs,
    lanes,
    largest,
    pick,
    power_of_two,
    quads,
    to_nibbles,
    wide,
)
from sidlm.ops.sparse24.triton_pack import row_shape


@triton.jit
@no_type_check
def load_chunk(
    dy2_ptr, act_ptr, metadata_ptr, base, row, T, chunk: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of one row, columns chunk * BF and on: dy2 [1, BF], act's values [1, BF / 2] and metadata [1, BF / 8]."""
    c = tl.arange(0, BF)[None, :]
    c_values, c_bytes = tl.arange(0, BF // 2)[None, :], tl.arange(0, BF // 8)[None, :]
    first: tl.constexpr = chunk * BF
    dy2 = tl.load(dy2_ptr + base * F + first + c, mask=c < F - first, other=0.0)
    act = tl.load(act_ptr + base * (F // 2) + first // 2 + c_values, mask=c_values < (F - first) // 2, other=0.0)
    place = BYTE(base if WIDE else row, first // 8 + c_bytes, T, F)
    return dy2, act, tl.load(metadata_ptr + place, mask=c_bytes < (F - first) // 8, other=0)


@triton.jit
@no_type_check
def gradient_kernel(
    dy2_ptr, act_ptr, metadata_ptr, act_scale_ptr, values_ptr, scale_ptr, T,
    F: tl.constexpr, BYTE: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr, SCALED: tl.constexpr,
    FP8: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """dy2 (T, F), act (T, F) packed -> values (T, F / 2), scale (T,); a program has one row."""
    G: tl.constexpr = BF // 4
    CHUNKS: tl.constexpr = (F + BF - 1) // BF
    row = tl.program_id(0)
    base = row.to(tl.int64)
    c = tl.arange(0, BF // 2)[None, :]
    act_scale = 1.0
    if SCALED:
        act_scale = tl.load(act_scale_ptr + row)
    top = tl.zeros([1, G], tl.float32)
    kept, loaded = (), ()
    for chunk in tl.static_range(CHUNKS):  # before anything is written: the compiler moves no load past a store
        loaded = loaded + (load_chunk(dy2_ptr, act_ptr, metadata_ptr, base, row, T, chunk, F, BF, BYTE, WIDE),)
    for chunk in tl.static_range(CHUNKS):
        x0, x1, x2, x3 = quads(lanes(loaded[chunk][0], PACKED), 1, BF)
        low, high = pick(x0, x1, x2, x3, to_nibbles(loaded[chunk][2], 1, G), PACKED)
        act = tl.reshape(loaded[chunk][1].to(tl.float32), [1, G, 2])
        if SCALED:
            act = act * act_scale
        # most of what is kept is 0, whose root takes the slow way
        root = tl.where(act == 0, 0.0, tl.sqrt_rn(tl.where(act == 0, 1.0, act)))
        gradient = 2.0 * root * tl.join(low.to(tl.float32), high.to(tl.float32))
        if FP8:
            low, high = tl.split(gradient)
            top = largest(largest(top, low, False), high, False)
            kept = kept + (gradient,)
        else:
            out = values_ptr + base * (F // 2) + chunk * (BF // 2) + c
            gradient = tl.reshape(gradient, [1, BF // 2]).to(values_ptr.dtype.element_ty)
            tl.store(out, gradient, mask=c < F // 2 - chunk * (BF // 2))
    if FP8:
        # as integers, for NaN is the largest of them
        scale, inverse = power_of_two(tl.max(top.to(tl.int32, bitcast=True) & 0x7FFFFFFF))
        tl.store(scale_ptr + row, scale)
        for chunk in tl.static_range(CHUNKS):
            out = values_ptr + base * (F // 2) + chunk * (BF // 2) + c
            gradient = tl.reshape(kept[chunk] * inverse, [1, BF // 2]).to(values_ptr.dtype.element_ty)
            tl.store(out, gradient, mask=c < F // 2 - chunk * (BF // 2))


def plan(dy2: Tensor, act: Packed, values: Tensor, scale: Tensor | None, layout: str, arch: str) -> Launch:
    """The launch that fills values and scale for a target; tensors may be on the meta device to compile it."""
    T, F = dy2.shape
    columns, warps = row_shape(F)
    constants = {
        "F": F, "BYTE": byte_of(layout, T, F), "WIDE": wide(T, F), "PACKED": in_pairs(arch, dy2.dtype),
        "SCALED": act.scale is not None, "FP8": scale is not None, "BF": columns,
    }  # fmt: skip
    args = {
        "dy2_ptr": dy2, "act_ptr": act.values, "metadata_ptr": act.metadata, "act_scale_ptr": act.scale,
        "values_ptr": values, "scale_ptr": scale, "T": T,
    }  # fmt: skip
    return Launch(gradient_kernel, T, args, constants, warps)


def pack_gradient(dy2: Tensor, act: Packed, fp8: bool, layout: str = "plain", values: Tensor | None = None) -> Packed:
    """2 sqrt(act) dy2 where act (T, F) has its values, rounded to dy2's dtype or, by rows, to e4m3.

    dy2 (T, F) is float32, bfloat16 or float16. The result has act's own metadata, in the layout named; its values are
    written to `values` (T, F / 2), contiguous, if they are given. Raises ValueError as `pack_activation`.
    """
    byte_of(layout, *dy2.shape)
    dy2 = dy2.contiguous()
    if values is None:
        values = dy2.new_empty(act.values.shape, dtype=FP8 if fp8 else dy2.dtype)
    scale = dy2.new_empty(len(dy2), dtype=torch.float32) if fp8 else None
    if dy2.numel():
        plan(dy2, act, values, scale, layout, target(dy2.device)).run()
    return Packed(values, act.metadata, scale)
