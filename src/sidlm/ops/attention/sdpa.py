"""Attention by torch's fused scaled_dot_product_attention, with a dense mask where it is not plain causal."""

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def visible(q_len: int, kv_len: int, window: int | None, doc_ids: Tensor | None, device: torch.device) -> Tensor:
    """(B or 1, 1, T, S) bool. A padding query sees itself, since a row with nothing to see would be NaN."""
    key = torch.arange(kv_len, device=device)
    query = key[kv_len - q_len :, None]
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    if doc_ids is None:
        return seen[None, None]
    own = doc_ids[:, kv_len - q_len :, None]
    seen = seen & (doc_ids[:, None] == own) & (own >= 0)
    return (seen | (key == query)).unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    causal = mask is None and q.shape[1] > 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
