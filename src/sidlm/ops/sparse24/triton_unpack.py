"""A packed matrix as a dense one."""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidlm.ops.simplicial.prepare import Launch

TILE = {"BM": 8, "BG": 128}


@triton.jit
@no_type_check
def _unpack(
    values_ptr, metadata_ptr, rows_ptr, out_ptr, count, K,
    SELECTED: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """A tile of BM rows and BG groups of four; SELECTED: of the rows in rows_ptr."""
    at = tl.program_id(0) * BM + tl.arange(0, BM)
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    row = at
    if SELECTED:
        row = tl.load(rows_ptr + at, mask=at < count, other=0).to(tl.int32)
    mask = (at < count)[:, None] & (group < K // 4)[None, :]
    half = tl.program_id(1) * (2 * BG) + tl.arange(0, 2 * BG)
    pairs = values_ptr + row[:, None].to(tl.int64) * (K // 2) + half[None, :]
    pairs = tl.load(pairs, mask=(at < count)[:, None] & (half < K // 2)[None, :], other=0)  # [BM, 2 BG]
    first, second = tl.split(tl.reshape(pairs, [BM, BG, 2]))  # [BM, BG]
    byte = metadata_ptr + row[:, None].to(tl.int64) * (K // 8) + group[None, :] // 2
    code = (tl.load(byte, mask=mask, other=0).to(tl.int32) >> (group % 2 * 4)[None, :]) & 15
    one, two = code & 3, code >> 2
    zero = tl.zeros_like(first)
    x0 = tl.where(one == 0, first, zero)
    x1 = tl.where(one == 1, first, tl.where(two == 1, second, zero))
    x2 = tl.where(one == 2, first, tl.where(two == 2, second, zero))
    x3 = tl.where(two == 3, second, zero)
    x = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [BM, 4 * BG])
    column = tl.program_id(1) * (4 * BG) + tl.arange(0, 4 * BG)
    mask = (at < count)[:, None] & (column < K)[None, :]
    tl.store(out_ptr + at[:, None].to(tl.int64) * K + column[None, :], x, mask=mask)


def plan(values: Tensor, metadata: Tensor, rows: Tensor | None, out: Tensor) -> Launch:
    half, (count, k) = values.shape[1], out.shape
    bits = torch.uint8 if values.itemsize == 1 else torch.int16  # a copy, whatever the bits mean
    args = {"values_ptr": values.view(bits), "metadata_ptr": metadata, "rows_ptr": rows, "out_ptr": out.view(bits)}
    grid = -(-count // TILE["BM"]), -(-half // (2 * TILE["BG"]))
    return Launch(_unpack, grid, args | {"count": count, "K": k}, {"SELECTED": rows is not None, **TILE}, num_warps=4)


def unpack_rows(values: Tensor, metadata: Tensor, rows: Tensor | None = None) -> Tensor:
    """Dense (M, K) in values' dtype from values (M, K / 2) and metadata (M, K / 8); rows int64 (m,): those, (m, K)."""
    count = len(values) if rows is None else len(rows)
    out = torch.empty(count, 2 * values.shape[1], dtype=values.dtype, device=values.device)
    if out.numel():
        plan(values, metadata, rows, out).run()
    return out
