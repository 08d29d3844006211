"""`quantize_rows` as one kernel: a row is read twice, the second time mostly from the cache."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24.quantize import FP8


@triton.jit
@no_type_check
def _quantize(x_ptr, values_ptr, scale_ptr, columns, stride, BN: tl.constexpr):
    """One row of x (M, columns), float32 or shorter, to e4m3 and its power of two."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride
    offset = tl.arange(0, BN)
    amax = tl.zeros([BN], tl.float32)
    for start in range(0, columns, BN):
        x = tl.load(x_ptr + start + offset, mask=start + offset < columns, other=0.0).to(tl.float32)  # [BN]
        # NaN is not lost: it makes the scale NaN, and so the row
        amax = tl.maximum(amax, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    # as integers, magnitudes have the order of the numbers, and NaN is above all
    bits = tl.max(amax.to(tl.int32, bitcast=True), 0)
    exponent = bits >> 23
    biased = tl.maximum(exponent - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    biased = tl.where(bits == 0, 127, biased)
    scale = (biased << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - biased) << 23).to(tl.float32, bitcast=True)
    scale = tl.where(exponent == 255, float("nan"), scale)
    inverse = tl.where(exponent == 255, float("nan"), inverse)
    tl.store(scale_ptr + row, scale)
    values_ptr += row * columns
    for start in range(0, columns, BN):
        mask = start + offset < columns
        x = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)  # [BN]
        tl.store(values_ptr + start + offset, (x * inverse).to(values_ptr.dtype.element_ty), mask=mask)


def plan(x: Tensor, values: Tensor, scale: Tensor) -> Launch:
    args = {"x_ptr": x, "values_ptr": values, "scale_ptr": scale, "columns": x.shape[1], "stride": x.stride(0)}
    return Launch(_quantize, len(x), args, {"BN": min(4096, triton.next_power_of_2(x.shape[1]))}, num_warps=8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K), of adjacent columns -> e4m3 (M, K) and scale (M,), as `quantize.quantize_rows` has it."""
    if x.stride(-1) != 1:
        raise ValueError(f"x has stride {x.stride(-1)} along its rows, expected 1")
    values = torch.empty(x.shape, dtype=FP8, device=x.device)
    scale = torch.ones(len(x), dtype=torch.float32, device=x.device)
    if x.numel():
        plan(x, values, scale).run()
    return values, scale
