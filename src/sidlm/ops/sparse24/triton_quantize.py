"""`quantize_rows` as one kernel that reads each row once, and finds the largest of each column on the way if asked.

A row waits in registers for its scale. The columns' are for the transpose (`triton_turn_rows.py`), which without them
would have to be looked through first: weights are quantised by rows forward, and by columns backward.
"""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.triton_features import largest_of_columns
from sidlm.ops.sparse24.triton_groups import in_pairs, lanes, largest, power_of_two
from sidlm.ops.sparse24.triton_masked import whole_rows

PROGRAMS = 528
"""Before one has more rows, where columns are looked at: four for each multiprocessor of an H200"""
COLUMNS = 24576
"""So many fit: of a thread 48 elements, as many of the next row, and as many largest magnitudes"""


@triton.jit
@no_type_check
def row_of(x_ptr, row, inside, K: tl.constexpr, BK: tl.constexpr):
    """Its chunks [BK], zeros behind its end and where it is not inside."""
    c = tl.arange(0, BK)
    x = ()
    for i in tl.static_range((K + BK - 1) // BK):
        x = x + (tl.load(x_ptr + row + i * BK + c, mask=inside & (c < K - i * BK), other=0.0),)
    return x


@triton.jit
@no_type_check
def bits_of(x):
    """Of float32, without the sign: as integers, magnitudes have the order of the numbers, and NaN is above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
@no_type_check
def rows_kernel(
    x_ptr, values_ptr, scale_ptr, bits_ptr, M, steps, stride,
    K: tl.constexpr, TOP: tl.constexpr, PACKED: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows of x (M, K), float32 or shorter, to e4m3 and powers of two; TOP: bits (K,) are raised to the largest of
    each column. A program has so many steps, rows one after the other; the next one is read before one is written."""
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    c, first = tl.arange(0, BK), tl.program_id(0).to(tl.int64) * steps
    kind: tl.constexpr = x_ptr.dtype.element_ty if PACKED else tl.float32
    tops = ()
    for _ in tl.static_range(CHUNKS):
        tops = tops + (tl.zeros([BK], kind),)
    x = row_of(x_ptr, first * stride, first < M, K, BK)
    for step in range(steps):
        row = first + step
        ahead, seen, top = x, (), tl.zeros([BK], kind)
        if TOP:
            ahead = row_of(x_ptr, (row + 1) * stride, (step + 1 < steps) & (row + 1 < M), K, BK)
        for i in tl.static_range(CHUNKS):
            top = largest(top, lanes(x[i], PACKED), PACKED)
            seen = seen + (largest(tops[i], lanes(x[i], PACKED), PACKED) if TOP else tops[i],)
        scale, inverse = power_of_two(tl.max(bits_of(top), 0))
        tl.store(scale_ptr + row, scale, mask=row < M)
        for i in tl.static_range(CHUNKS):
            out = (x[i].to(tl.float32) * inverse).to(values_ptr.dtype.element_ty)
            tl.store(values_ptr + row * K + i * BK + c, out, mask=(row < M) & (c < K - i * BK))
        x, tops = ahead, seen
    if TOP:
        for i in tl.static_range(CHUNKS):
            bits = bits_of(tops[i])
            tl.atomic_max(bits_ptr + i * BK + c, bits, mask=(c < K - i * BK) & (bits > 0), sem="relaxed")


def plan(x: Tensor, values: Tensor, scale: Tensor, bits: Tensor | None, arch: str) -> Launch:
    """The launch that fills values and scale and raises bits, if given; meta tensors will do to compile it."""
    M, K = x.shape
    columns, warps = whole_rows(K)
    steps = 1 if bits is None else max(1, -(-M // PROGRAMS))
    args = {
        "x_ptr": x, "values_ptr": values, "scale_ptr": scale, "bits_ptr": bits, "M": M, "steps": steps,
        "stride": x.stride(0),
    }  # fmt: skip
    constants = {"K": K, "TOP": bits is not None, "PACKED": in_pairs(arch, x.dtype), "BK": columns}
    return Launch(rows_kernel, -(-M // steps), args, constants, num_warps=warps)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), of adjacent columns -> e4m3 (M, K) and scale (M,), as `quantize.quantize_rows` has it."""
    return _quantize(x, None)


def quantize_rows_and_tops(x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Also bits (int32) of the largest magnitude of each column (K,), NaN if there is one."""
    if x.shape[1] > COLUMNS:
        return _quantize(x, None), largest_of_columns(x.contiguous())
    bits = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    return _quantize(x, bits), bits


def _quantize(x: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
    if x.stride(-1) != 1:
        raise ValueError(f"x has stride {x.stride(-1)} along its rows, expected 1")
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.ones(len(x), dtype=torch.float32, device=x.device)
    if x.numel():
        plan(x, values, scale, bits, target(x.device)).run()
    return values, scale
