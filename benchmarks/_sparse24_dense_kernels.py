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
    x, plain_ptr, turned_ptr, row, column, rows, columns, mask, inverse, again,
    PLAIN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """x [BM, BN] times 1 / scale to (rows, columns) and to its transpose.

    again: 1 / scale once more, so that each store has a cast of its own. Of one cast stored both ways, ptxas 12 makes
    a transposed store with bytes that nobody wrote, NaN among them (triton-lang/triton issue 11111).
    """
    if PLAIN:
        at = row[:, None] * columns + column[None, :]
        tl.store(plain_ptr + at, (x * inverse).to(plain_ptr.dtype.element_ty), mask=mask)
    if TURNED:
        at = column[None, :] * rows + row[:, None]
        tl.store(turned_ptr + at, (x * again).to(turned_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    x_ptr, plain_ptr, turned_ptr, inverse, again, rows, columns, stride,
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
    _write(x, plain_ptr, turned_ptr, row, column, rows, columns, mask, inverse, again, PLAIN, TURNED)


@triton.jit
def _backward(
    y_ptr, dh_ptr, h_turned_ptr, plain_ptr, turned_ptr, h_inverse, inverse, again, rows, columns,
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
        _write(dh * silu, plain_ptr, turned_ptr, row, second, rows, wide, mask, inverse, again, True, TURNED)
    _write(dy, plain_ptr, turned_ptr, row, column, rows, wide, mask, inverse, again, True, TURNED)
    if H:
        _write(h, h_turned_ptr, h_turned_ptr, row, column, rows, columns, mask, h_inverse, h_inverse, False, True)


KINDS = {"copy": 0, "relu2": 1, "swiglu": 2}
TILE = {"BM": 64, "BN": 64, "num_warps": 8}
BACKWARD_TILE = {"BM": 128, "BN": 64, "num_warps": 8}


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
        x, out, other, 1 / scale, 1 / scale, rows, columns, x.stride(0), KIND=KINDS[kind], PLAIN=plain, TURNED=turned,
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
    grid = triton.cdiv(rows, BACKWARD_TILE["BM"]), triton.cdiv(columns, BACKWARD_TILE["BN"])
    _backward[grid](
        y, dh, h_turned, plain, dy_turned, 1 / h_scale, 1 / scale, 1 / scale, rows, columns, KIND=KINDS[kind],
        H=turned, TURNED=turned, **BACKWARD_TILE,
    )  # fmt: skip
    return h_turned, plain, dy_turned


@triton.jit
def _power_of_two(bits):
    """The smallest power of two s with x / s <= 448 for the float32 x >= 0 of these bits, 1 for 0; and 1 / s."""
    biased = tl.maximum((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    biased = tl.where(bits == 0, 127, biased)
    return (biased << 23).to(tl.float32, bitcast=True), ((254 - biased) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _relu2_rows(
    y_ptr, h_ptr, h_scale_ptr, out_ptr, scale_ptr, columns: tl.constexpr, BACKWARD: tl.constexpr, BN: tl.constexpr
):
    """One row of relu(y)^2, or BACKWARD of 2 sqrt(h) y with y the gradient of h, to e4m3 with its own scale.

    The row is read once and waits in registers.
    """
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BN)
    loaded = ()
    for i in tl.static_range((columns + BN - 1) // BN):  # all loads before the first store
        at, mask = row * columns + i * BN + offset, offset < columns - i * BN
        y = tl.load(y_ptr + at, mask=mask, other=0.0)
        h = tl.load(h_ptr + at, mask=mask, other=0.0) if BACKWARD else y
        loaded = loaded + ((y, h),)  # noqa: RUF005
    h_scale = tl.load(h_scale_ptr + row) if BACKWARD else 1.0
    top = tl.zeros([BN], tl.float32)
    values = ()
    for i in tl.static_range((columns + BN - 1) // BN):
        y = loaded[i][0].to(tl.float32)
        if BACKWARD:
            x = 2 * tl.sqrt(loaded[i][1].to(tl.float32) * h_scale) * y
        else:
            y = tl.maximum(y, 0.0)
            x = y * y
        top = tl.maximum(top, tl.abs(x))
        values = values + (x if BACKWARD else loaded[i][0],)  # noqa: RUF005
    scale, inverse = _power_of_two(tl.max(top, 0).to(tl.int32, bitcast=True))
    tl.store(scale_ptr + row, scale)
    for i in tl.static_range((columns + BN - 1) // BN):
        x = values[i].to(tl.float32)
        if not BACKWARD:
            x = tl.maximum(x, 0.0)
            x = x * x
        out = out_ptr + row * columns + i * BN + offset
        tl.store(out, (x * inverse).to(out_ptr.dtype.element_ty), mask=offset < columns - i * BN)


def _rows(y: Tensor, h: Tensor | None, h_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    out, scale = torch.empty_like(y, dtype=FP8), y.new_empty(len(y), dtype=torch.float32)
    block = min(4096, triton.next_power_of_2(y.shape[1]))
    _relu2_rows[(len(y),)](
        y, h, h_scale, out, scale, columns=y.shape[1], BACKWARD=h is not None, BN=block, num_warps=max(1, block // 256)
    )
    return out, scale


def relu2_rows(y: Tensor) -> tuple[Tensor, Tensor]:
    """relu(y)^2 (M, N) as e4m3 and its scales (M,)."""
    return _rows(y, None, None)


def relu2_backward_rows(dh: Tensor, h: Tensor, h_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of y, 2 relu(y) dh = 2 sqrt(h) dh (M, N), as e4m3 and its scales (M,)."""
    return _rows(dh, h, h_scale)


@triton.jit
def _largest(x_ptr, scale_ptr, bits_ptr, rows, columns, SCALED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """bits (columns,), of float32, are raised to the largest magnitude of each column; a thread has eight of them."""
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    top = tl.zeros([BN], tl.float32)
    for i in range(0, BM, 8):
        for j in tl.static_range(8):
            row = (tl.program_id(1) * BM + i + j).to(tl.int64)
            x = tl.load(x_ptr + row * columns + column, mask=(row < rows) & (column < columns), other=0.0)
            x = tl.abs(x.to(tl.float32))
            if SCALED:
                x = x * tl.load(scale_ptr + row, mask=row < rows, other=0.0)
            top = tl.maximum(top, x)
    tl.atomic_max(bits_ptr + column, top.to(tl.int32, bitcast=True), mask=column < columns, sem="relaxed")


def largest_of_columns(x: Tensor, scale: Tensor | None) -> Tensor:
    """Bits (N,) of the largest magnitude of each column of x (M, N), times the scales of its rows (M,)."""
    bits = torch.zeros(x.shape[1], dtype=torch.int32, device=x.device)
    grid = triton.cdiv(x.shape[1], 1024), triton.cdiv(len(x), 64)
    _largest[grid](x, scale, bits, *x.shape, SCALED=scale is not None, BM=64, BN=1024, num_warps=4)
    return bits


@triton.jit
def _scale(bits_ptr, scale_ptr, count, BN: tl.constexpr):
    offset = tl.arange(0, BN)
    scale, _ = _power_of_two(tl.max(tl.load(bits_ptr + offset, mask=offset < count, other=0), 0))
    tl.store(scale_ptr, scale)


def scale_of(x: Tensor) -> Tensor:
    """The scale () of the whole of x (M, N), by one pass over it."""
    bits, scale = largest_of_columns(x, None), x.new_empty((), dtype=torch.float32)
    _scale[(1,)](bits, scale, len(bits), BN=triton.next_power_of_2(len(bits)), num_warps=8)
    return scale


@triton.jit
def _turn(
    x_ptr, scale_ptr, bits_ptr, out_ptr, out_scale_ptr, rows, columns,
    SCALED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x (rows, columns), times scales of its rows, to e4m3 (columns, rows) with scales of its columns."""
    row, column = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None].to(tl.int64) * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        x = x * tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    scale, inverse = _power_of_two(tl.load(bits_ptr + column, mask=column < columns, other=0))
    tl.store(out_scale_ptr + column, scale, mask=(column < columns) & (tl.program_id(0) == 0))
    out = tl.trans((x * inverse[None, :]).to(out_ptr.dtype.element_ty))
    at = out_ptr + column[:, None].to(tl.int64) * rows + row[None, :]
    tl.store(at, out, mask=(column < columns)[:, None] & (row < rows)[None, :])


def turn_rows(x: Tensor, scale: Tensor | None, bits: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, N), times the scales of its rows, as e4m3 (N, M) and scales of these rows (N,)."""
    out, out_scale = x.new_empty(x.shape[::-1], dtype=FP8), x.new_empty(x.shape[1], dtype=torch.float32)
    grid = triton.cdiv(len(x), 128), triton.cdiv(x.shape[1], 64)
    _turn[grid](x, scale, bits, out, out_scale, *x.shape, SCALED=scale is not None, BM=128, BN=64, num_warps=4)
    return out, out_scale
