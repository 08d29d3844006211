"""The steps by Triton kernels and the products of this machine's libraries (backends.py).

The kernels have metadata in the plain order. A backend may read another, and cuSPARSELt reads it right behind the
values, in one piece of memory. So values are written to the head of such a piece, and the metadata, reordered, to its
tail: an eighth of a byte an element read and written once more for each product.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sidlm.ops.sparse24 import (
    backends,
    cusparselt,
    hopper_product,
    triton_features,
    triton_gradient,
    triton_pack,
    triton_transpose,
)
from sidlm.ops.sparse24 import steps as interface
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.products import Product, dense_product, dense_values
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.steps import Operand, Steps
from sidlm.ops.sparse24.triton_quantize import quantize_rows
from sidlm.ops.sparse24.triton_relayout import relayout, restored
from sidlm.ops.sparse24.triton_rescale import place, rescaled

TOKENS = 128
"""Tokens are padded to a multiple of it: rows of a tensor core's tile, and columns of one when transposed."""
FEATURES = 64
"""Where features are no multiple of it, products are dense."""


@dataclass(frozen=True)
class Laid:
    """A packed matrix (T, K), of which M >= T rows are multiplied."""

    values: Tensor
    """(M, K / 2)"""
    tiled: Tensor
    """uint8 (M, K / 8): metadata as the backend reads it, in memory right behind values"""
    scale: Tensor | None
    """float32 (T,)"""
    rows: int
    """T"""
    backend: str
    metadata: Tensor | None = None
    """uint8 (T, K / 8), as the kernels read it, where it is at hand"""

    @cached_property
    def for_kernels(self) -> Packed:
        layout, metadata = _layout(self.backend, self.values.dtype), self.metadata
        metadata = restored(self.tiled, layout, self.rows) if metadata is None else metadata
        return Packed(self.values[: self.rows], metadata, self.scale)

    @property
    def for_backend(self) -> Packed:
        scale, padding = self.scale, len(self.values) - self.rows
        return Packed(self.values, self.tiled, F.pad(scale, (0, padding)) if scale is not None and padding else scale)

    @cached_property
    def largest(self) -> Tensor | None:
        """What the scales of its columns are made of, if its rows have scales."""
        return None if self.scale is None else triton_features.largest_of_features(self.for_kernels)


def _layout(backend: str, dtype: torch.dtype) -> str:
    return backends.BACKENDS[backend].layouts[dtype.itemsize]


def _up(tokens: int) -> int:
    return (tokens + TOKENS - 1) // TOKENS * TOKENS


def _backend(dtype: torch.dtype, device: torch.device, tokens: int, features: int) -> str:
    """For activations, their gradients, and both transposed."""
    return backends.choose(device, dtype, _up(tokens), features) if features % FEATURES == 0 else "dense"


def _piece(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the values (rows, columns / 2) and, behind them, the metadata (rows, columns / 8)."""
    size = rows * columns // 2 * dtype.itemsize
    piece = torch.empty(size + rows * columns // 8, dtype=torch.uint8, device=device)
    return piece[:size].view(dtype).view(rows, -1), piece[size:].view(rows, -1)


def _in_place(tiled: Tensor, rows: int, backend: str, dtype: torch.dtype) -> Tensor | None:
    """Where a kernel can write plain metadata (rows, K / 8) at once, if that is what the backend reads."""
    return tiled[:rows] if _layout(backend, dtype) == "plain" else None


def _lay(values: Tensor, tiled: Tensor, packed: Packed, backend: str) -> Laid:
    """packed, whose values are the first rows of `values`, with its metadata in the backend's order too."""
    if len(packed.values) < len(values):
        values[len(packed.values) :].zero_()
    if packed.metadata.data_ptr() != tiled.data_ptr():
        relayout(packed.metadata, tiled, _layout(backend, values.dtype))
    return Laid(values, tiled, packed.scale, len(packed.values), backend, packed.metadata)


def empty_packed(tokens: int, features: int, dtype: torch.dtype, device: torch.device, fp8: bool) -> Packed:
    """A `closed` activation, not written."""
    if features % FEATURES:
        return interface.empty_packed(tokens, features, dtype, device, fp8)
    dtype, rows = FP8 if fp8 else dtype, _up(tokens)
    return Packed(
        torch.empty(rows, features // 2 + features // 8 // dtype.itemsize, dtype=dtype, device=device),
        torch.empty(tokens, 0, dtype=torch.uint8, device=device),
        torch.empty(tokens, dtype=torch.float32, device=device) if fp8 else None,
    )


def closed(laid: Laid) -> Packed:
    """What can leave an operator, where no two tensors share memory: values (M, K / 2 + K / 8 / itemsize), the piece.

    Its metadata is (T, 0), which says T. The shapes are the same whichever the backend is.
    """
    if 2 * laid.values.shape[1] % FEATURES:
        return laid.for_kernels
    return Packed(cusparselt.blob(laid.for_backend), laid.tiled.new_empty(laid.rows, 0), laid.scale)


def opened(p: Packed | Laid) -> Laid:
    """The inverse of `closed`."""
    if isinstance(p, Laid):
        return p
    tokens = len(p.metadata)
    if p.metadata.shape[1]:
        return Laid(p.values, p.metadata, p.scale, tokens, "dense")
    rows, size = len(p.values), p.values.itemsize
    features = p.values.shape[1] * 8 * size // (4 * size + 1)
    values, tiled = p.values.view(-1).split([rows * features // 2, rows * features // 8 // size])
    tiled = tiled.view(torch.uint8).view(rows, -1)
    backend = _backend(p.values.dtype, p.values.device, tokens, features)
    return Laid(values.view(rows, -1), tiled, p.scale, tokens, backend)


def _operand(x: Operand, fp8: bool) -> tuple[Tensor, Tensor | None]:
    if isinstance(x, tuple):
        return x
    if not fp8:
        return x, None
    if x.stride(-1) == 1:
        return quantize_rows(x)
    columns = torch.arange(x.shape[1], device=x.device)
    return triton_transpose.transpose_rows(x.T, columns, x.shape[1], True)


def dense_matmul(a: Operand, b: Operand, fp8: bool) -> Tensor:
    return dense_product(*_operand(a, fp8), *_operand(b, fp8))


def _product(laid: Laid, b: Operand, fp8: bool) -> Product:
    b, b_scale = _operand(b, fp8)
    backend, product = backends.BACKENDS[laid.backend], None
    if len(b) % backend.multiples[2] == 0:
        product = backend.multiply(laid.for_backend, b, b_scale)
    if product is None:
        product = Product(dense_product(dense_values(laid.for_kernels), laid.scale, b, b_scale))
    return product._replace(values=product.values[: laid.rows])


def sparse_matmul(p: Packed | Laid, b: Operand, fp8: bool) -> Tensor:
    return rescaled(_product(opened(p), b, fp8))


def products_into(into: Tensor, parts: list[tuple[Tensor, Packed | Laid | Operand]], b: Operand, fp8: bool) -> None:
    """Both parts in one pass, because rows of a transposed matrix share sectors of memory with their neighbours."""
    rows = torch.cat([rows for rows, _ in parts])
    source = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    source[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    b = _operand(b, fp8)
    first, *others = (
        _product(opened(left), b, fp8) if isinstance(left, Packed | Laid) else Product(dense_matmul(left, b, fp8))
        for _, left in parts
    )
    place(into, source, first, torch.cat([rescaled(x) for x in others]) if others else None)


def pack_activation(y1: Tensor, fp8: bool) -> tuple[Packed, Tensor, Tensor]:
    (tokens, features), dtype = y1.shape, FP8 if fp8 else y1.dtype
    if features % FEATURES:
        return triton_pack.pack_activation(y1, fp8)
    values, tiled = _piece(_up(tokens), features, dtype, y1.device)
    backend = _backend(dtype, y1.device, tokens, features)
    metadata = _in_place(tiled, tokens, backend, dtype)
    packed, counts, totals = triton_pack.pack_activation(y1, fp8, values=values[:tokens], metadata=metadata)
    return closed(_lay(values, tiled, packed, backend)), counts, totals


def pack_gradient(dy2: Tensor, act: Packed | Laid, fp8: bool) -> Laid:
    act = opened(act)
    values, tiled = _piece(len(act.values), 2 * act.values.shape[1], FP8 if fp8 else dy2.dtype, dy2.device)
    packed = triton_gradient.pack_gradient(dy2, act.for_kernels, fp8, values=values[: len(dy2)])
    if packed.metadata.data_ptr() == act.tiled.data_ptr():  # as the backend reads it
        tiled = act.tiled
    return _lay(values, tiled, packed, act.backend)


def transpose_pack(
    p: Packed | Laid, features: Tensor, perm: Tensor, length: int, by: str, fp8: bool
) -> tuple[Laid, Tensor]:
    p = opened(p)
    values, tiled = _piece(len(features), length, p.values.dtype, p.values.device)
    metadata = _in_place(tiled, len(features), p.backend, values.dtype)
    packed, totals = triton_transpose.transpose_pack(
        p.for_kernels, features, perm, length, by, fp8, bits=p.largest, values=values, metadata=metadata
    )
    return _lay(values, tiled, packed, p.backend), totals


def transpose_dense(
    p: Packed | Laid, features: Tensor, perm: Tensor, length: int, fp8: bool
) -> tuple[Tensor, Tensor | None]:
    p = opened(p)
    return triton_transpose.transpose_dense(p.for_kernels, features, perm, length, fp8, bits=p.largest)


def pack_up(x: Tensor, w_up: Tensor, fp8: bool, count: bool) -> tuple[Packed, Tensor] | None:
    if fp8 or not hopper_product.packs(x, w_up):
        return None
    tokens, features = len(x), len(w_up)
    values, tiled = _piece(_up(tokens), features, x.dtype, x.device)
    backend = _backend(x.dtype, x.device, tokens, features)
    metadata = _in_place(tiled, tokens, backend, x.dtype)
    packed = Packed(values[:tokens], tiled.new_empty(tokens, features // 8) if metadata is None else metadata)
    hopper_product.packed_product(x, w_up, packed)
    counts = triton_features.counts_of_features(packed) if count else tiled.new_empty(features, dtype=torch.int32)
    return closed(_lay(values, tiled, packed, backend)), counts


STEPS = Steps(
    dense_matmul=dense_matmul,
    pack_activation=pack_activation,
    sparse_matmul=sparse_matmul,  # pyright: ignore
    pack_gradient=pack_gradient,  # pyright: ignore
    transpose_pack=transpose_pack,  # pyright: ignore
    transpose_dense=transpose_dense,  # pyright: ignore
    transpose_rows=triton_transpose.transpose_rows,
    token_multiple=TOKENS,
    empty_packed=empty_packed,
    products_into=products_into,  # pyright: ignore
    opened=opened,  # pyright: ignore
    pack_up=pack_up,
)


def steps() -> Steps:
    return STEPS
