"""`quantize_rows` as one kernel that reads each row once: it waits in registers for its scale."""
# ruff: noqa: RUF005 - Triton has no starred elements of tuples

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch, target
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.triton_groups import in_pairs, lanes, largest, power_of_two
from sidlm.ops.sparse24.triton_masked import whole_rows


@triton.jit
@no_type_check
def rows_kernel(
    x_ptr, values_ptr, scale_ptr, stride, K: tl.constexpr, PACKED: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """One row of x (M, K), float32 or shorter, to e4m3 and its power of two."""
    CHUNKS: tl.constexpr = (K + BK - 1) // BK
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    x, top = (), tl.zeros([BK], x_ptr.dtype.element_ty if PACKED else tl.float32)
    for i in tl.static_range(CHUNKS):
        x = x + (tl.load(x_ptr + row * stride + i * BK + c, mask=c < K - i * BK, other=0.0),)
    for i in tl.static_range(CHUNKS):
        top = largest(top, lanes(x[i], PACKED), PACKED)
    # as integers, magnitudes have the order of the numbers, and NaN is above all
    bits = top.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale, inverse = power_of_two(tl.max(bits, 0))
    tl.store(scale_ptr + row, scale)
    for i in tl.static_range(CHUNKS):
        out = (x[i].to(tl.float32) * inverse).to(values_ptr.dtype.element_ty)
        tl.store(values_ptr + row * K + i * BK + c, out, mask=c < K - i * BK)


def plan(x: Tensor, values: Tensor, scale: Tensor, arch: str) -> Launch:
    """The launch that fills values and scale; meta tensors will do to compile it."""
    M, K = x.shape
    columns, warps = whole_rows(K)
    args = {"x_ptr": x, "values_ptr": values, "scale_ptr": scale, "stride": x.stride(0)}
    constants = {"K": K, "PACKED": in_pairs(arch, x.dtype), "BK": columns}
    return Launch(rows_kernel, M, args, constants, num_warps=warps)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), of adjacent columns -> e4m3 (M, K) and scale (M,), as `quantize.quantize_rows` has it."""
    if x.stride(-1) != 1:
        raise ValueError(f"x has stride {x.stride(-1)} along its rows, expected 1")
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.ones(len(x), dtype=torch.float32, device=x.device)
    if x.numel():
        plan(x, values, scale, target(x.device)).run()
    return values, scale
