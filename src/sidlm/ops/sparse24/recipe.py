"""The settings of 2:4 sparsity and its two conventions: which features stay dense, in which order tokens are seen."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

DENSE_MULTIPLE = 64  # rows of a tile of any tensor core


class Recipe(NamedTuple):
    """What is computed (arXiv 2503.16672)."""

    sparse: bool
    """2:4 sparsity, else the dense form"""
    fp8: bool
    """operands of all matrix products in e4m3"""
    dense_features: float
    """share of the features, those that are active most often, whose weight gradients stay dense"""
    permute_tokens: bool
    """whether neighbouring tokens are so in a random order; a fixed one"""
    reuse_mask: bool
    """whether gradients are kept only where the forward pass kept the activation"""


def dense_count(features: int, share: float) -> int:
    """Number of features that stay dense: the share, rounded, then up to a multiple of 64, at most all."""
    return min(features, -(-round(features * share) // DENSE_MULTIPLE) * DENSE_MULTIPLE)


class Split(NamedTuple):
    """Which features are sparse and which are dense."""

    sparse: Tensor
    """their indices, int64, ascending: neighbours in memory are read together"""
    dense: Tensor
    """the others'"""
    is_dense: Tensor | None = None
    """uint8 (F,), where an implementation needs it"""


def split(counts: Tensor, share: float) -> Split:
    """From the active tokens (F,) of each feature. Of equal counts those with the highest indices are dense."""
    order = counts.argsort(stable=True)
    sparse = len(order) - dense_count(len(order), share)
    return Split(order[:sparse].sort().values, order[sparse:].sort().values)


def threshold(counts: Tensor, share: float) -> Tensor | None:
    """Active tokens of the sparsest of the dense features, from those (F,) of each; None if no feature is dense."""
    dense = dense_count(len(counts), share)
    return counts.sort().values[len(counts) - dense] if dense else None


@functools.lru_cache(maxsize=8)
def token_order(tokens: int, device: torch.device, permute: bool) -> Tensor:
    """int64 (T,): a random permutation, the same in every process and on every device, or the identity."""
    if not permute:
        return torch.arange(tokens, device=device)
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).to(device)
