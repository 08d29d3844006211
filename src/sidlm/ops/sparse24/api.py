"""The public function: a squared-ReLU feed-forward layer with 2:4 activation sparsity, dense, in 16 bits or in fp8."""

import functools
import importlib
import os

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sidlm.ops import dispatch
from sidlm.ops.sparse24 import autograd, reference
from sidlm.ops.sparse24.recipe import Recipe

SPARSITIES = (None, "2:4")
PRECISIONS = (None, "bf16", "fp8")


def _any_device(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


@torch.compiler.assume_constant_result
def _why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run, in words, or None; torch.compile asks it while it traces, and traces it not."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernels take bfloat16 and float16, not {dtype}"
    try:
        importlib.import_module("sidlm.ops.sparse24.gpu")
    except ImportError as error:
        return str(error)
    return None


def emulated(device: torch.device) -> bool:
    """Whether kernels do not run on the device itself, if they run at all."""
    return device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


IMPLEMENTATIONS = {
    "triton": dispatch.Implementation(functools.partial(autograd.run, "triton"), _why_not_triton, emulated),
    "eager": dispatch.Implementation(functools.partial(autograd.run, "eager"), _any_device),
    "reference": dispatch.Implementation(reference.run, _any_device),
}


def choose(impl: str | None, device: torch.device, dtype: torch.dtype, recipe: Recipe) -> str:
    """The implementation to run: that of `dispatch.choose`, but kernels have no form of reuse_mask=False."""
    name = dispatch.choose("squared_relu_ffn", IMPLEMENTATIONS, impl, device, dtype)
    if name != "triton" or not recipe.sparse or recipe.reuse_mask:
        return name
    if impl is not None:
        raise ValueError(f"impl is {impl!r}, but reuse_mask=False takes 'eager' or 'reference'")
    return "eager"


def _check(
    x: Tensor, w_up: Tensor, w_down: Tensor, sparsity: str | None, precision: str | None, enabled: Tensor | None,
    dense_features: float, stats: Tensor | None,
) -> None:  # fmt: skip
    """ValueError naming the argument and the two values that disagree; the same for every implementation."""
    if x.ndim < 1:
        raise ValueError(f"x must be (..., d), got shape {tuple(x.shape)}")
    for name, w, shape in (("w_up", w_up, "(F, d)"), ("w_down", w_down, "(d_out, F)")):
        if w.ndim != 2:
            raise ValueError(f"{name} must be {shape}, got shape {tuple(w.shape)}")
        if w.device != x.device:
            raise ValueError(f"{name} is on {w.device}, but x is on {x.device}")
    if w_up.shape[1] != x.shape[-1]:
        raise ValueError(f"w_up has d {w_up.shape[1]}, but x has {x.shape[-1]}")
    if w_down.shape[1] != w_up.shape[0]:
        raise ValueError(f"w_down has F {w_down.shape[1]}, but w_up has {w_up.shape[0]}")
    for name, known, value in (("sparsity", SPARSITIES, sparsity), ("precision", PRECISIONS, precision)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, but must be one of {', '.join(map(repr, known))}")
    if sparsity is not None and w_up.shape[0] % 8:
        raise ValueError(f"2:4 sparsity takes F a multiple of 8, but w_up has F {w_up.shape[0]}")
    if not 0 <= dense_features <= 1:
        raise ValueError(f"dense_features is {dense_features}, but must be a share, from 0 to 1")
    if enabled is not None and (enabled.ndim or enabled.dtype != torch.bool or enabled.device.type != "cpu"):
        what = f"{enabled.dtype} of shape {tuple(enabled.shape)} on {enabled.device}"
        raise ValueError(f"enabled is {what}, but must be torch.bool of shape () on cpu")
    if stats is not None and (stats.shape != (5,) or stats.dtype != torch.float32 or stats.device != x.device):
        what = f"{stats.dtype} of shape {tuple(stats.shape)} on {stats.device}"
        raise ValueError(f"stats is {what}, but must be torch.float32 of shape (5,) on {x.device}")


def _dtypes(tensors: dict[str, Tensor], precision: str | None) -> tuple[torch.dtype, torch.dtype]:
    """The dtype that is computed in, and that of the result. Raises ValueError for dtypes that disagree."""
    x = tensors["x"]
    for name, t in tensors.items():
        if not t.is_floating_point():
            raise ValueError(f"{name} is {t.dtype}, but must be of a floating-point type")
    kind = x.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # like F.linear
    result = torch.get_autocast_dtype(kind) if autocast else x.dtype
    if precision is not None:
        return torch.bfloat16, result
    for name, t in tensors.items():
        if not autocast and t.dtype != x.dtype:
            raise ValueError(f"{name} is {t.dtype}, but x is {x.dtype}")
    return result, result


def squared_relu_ffn(
    x: Float[Tensor, "*batch d"],
    w_up: Float[Tensor, "f d"],
    w_down: Float[Tensor, "e f"],
    *,
    sparsity: str | None = None,
    precision: str | None = None,
    enabled: Bool[Tensor, ""] | None = None,
    dense_features: float = 0.05,
    permute_tokens: bool = True,
    reuse_mask: bool = True,
    impl: str | None = None,
    return_stats: bool = False,
    stats: Float[Tensor, "5"] | None = None,
) -> Float[Tensor, "*batch e"] | tuple[Float[Tensor, "*batch e"], Float[Tensor, "5"]]:
    """``relu(x @ w_up.T)^2 @ w_down.T`` with 2:4 sparse activations (arXiv 2503.16672).

    Of every four neighbouring features of a token the two largest are kept; so half of the second product is left out,
    and in the backward pass half of three of four products. Gradients are kept where activations were; for those of
    the weights, besides, at two of every four tokens of a feature, but for the features that are active most often.

    Args:
        x: (..., d), float64, float32, bfloat16 or float16. w_up: (F, d). w_down: (d_out, F). F a multiple of 8 for
            sparsity. Under autocast they are cast as F.linear casts them.
        sparsity: None, the dense function, or "2:4".
        precision: of the matrix products: None for the dtype of x; "bf16"; or "fp8", e4m3 with a power of two as the
            scale of each row, the rest in bf16. The last two cast x and the weights, whatever their dtypes.
        enabled: bool () on the CPU that says, while it runs, whether sparsity is on; False: the dense function, for
            warm-up. To flip it in place neither recompiles nor allocates.
        dense_features: share of these features; rounded up to a multiple of 64 of them.
        permute_tokens: whether weight gradients see the tokens in a random order, always the same, because
            neighbours are active together.
        reuse_mask: False is an ablation, for "eager" and "reference": gradients see the activations before selection.
        impl: name of an implementation ("triton", "eager", "reference"); None takes the first that can run.
        return_stats: also return statistics, float32 (5,): share of zeros in relu(x @ w_up.T); of the others, share
            dropped by the forward pass; share that the selections along tokens drop of the activations and of their
            gradients; and how often, as a share of tokens, the sparsest of the dense features is active. The third and
            fourth are NaN until the backward pass writes them. Where sparsity is off, nothing is dropped, and the
            last one is NaN; it is, too, if no feature is dense.
        stats: where to write them, float32 (5,). With torch.compile or activation checkpointing the backward pass can
            reach only a tensor that was given: without, the third and fourth may stay NaN.

    Returns:
        (..., d_out) in x's dtype (autocast's under autocast), and the statistics if asked for.

    Raises:
        ValueError: shapes, dtypes, devices or settings that disagree, with the names and the values.
    """
    _check(x, w_up, w_down, sparsity, precision, enabled, dense_features, stats)
    compute, result = _dtypes({"x": x, "w_up": w_up, "w_down": w_down}, precision)
    recipe = Recipe(sparsity is not None, precision == "fp8", float(dense_features), permute_tokens, reuse_mask)
    run = IMPLEMENTATIONS[choose(impl, x.device, compute, recipe)].run
    measure = return_stats or stats is not None
    if return_stats and stats is None and not torch.compiler.is_compiling():
        stats = x.new_empty(5, dtype=torch.float32)
    out, shares = run(x.to(compute), w_up.to(compute), w_down.to(compute), enabled, stats, measure, recipe)
    if stats is not None:
        with torch.no_grad():
            stats.copy_(shares)
    out = out.to(result)
    return (out, shares if stats is None else stats) if return_stats else out
