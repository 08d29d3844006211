"""The definition in dense matrices and masks, gradients included: the oracle of every test. float64 stays float64.

What is e4m3 is here the float32 number that it stands for. Rounding such numbers to e4m3 again changes none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sidlm.ops.sparse24.quantize import quantize_rows
from sidlm.ops.sparse24.recipe import Recipe, dense_count
from sidlm.ops.sparse24.select import select_2to4


def _high(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _stored(x: Tensor, dtype: torch.dtype, fp8: bool) -> Tensor:
    """x (M, K) as an operand of a product: in dtype, or e4m3 with a scale for each row."""
    if not fp8:
        return x.to(dtype)
    values, scale = quantize_rows(x)
    return values.float() * scale[:, None]


def _linear(a: Tensor, w: Tensor, dtype: torch.dtype, fp8: bool) -> Tensor:
    """a (M, K) times w (N, K) transposed: (M, N) in dtype."""
    a, w = (_high(_stored(x, dtype, fp8)) for x in (a, w))
    return (a @ w.T).to(dtype)


def _two_of_four_tokens(x: Tensor, by: str, dense: Tensor, perm: Tensor) -> tuple[Tensor, Tensor]:
    """x (T, F) in which each feature has two non-zeros in every four tokens of perm, but for the dense features (F,).

    Also the share of the other features' non-zeros that this drops.
    """
    columns = F.pad(x[perm].T, (0, -len(perm) % 4))  # (F, T')
    mask = (select_2to4(columns, by=by) | dense[:, None])[:, : len(perm)]
    kept = torch.empty_like(x)
    kept[perm] = columns[:, : len(perm)].masked_fill(~mask, 0).T
    before, after = x[:, ~dense].count_nonzero(), kept[:, ~dense].count_nonzero()
    return kept, (before - after) / before.clamp_min(1)


class _SquaredReLUFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w_up: Tensor, w_down: Tensor, stats: Tensor | None, on: bool, recipe: Recipe):
        dtype, fp8 = x.dtype, recipe.fp8
        with torch.autocast(x.device.type, enabled=False):
            y1 = _linear(x, w_up, dtype, fp8)
            mask = select_2to4(y1) if on else torch.ones_like(y1, dtype=torch.bool)
            act = _stored(_high(y1).relu().square().masked_fill(~mask, 0), dtype, fp8 and on)
            out = _linear(act, w_down, dtype, fp8)
        counts = (act > 0).sum(0)
        dense = torch.zeros_like(counts, dtype=torch.bool)
        dense[counts.argsort(stable=True)[len(counts) - dense_count(len(counts), recipe.dense_features) :]] = True
        positive = (y1 > 0).sum()
        shares = x.new_full((5,), torch.nan, dtype=torch.float32)
        if len(x):
            shares[0] = 1 - positive / y1.numel()
            shares[1] = (positive - counts.sum()) / positive.clamp_min(1) if on else 0
        if len(x) and on and dense.any():
            shares[4] = counts[dense].min() / len(x)
        ctx.save_for_backward(x, w_up, w_down, y1, mask, dense)
        ctx.stats, ctx.on, ctx.recipe = stats, on, recipe
        ctx.mark_non_differentiable(shares)
        return out, shares

    @staticmethod
    def backward(ctx, *grads):
        g, (x, w_up, w_down, y1, mask, dense), recipe = grads[0], ctx.saved_tensors, ctx.recipe
        dtype, fp8 = x.dtype, recipe.fp8
        if ctx.stats is not None:
            ctx.stats[2:4].zero_()
        if not len(x):
            return *(torch.zeros_like(t) for t in (x, w_up, w_down)), None, None, None
        with torch.autocast(x.device.type, enabled=False):
            dy2 = _high(_linear(g, w_down.T, dtype, fp8))
            r = _high(y1).relu()
            if ctx.on and recipe.reuse_mask:
                act = _stored(r.square().masked_fill(~mask, 0), dtype, fp8)
                dact = _stored((2 * _high(act).sqrt() * dy2).masked_fill(~mask, 0), dtype, fp8)
            else:
                act, dact = r.square().to(dtype), (2 * r * dy2).to(dtype)
            dx = _linear(dact, w_up.T, dtype, fp8)
            if ctx.on:
                make = torch.Generator().manual_seed(0)
                perm = torch.randperm(len(x), generator=make) if recipe.permute_tokens else torch.arange(len(x))
                act, of_act = _two_of_four_tokens(act, "value", dense, perm.to(x.device))
                dact, of_dact = _two_of_four_tokens(dact, "magnitude", dense, perm.to(x.device))
                if ctx.stats is not None:
                    ctx.stats[2:4].copy_(torch.stack((of_act, of_dact)))
            dw_up, dw_down = _linear(dact.T, x.T, dtype, fp8), _linear(g.T, act.T, dtype, fp8)
        return dx, dw_up, dw_down, None, None, None


def run(
    x: Tensor, w_up: Tensor, w_down: Tensor, enabled: Tensor | None, stats: Tensor | None, measure: bool, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    """out (..., d_out) and the statistics of the forward pass, float32 (5,); stats gets the others."""
    on = recipe.sparse and (enabled is None or bool(enabled))
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    out, shares = _SquaredReLUFFN.apply(rows, w_up, w_down, stats, on, recipe)
    return out.view(*x.shape[:-1], len(w_down)), shares
