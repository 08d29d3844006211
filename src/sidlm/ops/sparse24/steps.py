"""What an implementation of the squared-ReLU feed-forward function provides: its products and its packing.

`passes.py` makes the forward and the backward pass of them; `eager.py` has them in torch, `gpu.py` as kernels.

An *operand* of a product is a matrix whose last axis is contracted, with any strides: a tensor, which fp8 quantises by
rows first (`quantize_rows`), or what `transpose_rows` and `transpose_dense` return, a pair (values, scale of each row
or None), which is taken as it is. All products accumulate in float32 (float64 for float64). "dtype" is that of x and
the weights, bfloat16 where ``fp8`` is true.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.quantize import FP8
from sidlm.ops.sparse24.recipe import Split, split

Operand = Tensor | tuple[Tensor, Tensor | None]
Left = Any
"""Packed (T, F). For reuse_mask=False eager's functions take a dense matrix too; that is for no other to support."""


def empty_packed(rows: int, columns: int, dtype: torch.dtype, device: torch.device, fp8: bool) -> Packed:
    """What `Steps.pack_activation` returns for y1 (rows, columns) of dtype, with memory that is not written."""
    return Packed(
        torch.empty(rows, columns // 2, dtype=FP8 if fp8 else dtype, device=device),
        torch.empty(rows, columns // 8, dtype=torch.uint8, device=device),
        torch.empty(rows, dtype=torch.float32, device=device) if fp8 else None,
    )


class Steps(NamedTuple):
    """The steps, as functions. Shapes: tokens T, features F, T' (``length``) >= T; integers are int32 but for indices.

    The metadata of a `Packed` is in the implementation's own layout: it goes from one of these functions to another.
    """

    dense_matmul: Callable[[Operand, Operand, bool], Tensor]
    """(a (M, K), b (N, K), fp8) -> a @ b.T (M, N) in dtype"""
    pack_activation: Callable[[Tensor, bool, bool, bool], tuple[Packed, Tensor, Tensor]]
    """(y1 (T, F), which may be overwritten, fp8, keep, measure) -> relu(y1)^2 at the two largest y1 of every four
    features, rounded to dtype or, by rows, to e4m3; int32 counts (F,) of values > 0 as they are in it; int32 totals
    (2,): y1 > 0, and the sum of counts. Of the last two only the shapes matter unless measure, but for the counts, if
    keep, to `counted`"""
    sparse_matmul: Callable[[Packed, Operand, bool], Tensor]
    """(p (M, K), b (N, K), fp8) -> p @ b.T (M, N) in dtype; p is quantised already"""
    pack_gradient: Callable[[Tensor, Packed, bool], Packed]
    """(dy2 (T, F), act (T, F), fp8) -> 2 sqrt(act) dy2 where act has its values, with act's metadata, rounded to dtype
    or, by rows, to e4m3"""
    transpose_pack: Callable[[Left, Tensor, Tensor, int, str, bool], tuple[Packed, Tensor]]
    """(p (T, F), features int64 (n,), perm int64 (T,), length, by, fp8) -> p[perm][:, features].T with zeros up to
    length, of it the two largest of every four tokens by "value" or "magnitude": (n, T'), in fp8 with a scale for each
    feature; int32 totals (2,): the non-zeros, and how many of them the selection keeps"""
    transpose_dense: Callable[[Left, Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]
    """(p (T, F), features (n,), perm (T,), length, fp8) -> the same with all non-zeros (n, T'), scale (n,) or None"""
    transpose_rows: Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor | None]]
    """(x (T, d), perm (T,), length, fp8) -> x[perm].T with zeros up to length (d, T'), and scale (d,) or None"""
    products_into: Callable[[Tensor, list[tuple[Tensor, Any]], Operand, bool], None]
    """(into (F, n) with any strides, [(rows int64 (m,), left), ..], b (n, K), fp8) -> into[rows] = left @ b.T for each
    part, where left is a Packed (m, K) or an operand (m, K); together the parts have each row of into once"""
    token_multiple: int = 8
    """length is T rounded up to a multiple of this, itself one of 8"""
    empty_packed: Callable[[int, int, torch.dtype, torch.device, bool], Packed] = empty_packed
    """(T, F, dtype, device, fp8) -> a Packed with the shapes, strides and dtypes of `pack_activation`'s, not written"""
    form: Callable[[torch.device, torch.dtype, bool], str] = lambda *_: ""
    """(device, dtype, fp8) -> in words, all that `empty_packed` decides by besides its arguments"""
    opened: Callable[[Packed], Any] = lambda act: act
    """What `pack_activation` made, as the other functions take it too, for less: the backward pass uses it thrice"""
    counted: Callable[[Any, Tensor], Tensor] = lambda act, counts: counts
    """(act as `opened` returns it, counts (F,) of `pack_activation` with keep) -> counts"""
    split: Callable[[Tensor, float, int], Split] = lambda counts, share, tokens: split(counts, share)
    """(counts int32 (F,), share, T) -> `recipe.split`"""
    weight_gradient: Callable[[Left, Tensor, str, Split, Tensor, bool, bool], tuple[Tensor, Tensor] | None] = (
        lambda *_: None
    )
    """(left (T, F), right (T, n), by, split, perm int64 (T,), turned, fp8) -> left.T @ right, or turned
    right.T @ left, with left made 2:4 sparse along tokens but for the dense features; and totals as of
    `transpose_pack`. None where that is better done by the functions above"""
    exact_gradients: Callable[[Any, Any, Tensor, Tensor, bool], tuple[Tensor, Tensor] | None] = lambda *_: None
    """(act as `opened` returns it, dact (T, F), g (T, d_out), x (T, d), fp8) -> gradients of w_up and w_down of which
    no selection along tokens drops anything, where that is faster; else None"""
    pack_up: Callable[[Tensor, Tensor, bool, bool], tuple[Packed, Tensor] | None] | None = None
    """(x (T, d), w_up (F, d), fp8, count) -> act and counts of `pack_activation` of their product, counts not written
    unless count is true; None where the two steps are to be taken"""
