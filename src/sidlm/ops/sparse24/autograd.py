"""The function as library operators with their gradient: one node to autograd and to torch.compile.

`enabled` is read while the operators run, and nothing depends on it but what they compute: shapes are the same.
`form` says all that the shapes of what is kept depend on besides the arguments (`Steps.form`). So it is in the graph,
and a cache of compiled graphs, which outlives a process, has another one for another choice of packed or not.
"""

import importlib

import torch
from torch import Tensor

from sidlm import __version__
from sidlm.ops.sparse24 import flops
from sidlm.ops.sparse24.packed import Packed
from sidlm.ops.sparse24.passes import Kept, backward, forward, keeps_y1, unwritten_act
from sidlm.ops.sparse24.recipe import Recipe
from sidlm.ops.sparse24.steps import Steps

MODULES = {"triton": "gpu", "eager": "eager"}
"""Implementation -> module with its `steps()`; imported when first used, for triton may be missing."""


def _steps(impl: str) -> Steps:
    return importlib.import_module(f"sidlm.ops.sparse24.{MODULES[impl]}").steps()


@torch.compiler.assume_constant_result
def _form(impl: str, device: torch.device, dtype: torch.dtype, sparse: bool, fp8: bool) -> str:
    """What `torch.compile` writes into the graph, where it asks while it traces; the version is that of the operators'
    arguments, too."""
    return f"{_steps(impl).form(device, dtype, fp8) if sparse else 'dense'}; sidlm {__version__}"


def _check_form(form: str, impl: str, x: Tensor, recipe: Recipe) -> None:
    """Raise RuntimeError if what is kept would not have the shapes that were said when the call was compiled."""
    now = _form(impl, x.device, x.dtype, recipe.sparse, recipe.fp8)
    if form != now:
        raise RuntimeError(f"squared_relu_ffn was compiled for {form!r}, but now is {now!r}: compile it again")


def _sparse_now(recipe: Recipe, enabled: Tensor | None) -> bool:
    return recipe.sparse and (enabled is None or bool(enabled))


def _none(like: Tensor) -> Tensor:
    """What stands for None, which an operator cannot return."""
    return like.new_empty(0, dtype=torch.float32)


def _flat(kept: Kept, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    values, metadata, scale = kept.act or (None, None, None)
    found = (values, metadata, scale, kept.counts, kept.y1)
    values, metadata, scale, counts, y1 = (_none(like) if x is None else x for x in found)
    return values, metadata, scale, counts, y1


def _rows(x: Tensor) -> Tensor:
    """(T, d) of (..., d)."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _like_rows(rows: Tensor, x: Tensor) -> Tensor:
    """(..., n) of rows (T, n), with the axes of x (..., d); like F.linear's result no view to autograd."""
    return torch.ops.aten._unsafe_view(rows.contiguous(), (*x.shape[:-1], rows.shape[1]))


def _nested(values: Tensor, metadata: Tensor, scale: Tensor, counts: Tensor, y1: Tensor) -> Kept:
    act = Packed(values, metadata, scale if scale.numel() else None) if values.numel() else None
    return Kept(act, counts if counts.numel() else None, y1 if y1.numel() else None)


@torch.library.custom_op("sidlm::squared_relu_ffn", mutates_args=())
def _ffn(
    x: Tensor, w_up: Tensor, w_down: Tensor, enabled: Tensor | None, stats: Tensor | None, keep: bool, measure: bool,
    impl: str, form: str, sparse: bool, fp8: bool, dense_features: float, permute_tokens: bool, reuse_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out (..., d_out); statistics of the forward pass, if measured; what is kept. The gradient alone uses stats."""
    recipe = Recipe(sparse, fp8, dense_features, permute_tokens, reuse_mask)
    if keep:
        _check_form(form, impl, x, recipe)
    if not x.numel():
        return _empty(x, w_up, w_down, enabled, stats, keep, measure, impl, form, *recipe)
    with torch.autocast(x.device.type, enabled=False):
        on = _sparse_now(recipe, enabled)
        out, kept, shares = forward(_steps(impl), _rows(x), w_up, w_down, on, keep, measure, recipe)
    return _like_rows(out, x), shares if measure else _none(x), *_flat(kept, x)


@_ffn.register_fake
def _empty(x, w_up, w_down, enabled, stats, keep, measure, impl, form, *recipe):
    recipe, kept = Recipe(*recipe), Kept()
    if keep and recipe.sparse:
        kept = Kept(*unwritten_act(_steps(impl), _rows(x), w_up, recipe))
    if keep and keeps_y1(recipe):
        kept = kept._replace(y1=x.new_empty(x.shape[:-1].numel(), len(w_up)))
    shares = x.new_full((5,), torch.nan, dtype=torch.float32) if measure else _none(x)
    return x.new_empty(*x.shape[:-1], len(w_down)), shares, *_flat(kept, x)


@torch.library.custom_op("sidlm::squared_relu_ffn_backward", mutates_args=())
def _ffn_backward(
    g: Tensor, x: Tensor, w_up: Tensor, w_down: Tensor, values: Tensor, metadata: Tensor, scale: Tensor, counts: Tensor,
    y1: Tensor, enabled: Tensor | None, impl: str, form: str, sparse: bool, fp8: bool, dense_features: float,
    permute_tokens: bool, reuse_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_up, w_down, and the statistics of the backward pass, float32 (2,)."""
    if not x.numel():
        return _zeros(g, x, w_up, w_down)
    recipe = Recipe(sparse, fp8, dense_features, permute_tokens, reuse_mask)
    _check_form(form, impl, x, recipe)
    kept = _nested(values, metadata, scale, counts, y1)
    with torch.autocast(x.device.type, enabled=False):
        on = _sparse_now(recipe, enabled)
        dx, dw_up, dw_down, dropped = backward(_steps(impl), _rows(g), _rows(x), w_up, w_down, kept, on, recipe)
    return _like_rows(dx, x), dw_up.contiguous(), dw_down.contiguous(), dropped


@_ffn_backward.register_fake
def _zeros(g, x, w_up, w_down, *others):
    grads = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (x, w_up, w_down))
    return *grads, x.new_zeros(2, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, w_up, w_down, enabled, stats, _, _, *settings = inputs
    _, shares, *kept = output
    ctx.mark_non_differentiable(shares, *kept)
    ctx.set_materialize_grads(False)  # or zeros would be made for what is kept
    ctx.save_for_backward(x, w_up, w_down, *kept, enabled)
    # not saved: the caller writes it after this, and a second backward pass writes it again
    ctx.stats, ctx.settings = stats, settings


def _backward(ctx, grad_out, *_):
    *grads, dropped = _ffn_backward(grad_out.contiguous(), *ctx.saved_tensors, *ctx.settings)
    if ctx.stats is not None:
        ctx.stats[2:4].copy_(dropped)
    return *grads, *(None,) * 11


_ffn.register_autograd(_backward, setup_context=_setup_context)
flops.register_flop_formulas()


def run(
    impl: str, x: Tensor, w_up: Tensor, w_down: Tensor, enabled: Tensor | None, stats: Tensor | None, measure: bool,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (..., d_out) and, if measure, the statistics of the forward pass, float32 (5,); stats gets the others."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w_up, w_down))
    form = _form(impl, x.device, x.dtype, recipe.sparse, recipe.fp8)
    out, shares, *_ = _ffn(x, w_up, w_down, enabled, stats, keep, measure, impl, form, *recipe)
    return out, shares
