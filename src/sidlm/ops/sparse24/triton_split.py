"""Which features stay dense, in one launch: the three sorts of `recipe.split` take 0.17 ms of an H200 at any size."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24 import recipe
from sidlm.ops.sparse24.recipe import Split


@triton.jit
@no_type_check
def split_kernel(
    counts_ptr, sparse_ptr, dense_ptr, is_dense_ptr,
    F: tl.constexpr, DENSE: tl.constexpr, BITS: tl.constexpr, BF: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The DENSE features of the highest counts, of equal counts the last, and the others; a program places BS of them.

    Each finds the lowest count that is dense for itself: it has all of them in registers.
    """
    f = tl.arange(0, BF)
    counts = tl.load(counts_ptr + f, mask=f < F, other=-1)
    level = tl.program_id(0) * 0  # to be the highest count that DENSE features reach, bit by bit
    for i in range(BITS):
        higher = level + (1 << BITS - 1 - i)
        level = tl.where(tl.sum((counts >= higher).to(tl.int32)) >= DENSE, higher, level)
    above, equal = (counts > level).to(tl.int32), (counts == level).to(tl.int32)
    first = tl.sum(equal) - (DENSE - tl.sum(above))  # so many of the equal ones are sparse
    start = tl.program_id(0) * BS
    above_before = tl.sum(tl.where(f < start, above, 0))
    equal_before = tl.sum(tl.where(f < start, equal, 0))
    dense_before = above_before + tl.maximum(equal_before - first, 0)
    mine = start + tl.arange(0, BS)
    own = tl.load(counts_ptr + mine, mask=mine < F, other=-1)
    same = (own == level).to(tl.int32)
    dense = (own > level).to(tl.int32) + same * (equal_before + tl.cumsum(same, 0) > first).to(tl.int32)
    place = dense_before + tl.cumsum(dense, 0) - dense
    tl.store(is_dense_ptr + mine, dense.to(tl.uint8), mask=mine < F)
    tl.store(dense_ptr + place, mine.to(tl.int64), mask=dense > 0)
    tl.store(sparse_ptr + mine - place, mine.to(tl.int64), mask=(dense == 0) & (mine < F))


SEGMENT = 1024
"""Features that a program places."""


def plan(counts: Tensor, to: Split, most: int) -> Launch:
    """The launch that fills `to` from counts, none of them above `most`."""
    args = {"counts_ptr": counts, "sparse_ptr": to.sparse, "dense_ptr": to.dense, "is_dense_ptr": to.is_dense}
    BF = 1 << (len(counts) - 1).bit_length()
    bits = -(-most.bit_length() // 4) * 4  # rounded up, for few kernels
    constants = {"F": len(counts), "DENSE": len(to.dense), "BITS": bits, "BF": BF, "BS": SEGMENT}
    return Launch(split_kernel, -(-len(counts) // SEGMENT), args, constants, min(16, max(4, BF // 2048)))


def split(counts: Tensor, share: float, tokens: int) -> Split:
    """`recipe.split` of int32 counts (F,) of at most so many tokens."""
    dense, features = recipe.dense_count(len(counts), share), counts.new_empty(len(counts), dtype=torch.int64)
    is_dense = counts.new_empty(len(counts), dtype=torch.uint8)
    to = Split(features[dense:], features[:dense], is_dense)
    if dense in (0, len(counts)):
        torch.arange(len(counts), out=features)
        is_dense.fill_(dense > 0)
        return to
    plan(counts, to, tokens).run()
    return to
