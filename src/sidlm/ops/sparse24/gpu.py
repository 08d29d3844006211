"""The steps by Triton kernels and the products of this machine's libraries (backends.py).

The kernels have metadata in the plain order. A backend may read another, and cuSPARSELt reads it right behind the
values, in one piece of memory. So values are written to the head of such a piece, and the metadata, reordered, to its
tail: an eighth of a byte an element read and written once more for each product.

Where sparse products do not pay, nothing is packed: activations stay whole matrices, with the same zeros in them, and
the gradients of the weights are exact. Of the latter, for which a packed matrix is transposed and packed anew, products
are dense for more sizes.
"""

import functools
import os
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from sidlm.ops.sparse24 import (
    backends,
    crossover,
    cusparselt,
    hopper_product,
    quantize,
    triton_features,
    triton_gradient,
    triton_masked,
    triton_pack,
    triton_split,
    triton_thin,
    triton_transpose,
)
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.products import Product, dense_product, dense_values
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.recipe import Split, token_order
from sidlm.ops.sparse24.steps import Operand, Steps
from sidlm.ops.sparse24.triton_quantize import quantize_rows
from sidlm.ops.sparse24.triton_relayout import relayout, restored
from sidlm.ops.sparse24.triton_rescale import place, rescaled

TOKENS = 128
"""Tokens are padded to a multiple of it: rows of a tensor core's tile, and columns of one when transposed."""
FEATURES = 64
"""Where features are no multiple of it, products are dense and nothing is packed."""
FP8_MULTIPLE = 16
"""Bytes of a row of an operand in e4m3 are a multiple of it."""


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
    count: bool = True
    """Whether its features are counted when their scales are looked for"""

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
    def of_features(self) -> tuple[Tensor | None, Tensor | None]:
        """int32 (F,): counts, and largest magnitudes, for scales of columns; none where rows have no scale."""
        return (None, None) if self.scale is None else triton_features.of_features(self.for_kernels, count=self.count)

    layout = "plain"
    """Of `for_kernels`"""


@dataclass(frozen=True)
class Whole:
    """A matrix (T, F) that is not packed, with the zeros that it would have."""

    values: Tensor
    """(T, F)"""
    scale: Tensor | None
    """float32 (T,)"""

    @property
    def for_kernels(self) -> Packed:
        """With no metadata."""
        return Packed(self.values, self.values.new_empty(0, 0, dtype=torch.uint8), self.scale)


def _layout(backend: str, dtype: torch.dtype) -> str:
    return backends.BACKENDS[backend].layouts[dtype.itemsize]


def _up(tokens: int) -> int:
    return (tokens + TOKENS - 1) // TOKENS * TOKENS


@functools.lru_cache(maxsize=64)
def _preferred(device: torch.device, dtype: torch.dtype, features: int, asked: str) -> tuple[str, crossover.Crossover]:
    """The backend where there are tokens enough, and how many that is."""
    with unset_fake_temporarily():  # a backend is tried when first asked for
        name = backends.choose(device, dtype, 1 << 40, features)
    fp8 = dtype == FP8
    if f"sparse24_product{'_fp8' if fp8 else ''}={name}" in asked.replace(" ", "").split(","):
        return name, crossover.Crossover(asked, fp8, features, 0, 0, 0, 0)
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name, crossover.nearest(model, fp8, features)


def _asked(dtype: torch.dtype, device: torch.device, features: int) -> tuple[str, crossover.Crossover]:
    return _preferred(device, dtype, features, os.environ.get("SID_IMPL", ""))


def _backend(dtype: torch.dtype, device: torch.device, tokens: int, features: int, keep: bool) -> str:
    """For activations and their gradients; "dense": nothing is packed. It may be asked about tensors that are fake."""
    if features % FEATURES:
        return "dense"
    name, enough = _asked(dtype, device, features)
    return name if name != "dense" and tokens >= (enough.tokens if keep else enough.inference) else "dense"


def _transposes(dtype: torch.dtype, device: torch.device, tokens: int, features: int) -> bool:
    """Whether packed activations are transposed for the gradients of weights."""
    return tokens >= _asked(dtype, device, features)[1].weights


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
    dtype, scale = FP8 if fp8 else dtype, torch.empty(tokens, dtype=torch.float32, device=device) if fp8 else None
    if _backend(dtype, device, tokens, features, True) == "dense":
        metadata = torch.empty(0, 0, dtype=torch.uint8, device=device)
        return Packed(torch.empty(tokens, features, dtype=dtype, device=device), metadata, scale)
    columns = features // 2 + features // 8 // dtype.itemsize
    values = torch.empty(_up(tokens), columns, dtype=dtype, device=device)
    return Packed(values, torch.empty(tokens, 0, dtype=torch.uint8, device=device), scale)


def form(device: torch.device, dtype: torch.dtype, fp8: bool) -> str:
    """The backend, and from how many tokens on, by features, activations are packed for it."""
    name, enough = _asked(FP8 if fp8 else dtype, device, 1 << 40)
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    always = "" if enough.tokens else ", always"  # for SID_IMPL names it
    return f"{name}{always}; tokens by features {crossover.steps(model, fp8)}"


def closed(x: Laid | Whole) -> Packed:
    """What can leave an operator, where no two tensors share memory: values (M, K / 2 + K / 8 / itemsize), the piece.

    Its metadata is (T, 0), which says T; of what is not packed (0, 0).
    """
    if isinstance(x, Whole):
        return x.for_kernels
    return Packed(cusparselt.blob(x.for_backend), x.tiled.new_empty(x.rows, 0), x.scale)


def opened(p: Packed | Laid | Whole) -> Laid | Whole:
    """The inverse of `closed`."""
    if not isinstance(p, Packed):
        return p
    tokens = len(p.metadata)
    if not tokens:
        return Whole(p.values, p.scale)
    rows, size = len(p.values), p.values.itemsize
    features = p.values.shape[1] * 8 * size // (4 * size + 1)
    values, tiled = p.values.view(-1).split([rows * features // 2, rows * features // 8 // size])
    tiled = tiled.view(torch.uint8).view(rows, -1)
    backend, _ = _asked(p.values.dtype, p.values.device, features)
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


def _product(left: Laid | Whole, b: Operand, fp8: bool) -> Product:
    b, b_scale = _operand(b, fp8)
    if isinstance(left, Whole):
        return Product(dense_product(left.values, left.scale, b, b_scale))
    backend, product = backends.BACKENDS[left.backend], None
    if len(b) % backend.multiples[2] == 0:
        product = backend.multiply(left.for_backend, b, b_scale)
    if product is None:
        product = Product(dense_product(dense_values(left.for_kernels), left.scale, b, b_scale))
    return product._replace(values=product.values[: left.rows])


def sparse_matmul(p: Packed | Laid | Whole, b: Operand, fp8: bool) -> Tensor:
    return rescaled(_product(opened(p), b, fp8))


def products_into(into: Tensor, parts: list[tuple[Tensor, Laid | Operand]], b: Operand, fp8: bool) -> None:
    """Both parts in one pass, because rows of a transposed matrix share sectors of memory with their neighbours."""
    rows = torch.cat([rows for rows, _ in parts])
    source = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    source[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    b = _operand(b, fp8)
    first, *others = (
        _product(left, b, fp8) if isinstance(left, Laid) else Product(few_rows(left, b, fp8)) for _, left in parts
    )
    place(into, source, first, torch.cat([rescaled(x) for x in others]) if others else None)


def few_rows(a: Operand, b: Operand, fp8: bool) -> Tensor:
    """`dense_matmul` where a has few rows."""
    (a, a_scale), (b, b_scale) = _operand(a, fp8), _operand(b, fp8)
    if a_scale is not None and b_scale is not None and hopper_product.takes_few_rows(a, b):
        return hopper_product.few_rows(a, a_scale, b, b_scale)
    return dense_product(a, a_scale, b, b_scale)


def pack_activation(y1: Tensor, fp8: bool, keep: bool = True, measure: bool = True) -> tuple[Packed, Tensor, Tensor]:
    """In fp8 counts cost a pass of their own: they are left to `counted`, unless measured."""
    (tokens, features), dtype = y1.shape, FP8 if fp8 else y1.dtype
    backend = _backend(dtype, y1.device, tokens, features, keep)
    if backend == "dense":
        values, scale, counts, totals = triton_masked.activation(y1.contiguous(), fp8, measure)
        whole = Whole(values, scale)
        if fp8 and measure:
            counts, _ = triton_features.of_features(whole.for_kernels, None, top=False)
            assert counts is not None
            torch.sum(counts, 0, dtype=torch.int32, out=totals[1])
        return closed(whole), counts, totals
    count = measure or (keep and not fp8)
    values, tiled = _piece(_up(tokens), features, dtype, y1.device)
    metadata = _in_place(tiled, tokens, backend, dtype)
    packed, counts, totals = triton_pack.pack_activation(
        y1, fp8, values=values[:tokens], metadata=metadata, count=count
    )
    return closed(_lay(values, tiled, packed, backend)), counts, totals


def counted(act: Laid, counts: Tensor) -> Tensor:
    """In fp8 the pass that finds the scales of features counts, too."""
    found, _ = act.of_features
    return counts if found is None else found


def pack_gradient(dy2: Tensor, act: Packed | Laid | Whole, fp8: bool) -> Laid | Whole:
    act = opened(act)
    if isinstance(act, Whole):
        return Whole(*triton_masked.gradient(dy2.contiguous(), act.values, act.scale))
    values, tiled = _piece(len(act.values), 2 * act.values.shape[1], FP8 if fp8 else dy2.dtype, dy2.device)
    packed = triton_gradient.pack_gradient(dy2, act.for_kernels, fp8, values=values[: len(dy2)])
    if packed.metadata.data_ptr() == act.tiled.data_ptr():  # as the backend reads it
        tiled = act.tiled
    return replace(_lay(values, tiled, packed, act.backend), count=False)


def transpose_pack(p: Laid, features: Tensor, perm: Tensor, length: int, by: str, fp8: bool) -> tuple[Laid, Tensor]:
    values, tiled = _piece(len(features), length, p.values.dtype, p.values.device)
    metadata = _in_place(tiled, len(features), p.backend, values.dtype)
    packed, totals = triton_transpose.transpose_pack(
        p.for_kernels, features, perm, length, by, fp8, bits=p.of_features[1], values=values, metadata=metadata
    )
    return _lay(values, tiled, packed, p.backend), totals


def transpose_dense(p: Laid, features: Tensor, perm: Tensor, length: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    return triton_transpose.transpose_dense(p.for_kernels, features, perm, length, fp8, bits=p.of_features[1])


def exact_gradients(
    act: Laid | Whole, dact: Laid | Whole, g: Tensor, x: Tensor, fp8: bool
) -> tuple[Tensor, Tensor] | None:
    """Where nothing is packed: for a selection along tokens, too, there is no use then."""
    if isinstance(act, Laid):
        return None
    assert isinstance(dact, Whole)
    if not fp8:
        return dense_product(dact.values.T, None, x.T, None), dense_product(g.T, None, act.values.T, None)
    act_turned, dact_turned = (_turned(left.values, left.scale, _turns(x.device)) for left in (act, dact))
    g_turned, x_turned = _turned(g), _turned(x)
    return dense_matmul(dact_turned, x_turned, True), dense_matmul(g_turned, act_turned, True)


def _turned(x: Tensor, scale: Tensor | None = None, at_once: bool = True) -> Operand:
    """x (T, n), or in e4m3 with a scale (T,), as e4m3 (n, T') with scales of its rows; at_once: no step between."""
    order, length = token_order(len(x), x.device, False), -(-len(x) // FP8_MULTIPLE) * FP8_MULTIPLE
    if scale is None:
        return triton_transpose.transpose_rows(x, order, length, True)
    if not at_once:  # nothing is rounded: scales are powers of two
        return _turned((x.float() * scale[:, None]).bfloat16())
    bits = triton_features.largest_of_features(Whole(x, scale).for_kernels, None)
    return triton_transpose.transpose_rows(x, order, length, True, scale, bits)


@functools.cache
def _turns(device: torch.device) -> bool:
    """Whether the kernel that turns e4m3 is right on a small example: a compiler has mixed up bytes in such a tile."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(0)).to(device)
    values, scale = quantize.quantize_rows(x)
    (mine, mine_scale), want = _turned(values, scale), quantize.quantize_rows((values.float() * scale[:, None]).T)
    assert mine_scale is not None
    return torch.equal(mine.float(), want[0].float()) and torch.equal(mine_scale, want[1])


def weight_gradient(
    left: Laid, right: Tensor, by: str, split: Split, perm: Tensor, turned: bool, fp8: bool
) -> tuple[Tensor, Tensor] | None:
    """By one dense product; None where there are tokens enough for sparse ones."""
    p = left.for_kernels
    if _transposes(p.values.dtype, p.values.device, len(perm), 2 * p.values.shape[1]):
        return None
    assert split.is_dense is not None
    out, scale, totals = triton_thin.thinned(p, split.is_dense, perm, by, left.layout, left.of_features[1])
    if not fp8:  # tokens are where they were
        a, b = (right.T, out.T) if turned else (out.T, right.T)
        return dense_product(a, None, b, None), totals
    a, b = (out, scale), triton_transpose.transpose_rows(right, perm, out.shape[1], True)
    return dense_product(*b, *a) if turned else dense_product(*a, *b), totals


def pack_up(x: Tensor, w_up: Tensor, fp8: bool, count: bool) -> tuple[Packed, Tensor] | None:
    tokens, features = len(x), len(w_up)
    backend = _backend(x.dtype, x.device, tokens, features, count)
    if fp8 or backend == "dense" or not hopper_product.packs(x, w_up):
        return None
    values, tiled = _piece(_up(tokens), features, x.dtype, x.device)
    metadata = _in_place(tiled, tokens, backend, x.dtype)
    packed = Packed(values[:tokens], tiled.new_empty(tokens, features // 8) if metadata is None else metadata)
    hopper_product.packed_product(x, w_up, packed)
    counts, _ = triton_features.of_features(packed, top=False) if count else (None, None)
    counts = tiled.new_empty(features, dtype=torch.int32) if counts is None else counts
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
    form=form,
    products_into=products_into,  # pyright: ignore
    opened=opened,  # pyright: ignore
    counted=counted,  # pyright: ignore
    split=triton_split.split,
    weight_gradient=weight_gradient,  # pyright: ignore
    exact_gradients=exact_gradients,
    pack_up=pack_up,
)


def steps() -> Steps:
    return STEPS
