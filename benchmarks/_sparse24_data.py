"""Layers whose activations are as sparse as those of trained squared-ReLU networks, and sparse in their way.

Measured networks have 84 to 98% zeros, features of very different density, some of them active most of the time, and
features that fire on runs of consecutive tokens (arXiv 2503.16672, section 4). Nothing is planted in the activations:
x and w_up are made so that x @ w_up.T has it. x is the sum of a constant direction, of a direction of the passage, and
of noise; a row of w_up is a random vector less so much of the constant direction as makes its feature rare.
"""

from typing import NamedTuple

import torch
from _sparse24_dense import Layer
from torch import Tensor

DENSE_SHARE = 0.02
"""Of the features: these are active at 40 to 80% of the tokens"""
SPREAD = 0.8
"""Standard deviation of the logarithm of the other features' densities"""
PASSAGE = 0.5
"""Share of the variance of a pre-activation that is the same all through a passage"""
PASSAGE_TOKENS = 16


class Sparsity(NamedTuple):
    """What the activations of a layer are like."""

    zeros: float
    dropped: float
    """share of the non-zeros that are not among the two largest of four"""
    dense_features: float
    """share of the features that are active at more than 40% of the tokens"""
    recurring: float
    """share of the activations whose feature is active at the next token too"""


def densities(features: int, density: float, make: torch.Generator) -> Tensor:
    """Share of the tokens at which each feature is active, float32 (F,), of mean `density`."""
    shares = torch.exp(SPREAD * torch.randn(features, generator=make, device=make.device))
    dense = round(features * DENSE_SHARE)
    rest = max(density - DENSE_SHARE * 0.6, density / 2)
    shares = (shares * rest / shares.mean()).clamp(1e-4, 0.4)
    shares[:dense] = 0.4 + 0.4 * torch.rand(dense, generator=make, device=make.device)
    return shares[torch.randperm(features, generator=make, device=make.device)]


def layer(
    tokens: int, width: int, features: int, density: float, seed: int, device: torch.device, dtype: torch.dtype
) -> Layer:
    """x (T, d), half of its square in the constant direction, w_up (F, d), w_down (d, F) and a gradient (T, d)."""
    make = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, device=device)

    constant = torch.nn.functional.normalize(normal(width), dim=0)
    lengths = torch.empty(tokens, device=device).geometric_(1 / PASSAGE_TOKENS, generator=make).cumsum(0)
    passage = torch.searchsorted(lengths, torch.arange(tokens, device=device).float(), right=True)
    x = PASSAGE**0.5 * normal(int(passage.max()) + 1, width)[passage] + (1 - PASSAGE) ** 0.5 * normal(tokens, width)
    x += (width**0.5 - x @ constant)[:, None] * constant
    w_up = normal(features, width) / width**0.5
    rare = 1 - densities(features, density, make)
    thresholds = torch.special.ndtri(rare.double()).float()
    w_up -= (w_up @ constant + thresholds / width**0.5)[:, None] * constant
    w_down = normal(width, features) / features**0.5
    return Layer(*(t.to(dtype) for t in (x, normal(tokens, width), w_up, w_down)))


def swiglu(given: Layer, seed: int) -> Layer:
    """A SwiGLU layer with the parameters of this one: two thirds of its features, to a multiple of 128."""
    width, features = given.w_in.shape[1], max(16, round(len(given.w_in) * 2 / 3 / 128) * 128)
    make = torch.Generator(given.x.device).manual_seed(seed)
    w_in = torch.randn(2 * features, width, generator=make, device=make.device) / width**0.5
    w_down = torch.randn(width, features, generator=make, device=make.device) / features**0.5
    return given._replace(w_in=w_in.to(given.x.dtype), w_down=w_down.to(given.x.dtype), kind="swiglu")


def look(given: Layer, most: int = 2048) -> Sparsity:
    """What the activations of the first tokens are like."""
    from sidlm.ops.sparse24.select import select_2to4

    y = given.x[:most] @ given.w_in.T
    on = y > 0
    kept = on & select_2to4(y)
    active = on.sum()
    return Sparsity(
        zeros=1 - on.float().mean().item(),
        dropped=1 - (kept.sum() / active.clamp_min(1)).item(),
        dense_features=(on.float().mean(0) > 0.4).float().mean().item(),
        recurring=((on[1:] & on[:-1]).sum() / on[:-1].sum().clamp_min(1)).item(),
    )
