"""The definition of attention, with the whole matrix of weights: the oracle of the others."""

import torch
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (x.to(dtype).repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * factor
    if mask is None:
        steps, length = logits.shape[-2:]
        mask = torch.ones(steps, length, dtype=torch.bool, device=q.device).tril(length - steps)
    weights = logits.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
