"""Which two of every four values stay (arXiv 2503.16672, section 3)."""

import torch
from torch import Tensor


def select_2to4(x: Tensor, *, by: str = "value") -> Tensor:
    """Mask (..., K), bool, of the two largest of every four neighbours along the last axis of x (..., K).

    by: "value" (for pre-activations and activations) or "magnitude" (for gradients). Of equal ones the first stay; NaN
    counts as the largest, so that it is not lost. Raises ValueError if K is not a multiple of 4.
    """
    if by not in ("value", "magnitude"):
        raise ValueError(f"by must be 'value' or 'magnitude', got {by!r}")
    if x.shape[-1] % 4:
        raise ValueError(f"2:4 selection takes groups of 4, but the last axis of x has {x.shape[-1]} elements")
    keys = (x.abs() if by == "magnitude" else x).unflatten(-1, (-1, 4))
    keys = torch.where(keys.isnan(), torch.inf, keys)
    mine, other = keys.unsqueeze(-1), keys.unsqueeze(-2)
    earlier = torch.ones(4, 4, dtype=torch.bool, device=x.device).tril(-1)  # [i, j]: j comes before i
    rank = ((other > mine) | ((other == mine) & earlier)).sum(-1)
    return (rank < 2).flatten(-2)
