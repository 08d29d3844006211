"""Element-wise kernels of the dense feed-forward layers that benchmarks/sparse24.py compares with.

One pass reads what a pointwise function takes and writes what the products behind it want: its values, in 16 bits or
as e4m3 with one given scale, row-major and, for the products of the backward pass that contract over tokens, also
transposed. So no dense layer can move fewer bytes between its products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FP8 = torch.float8_e4m3fn


@triton.jit
def _write(
    x, plain_ptr, turned_ptr, row, column, rows, columns, mask, inverse, PLAIN: tl.constexpr, TURNED: tl.constexpr
):
    """x [BM, BN] times 1 / scale to (rows, columns) and to its transpose."""
    if PLAIN:
        at = row[:, None] * columns + column[None, :]
        tl.store(plain_ptr + at, (x * inverse).to(plain_ptr.dtype.element_ty), mask=mask)
    if TURNED:
        at = column[None, :] * rows + row[:, None]
        tl.store(turned_ptr + at, (x * inverse).to(turned_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    x_ptr, plain_ptr, turned_ptr, inverse, rows, columns, stride,
    KIND: tl.constexpr, PLAIN: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """KIND 0: x itself; 1: relu(x)^2; 2: silu(x) times what lies `columns` further right."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = x_ptr + row[:, None] * stride + column[None, :]
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
    if KIND == 1:
        x = tl.maximum(x, 0.0)
        x = x * x
    if KIND == 2:
        x = x * tl.sigmoid(x) * tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)
    _write(x, plain_ptr, turned_ptr, row, column, rows, columns, mask, inverse, PLAIN, TURNED)


@triton.jit
def _backward(
    y_ptr, dh_ptr, h_turned_ptr, plain_ptr, turned_ptr, h_inverse, inverse, rows, columns,
    KIND: tl.constexpr, H: tl.constexpr, TURNED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gradient of what `_forward` computes (KIND 1, 2) from that of its result; H: also its result, transposed."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    wide = columns * KIND
    at = y_ptr + row[:, None] * wide + column[None, :]
    y = tl.load(at, mask=mask, other=0.0).to(tl.float32)  # [BM, BN]
    dh = tl.load(dh_ptr + row[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if KIND == 1:
        r = tl.maximum(y, 0.0)
        h, dy = r * r, 2 * r * dh
    else:
        up = tl.load(at + columns, mask=mask, other=0.0).to(tl.float32)
        s = tl.sigmoid(y)
        silu = y * s
        h, dy = silu * up, dh * up * (s + silu * (1 - s))
        second = column + columns
        _write(dh * silu, plain_ptr, turned_ptr, row, second, rows, wide, mask, inverse, True, TURNED)
    _write(dy, plain_ptr, turned_ptr, row, column, rows, wide, mask, inverse, True, TURNED)
    if H:
        _write(h, h_turned_ptr, h_turned_ptr, row, column, rows, columns, mask, h_inverse, False, True)


KINDS = {"copy": 0, "relu2": 1, "swiglu": 2}
TILE = {"BM": 64, "BN": 64, "num_warps": 8}


def pointwise(
    x: Tensor, kind: str, dtype: torch.dtype, scale: float = 1.0, *, plain: bool = True, turned: bool = False
) -> tuple[Tensor, Tensor]:
    """f(x) / scale in dtype, row-major (M, N) and transposed (N, M); what is not asked for is empty."""
    rows, columns = x.shape[0], x.shape[1] // (2 if kind == "swiglu" else 1)
    out = x.new_empty((rows, columns) if plain else 0, dtype=dtype)
    other = x.new_empty((columns, rows) if turned else 0, dtype=dtype)
    wide = 1 if turned else 4  # nothing is transposed: longer rows
    grid = triton.cdiv(rows, TILE["BM"] // wide), triton.cdiv(columns, TILE["BN"] * wide)
    _forward[grid](
        x, out, other, 1 / scale, rows, columns, x.stride(0), KIND=KINDS[kind], PLAIN=plain, TURNED=turned,
        BM=TILE["BM"] // wide, BN=TILE["BN"] * wide, num_warps=8,
    )  # fmt: skip
    return out, other


def pointwise_backward(
    y: Tensor, dh: Tensor, kind: str, dtype: torch.dtype, h_scale: float = 1.0, scale: float = 1.0, *, turned: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h^T (N, M) / h_scale and dy / scale, row-major and transposed; without turned only dy, the others empty."""
    rows, columns = dh.shape
    plain = y.new_empty(y.shape, dtype=dtype)
    h_turned = y.new_empty((columns, rows) if turned else 0, dtype=dtype)
    dy_turned = y.new_empty((y.shape[1], rows) if turned else 0, dtype=dtype)
    grid = triton.cdiv(rows, TILE["BM"]), triton.cdiv(columns, TILE["BN"])
    _backward[grid](
        y, dh, h_turned, plain, dy_turned, 1 / h_scale, 1 / scale, rows, columns, KIND=KINDS[kind], H=turned,
        TURNED=turned, **TILE,
    )  # fmt: skip
    return h_turned, plain, dy_turned


@triton.jit
def _relu2_rows(y_ptr, out_ptr, scale_ptr, columns, BN: tl.constexpr):
    """One row of relu(y)^2 to e4m3 with its own scale, a power of two: the row is read twice, then from the cache."""
    row = tl.program_id(0).to(tl.int64)
    y_ptr += row * columns
    offset = tl.arange(0, BN)
    top = tl.zeros([BN], tl.float32)
    for start in range(0, columns, BN):
        top = tl.maximum(top, tl.load(y_ptr + start + offset, mask=start + offset < columns, other=0.0).to(tl.float32))
    top = tl.max(top, 0)
    bits = (top * top).to(tl.int32, bitcast=True)
    biased = tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    biased = tl.where(bits == 0, 127, biased)
    tl.store(scale_ptr + row, (biased << 23).to(tl.float32, bitcast=True))
    inverse = ((254 - biased) << 23).to(tl.float32, bitcast=True)
    for start in range(0, columns, BN):
        mask = start + offset < columns
        y = tl.maximum(tl.load(y_ptr + start + offset, mask=mask, other=0.0).to(tl.float32), 0.0)
        tl.store(out_ptr + row * columns + start + offset, (y * y * inverse).to(out_ptr.dtype.element_ty), mask=mask)


def relu2_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """relu(y)^2 (M, N) as e4m3 and its scales (M,)."""
    out, scale = torch.empty_like(y, dtype=FP8), y.new_empty(len(y), dtype=torch.float32)
    _relu2_rows[(len(y),)](y, out, scale, y.shape[1], BN=min(4096, triton.next_power_of_2(y.shape[1])), num_warps=8)
    return out, scale
