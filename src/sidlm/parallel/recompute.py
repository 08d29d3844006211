"""What a block computes again in the backward pass instead of keeping it: nothing, what is cheap, or everything.

"cheap" keeps the results of matrix products and of attention and computes the rest again: norms, rotations, elementwise
functions, and the exchanges that make a layer's input whole. It is Megatron's sequence parallelism in memory
(Korthikanti et al. 2022, equation 4, with fused attention), and costs no matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

KEPT_OPERATORS = {
    "aten": ("mm", "bmm", "_grouped_mm", "_scaled_mm", "_scaled_dot_product_", "linear"),
    "_c10d_functional": ("reduce_scatter_tensor",),
    "sidlm": ("two_simplicial", "squared_relu_ffn", "flex"),
    "higher_order": ("flex_attention",),
    "torch_attn": ("_varlen_attn",),
}
"""Namespace -> beginnings of the names of operators whose results "cheap" keeps"""


def recompute_block(block: nn.Module, how: str, *, compiled: bool = False) -> None:
    """Make a block compute again in its backward pass what `how` says, and compile it; names of parameters stay.

    how: "none", "cheap" or "blocks".
    """
    # operators are chosen inside of what is compiled; torch 2.13 fails to compile what is recomputed whole
    if compiled and how != "cheap":
        block.forward = torch.compile(block.forward)
    if how == "cheap":
        block.forward = _checkpointed(block.forward, partial(create_selective_checkpoint_contexts, _policy))
    elif how == "blocks":
        block.forward = _checkpointed(block.forward, noop_context_fn)
    if compiled and how == "cheap":
        block.forward = torch.compile(block.forward)


def _checkpointed(inner: Callable[..., Tensor], contexts: Callable[[], Any]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        # no block draws random numbers, and keeping their state costs a wait for the device
        return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs)

    return forward


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    namespace, _, name = str(operator).partition(".")
    kept = name.startswith(KEPT_OPERATORS.get(namespace, ())) and not _summand(args)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _summand(args: tuple[Any, ...]) -> bool:
    """Whether a product of these gives each process a part of a sum over all: the sum is kept, and only that."""
    first = args[0] if args else None
    return isinstance(first, DTensor) and Shard(first.ndim - 1) in first.placements
