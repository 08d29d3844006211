"""The determinant's permuted copies (prepare.py) by one kernel: both are written from one read.

`index_select` along the last dimension takes an index per element and a launch per copy; at T=2048, H=64 that was a
tenth of the whole forward pass.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch

BITS = {2: torch.int16, 4: torch.int32}
BLOCK = 2048  # elements of a program


@triton.jit
@no_type_check
def copies_kernel(
    x_ptr, a_ptr, b_ptr, total, D: tl.constexpr, SWAPPED: tl.constexpr, ZERO: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = (at % D).to(tl.int32)
    turns = d < D // 3 * 3  # the last D mod 3 dimensions stay where they are
    one = at + tl.where(turns, tl.where(d % 3 == 2, -2, 1), 0)
    two = at + tl.where(turns, tl.where(d % 3 == 0, 2, -1), 0)
    if SWAPPED:
        one, two = two, one
    a = tl.load(x_ptr + one, mask=at < total)
    b = tl.load(x_ptr + two, mask=at < total)
    if ZERO == 0:
        a = tl.where(turns, a, 0)
    else:
        b = tl.where(turns, b, 0)
    tl.store(a_ptr + at, a, mask=at < total)
    tl.store(b_ptr + at, b, mask=at < total)


def plan(x: Tensor, a: Tensor, b: Tensor, swapped: bool, zero: int) -> Launch:
    """The launch that fills a and b; all three are contiguous and equal in shape and dtype."""
    kind = BITS[x.element_size()]
    args = {"x_ptr": x.view(kind), "a_ptr": a.view(kind), "b_ptr": b.view(kind), "total": x.numel()}
    constants = {"D": x.shape[-1], "SWAPPED": swapped, "ZERO": zero, "BLOCK": BLOCK}
    return Launch(copies_kernel, -(-x.numel() // BLOCK), args, constants, num_warps=4)


def copies(x: Tensor, swapped: bool, zero: int) -> tuple[Tensor, Tensor]:
    """Copies a and b of x (..., D), contiguous, rotated in chunks of three; copy number `zero` ends in zeros."""
    a, b = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        plan(x, a, b, swapped, zero).run()
    return a, b
