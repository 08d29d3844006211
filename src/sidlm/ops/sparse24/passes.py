"""The forward and the backward pass, over the steps of an implementation (arXiv 2503.16672).

Two states: sparse (``on``), and dense, which is the form without sparsity and that of the warm-up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.recipe import Recipe, Split, threshold, token_order
from sidlm.ops.sparse24.steps import Left, Steps


class Kept(NamedTuple):
    """What the backward pass reads besides the arguments, None where it needs nothing."""

    act: Packed | None = None
    """relu(y1)^2 (T, F), where 2:4 sparsity keeps it"""
    counts: Tensor | None = None
    """int32 (F,): tokens at which a feature is active"""
    y1: Tensor | None = None
    """(T, F) in dtype: only without sparsity, or with reuse_mask=False"""


def keeps_y1(recipe: Recipe) -> bool:
    return not (recipe.sparse and recipe.reuse_mask)


def unwritten_act(steps: Steps, x: Tensor, w_up: Tensor, recipe: Recipe) -> tuple[Packed, Tensor]:
    """`Kept.act` and `Kept.counts` for x (T, d) and w_up (F, d), with memory that is not written."""
    act = steps.empty_packed(len(x), len(w_up), x.dtype, x.device, recipe.fp8)
    return act, x.new_empty(len(w_up), dtype=torch.int32)


def forward(
    steps: Steps, x: Tensor, w_up: Tensor, w_down: Tensor, on: bool, keep: bool, measure: bool, recipe: Recipe
) -> tuple[Tensor, Kept, Tensor]:
    """out (T, d_out); what is kept, of the same shapes in both states, nothing unless keep; statistics float32 (5,).

    The statistics are NaN unless measure, and where they are not known yet.
    """
    shares = x.new_full((5,), torch.nan, dtype=torch.float32)
    if on and not measure and recipe.reuse_mask and steps.pack_up is not None:
        found = steps.pack_up(x, w_up, recipe.fp8, keep)
        if found is not None:
            act, counts = found
            out = steps.sparse_matmul(act, w_down, recipe.fp8)
            return out, Kept(act, counts) if keep else Kept(), shares
    y1 = steps.dense_matmul(x, w_up, recipe.fp8)  # (T, F)
    kept = Kept(y1=y1 if keep and keeps_y1(recipe) else None)
    if on:
        act, counts, totals = steps.pack_activation(y1, recipe.fp8, keep, measure)
        del y1
        out = steps.sparse_matmul(act, w_down, recipe.fp8)
        least = threshold(counts, recipe.dense_features) if measure else None
        if least is not None:
            shares[4] = least / len(x)
        kept = kept._replace(act=act, counts=counts) if keep else kept
    else:
        totals = (y1 > 0).sum().expand(2) if measure else None
        # in half precision, too, each of the two rounds once, like their float32 form
        y2 = (y1.relu_() if kept.y1 is None else y1.relu()).square_()
        out = steps.dense_matmul(y2, w_down, recipe.fp8)
        if keep and recipe.sparse:
            act, counts = unwritten_act(steps, x, w_up, recipe)
            kept = kept._replace(act=act, counts=counts)
    if measure and totals is not None:
        shares[0] = 1 - totals[0] / (len(x) * len(w_up))
        shares[1] = _dropped(totals)
    return out, kept, shares


def backward(
    steps: Steps, g: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, kept: Kept, on: bool, recipe: Recipe
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_up and w_down for that of out, g (T, d_out); float32 (2,), the other two statistics."""
    fp8 = recipe.fp8
    act: Left
    dact: Left
    if on and recipe.reuse_mask:
        assert kept.act is not None
        act = steps.opened(kept.act)
        dact = steps.pack_gradient(steps.dense_matmul(g, w_down.T, fp8), act, fp8)
        dx = steps.sparse_matmul(dact, w_up.T, fp8)
    else:
        act, dact = _dense_gradients(steps, g, x, w_up, w_down, kept.y1, fp8)
        dx = steps.dense_matmul(dact, w_up.T, fp8)
    if not on:
        dw_up, dw_down = steps.dense_matmul(dact.T, x.T, fp8), steps.dense_matmul(g.T, act.T, fp8)
        return dx, dw_up, dw_down, x.new_zeros(2, dtype=torch.float32)
    exact = steps.exact_gradients(act, dact, g, x, fp8)
    if exact is not None:
        return dx, *exact, x.new_zeros(2, dtype=torch.float32)
    assert kept.counts is not None
    counts = steps.counted(act, kept.counts)
    features = steps.split(counts, recipe.dense_features, len(x))
    dw_down, of_act = _weight_gradient(steps, act, g, "value", features, True, recipe)
    dw_up, of_dact = _weight_gradient(steps, dact, x, "magnitude", features, False, recipe)
    return dx, dw_up, dw_down, _dropped(torch.stack((of_act, of_dact), 1))


def _dense_gradients(
    steps: Steps, g: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, y1: Tensor | None, fp8: bool
) -> tuple[Tensor, Tensor]:
    """relu(y1)^2 and the gradient of y1, each (T, F) in dtype; y1 is computed again if it is None."""
    r = steps.dense_matmul(x, w_up, fp8).relu_() if y1 is None else y1.relu()
    act = r.square()
    return act, steps.dense_matmul(g, w_down.T, fp8).mul_(r.mul_(2))


def _weight_gradient(
    steps: Steps, left: Left, right: Tensor, by: str, features: Split, turned: bool, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """left.T @ right (F, n), or turned (n, F), left (T, F) made 2:4 sparse along tokens but for the dense features.

    Also totals (2,): non-zeros of the sparse features, and how many of them are kept.
    """
    sparse, dense, _ = features
    perm = token_order(len(right), right.device, recipe.permute_tokens)
    whole = steps.weight_gradient(left, right, by, features, perm, turned, recipe.fp8)
    if whole is not None:
        return whole
    shape = len(sparse) + len(dense), right.shape[1]
    gradient = right.new_empty(shape[::-1] if turned else shape)
    length = -(-len(right) // steps.token_multiple) * steps.token_multiple
    b = steps.transpose_rows(right, perm, length, recipe.fp8)  # (n, T')
    totals, parts = torch.zeros(2, dtype=torch.int32, device=right.device), []
    if len(sparse):
        packed, totals = steps.transpose_pack(left, sparse, perm, length, by, recipe.fp8)
        parts.append((sparse, packed))
    if len(dense):
        parts.append((dense, steps.transpose_dense(left, dense, perm, length, recipe.fp8)))
    if parts:
        steps.products_into(gradient.T if turned else gradient, parts, b, recipe.fp8)
    return gradient, totals


def _dropped(totals: Tensor) -> Tensor:
    """Share of totals[0] (...) non-zeros that is not among the totals[1] kept: float32 (...), 0 of none."""
    return (totals[0] - totals[1]) / totals[0].clamp_min(1)
