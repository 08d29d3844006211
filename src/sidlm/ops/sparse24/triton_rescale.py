"""Products times factors of their rows and columns, to where they belong, in one pass and whole: no row is left out, so
that into a transposed matrix, too, whole sectors are written."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch
from sidlm.ops.sparse24.products import Product

TILE = {"BM": 64, "BN": 128}


@triton.jit
@no_type_check
def _place(
    first_ptr, row_ptr, column_ptr, second_ptr, source_ptr, into_ptr, count, rows, columns,
    first_m, first_n, second_m, second_n, into_m, into_n,
    BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BN] of into: from row source[m] of the first product, with its factors, or of what follows it, the
    second; without CHOSEN row m of the first. ROWS, COLUMNS: whether there are such factors."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    at, inside = m, m < rows
    if CHOSEN:
        at = tl.load(source_ptr + m, mask=inside, other=0)
    mine = inside & (at < count)
    there = (n < columns)[None, :]
    at = at.to(tl.int64)
    x = first_ptr + at[:, None] * first_m + n[None, :] * first_n
    x = tl.load(x, mask=mine[:, None] & there, other=0.0)  # [BM, BN]
    if ROWS:
        x = x.to(tl.float32) * tl.load(row_ptr + at, mask=mine, other=0.0)[:, None]
    if COLUMNS:
        x = x.to(tl.float32) * tl.load(column_ptr + n, mask=n < columns, other=0.0)[None, :]
    x = x.to(into_ptr.dtype.element_ty)
    if CHOSEN:
        y = second_ptr + (at - count)[:, None] * second_m + n[None, :] * second_n
        x = tl.where(mine[:, None], x, tl.load(y, mask=(inside & (at >= count))[:, None] & there, other=0.0))
    to = into_ptr + m.to(tl.int64)[:, None] * into_m + n[None, :] * into_n
    tl.store(to, x, mask=inside[:, None] & there)


def plan(first: Product, second: Tensor | None, source: Tensor | None, into: Tensor) -> Launch:
    (count, columns), other = first.values.shape, first.values if second is None else second
    (first_m, first_n), (second_m, second_n) = first.values.stride(), other.stride()
    into_m, into_n = into.stride()
    args = {
        "first_ptr": first.values, "row_ptr": first.rows, "column_ptr": first.columns, "second_ptr": other,
        "source_ptr": source, "into_ptr": into, "count": count, "rows": len(into), "columns": columns,
        "first_m": first_m, "first_n": first_n, "second_m": second_m, "second_n": second_n,
        "into_m": into_m, "into_n": into_n,
    }  # fmt: skip
    flags = {"ROWS": first.rows is not None, "COLUMNS": first.columns is not None, "CHOSEN": source is not None}
    grid = -(-len(into) // TILE["BM"]), -(-columns // TILE["BN"])
    return Launch(_place, grid, args, TILE | flags, num_warps=8)


def rescaled(product: Product) -> Tensor:
    """The product (M, N), contiguous, with its factors: in its own memory if it is contiguous."""
    values = product.values
    if product.rows is None and product.columns is None:
        return values.contiguous()
    into = values if values.is_contiguous() else torch.empty_like(values, memory_format=torch.contiguous_format)
    if into.numel():
        plan(product, None, None, into).run()
    return into


def place(into: Tensor, source: Tensor, first: Product, second: Tensor | None) -> None:
    """into[f] = row source[f] of first (m, n), with its factors, and of second (k, n) behind it; all in one dtype.

    into (m + k, n) with any strides; source int32 (m + k,) takes each row once.
    """
    if into.numel():
        plan(first, second, source, into).run()
