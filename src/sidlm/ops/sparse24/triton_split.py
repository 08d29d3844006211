"""Which features stay dense, in one launch: the three sorts of `recipe.split` take 0.17 ms of an H200 at any size."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24 import recipe


@triton.jit
@no_type_check
def split_kernel(
    counts_ptr, sparse_ptr, dense_ptr, F: tl.constexpr, DENSE: tl.constexpr, BITS: tl.constexpr, BF: tl.constexpr
):
    """One program has all features: the DENSE of the highest counts, of equal counts the last, and the others."""
    f = tl.arange(0, BF)
    counts = tl.load(counts_ptr + f, mask=f < F, other=-1)
    level = tl.program_id(0)  # 0: to be the highest count that DENSE features reach, bit by bit
    for i in range(BITS):
        higher = level + (1 << BITS - 1 - i)
        level = tl.where(tl.sum((counts >= higher).to(tl.int32)) >= DENSE, higher, level)
    above, equal = (counts > level).to(tl.int32), (counts == level).to(tl.int32)
    first = tl.sum(equal) - (DENSE - tl.sum(above))  # so many of the equal ones are sparse
    dense = above + equal * (tl.cumsum(equal, 0) > first).to(tl.int32)
    place = tl.cumsum(dense, 0) - dense
    tl.store(dense_ptr + place, f.to(tl.int64), mask=dense > 0)
    tl.store(sparse_ptr + f - place, f.to(tl.int64), mask=(dense == 0) & (f < F))


def plan(counts: Tensor, sparse: Tensor, dense: Tensor, most: int) -> Launch:
    """The launch that fills sparse and dense from counts, none of them above `most`."""
    args = {"counts_ptr": counts, "sparse_ptr": sparse, "dense_ptr": dense}
    BF = triton.next_power_of_2(len(counts))
    # the bits of `most`, rounded up, for few kernels
    bits = -(-most.bit_length() // 4) * 4
    constants = {"F": len(counts), "DENSE": len(dense), "BITS": bits, "BF": BF}
    return Launch(split_kernel, 1, args, constants, min(32, max(4, BF // 1024)))


def split(counts: Tensor, share: float, tokens: int) -> tuple[Tensor, Tensor]:
    """`recipe.split` of int32 counts (F,) of at most so many tokens."""
    dense = recipe.dense_count(len(counts), share)
    none, every = counts.new_empty(0, dtype=torch.int64), torch.arange(len(counts), device=counts.device)
    if dense in (0, len(counts)):
        return (every, none) if dense == 0 else (none, every)
    out = every.new_empty(len(counts))
    sparse_rows, dense_rows = out[dense:], out[:dense]
    plan(counts, sparse_rows, dense_rows, tokens).run()
    return sparse_rows, dense_rows
