"""The steps in plain torch, for any device and dtype; e4m3 values are multiplied as the float32 they stand for."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sidlm.ops.sparse24.packed import Packed, pack, positions, unpack
from sidlm.ops.sparse24.quantize import quantize_rows
from sidlm.ops.sparse24.select import select_2to4
from sidlm.ops.sparse24.steps import Left, Operand, Steps


def _high(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _operand(x: Operand, fp8: bool) -> tuple[Tensor, Tensor | None]:
    if isinstance(x, tuple):
        return x
    return quantize_rows(x) if fp8 else (x, None)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cpu" and a.dtype.itemsize == 2:  # where half precision need not mean a sum in float32
        return (a.float() @ b.float().T).to(a.dtype)
    return a @ b.T


def dense_matmul(a: Operand, b: Operand, fp8: bool) -> Tensor:
    (a, a_scale), (b, b_scale) = _operand(a, fp8), _operand(b, fp8)
    if a_scale is None or b_scale is None:
        return _product(a, b)
    return (a.float() @ b.float().T).mul_(a_scale[:, None]).mul_(b_scale).bfloat16()


def sparse_matmul(p: Packed, b: Operand, fp8: bool) -> Tensor:
    b, b_scale = _operand(b, fp8)
    if b_scale is None:
        return _product(unpack(p), b)
    return (unpack(p) @ b.float().T).mul_(b_scale).bfloat16()


def _pack(x: Tensor, mask: Tensor, dtype: torch.dtype, fp8: bool) -> Packed:
    """x (M, K) where mask keeps two of every four, the largest of each row among them."""
    packed = pack(x, mask)
    values, scale = quantize_rows(packed.values) if fp8 else (packed.values.to(dtype), None)
    return Packed(values, packed.metadata, scale)


def pack_activation(y1: Tensor, fp8: bool, *_: bool) -> tuple[Packed, Tensor, Tensor]:
    act = _pack(_high(y1).relu().square_(), select_2to4(y1), y1.dtype, fp8)
    counts = (unpack(act) > 0).sum(0, dtype=torch.int32)
    return act, counts, torch.stack(((y1 > 0).sum(), counts.sum())).int()


def pack_gradient(dy2: Tensor, act: Packed, fp8: bool) -> Packed:
    kept = dy2.unflatten(-1, (-1, 4)).gather(-1, positions(act.metadata)).flatten(-2)
    square = _high(act.values) if act.scale is None else act.values.float() * act.scale[:, None]
    values = 2 * square.sqrt() * _high(kept)
    values, scale = quantize_rows(values) if fp8 else (values.to(dy2.dtype), None)
    return Packed(values, act.metadata, scale)


def _columns(p: Left, features: Tensor, perm: Tensor, length: int) -> Tensor:
    """(n, length): columns of p (T, F), their rows in the order of perm, then zeros."""
    dense = unpack(p) if isinstance(p, Packed) else p
    return F.pad(dense[:, features][perm].T, (0, length - len(perm)))


def transpose_pack(p: Left, features: Tensor, perm: Tensor, length: int, by: str, fp8: bool) -> tuple[Packed, Tensor]:
    x = _columns(p, features, perm, length)
    mask = select_2to4(x, by=by)
    totals = torch.stack((x.count_nonzero(), x.masked_fill(~mask, 0).count_nonzero()))
    return _pack(x, mask, x.dtype, fp8), totals.int()


def transpose_dense(p: Left, features: Tensor, perm: Tensor, length: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    return _operand(_columns(p, features, perm, length), fp8)


def transpose_rows(x: Tensor, perm: Tensor, length: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    return _operand(F.pad(x[perm].T, (0, length - len(perm))), fp8)


def products_into(into: Tensor, parts: list[tuple[Tensor, Packed | Operand]], b: Operand, fp8: bool) -> None:
    for rows, left in parts:
        product = sparse_matmul(left, b, fp8) if isinstance(left, Packed) else dense_matmul(left, b, fp8)
        into.index_copy_(0, rows, product)


STEPS = Steps(
    dense_matmul=dense_matmul,
    pack_activation=pack_activation,
    sparse_matmul=sparse_matmul,
    pack_gradient=pack_gradient,
    transpose_pack=transpose_pack,
    transpose_dense=transpose_dense,
    transpose_rows=transpose_rows,
    products_into=products_into,
)


def steps() -> Steps:
    return STEPS
