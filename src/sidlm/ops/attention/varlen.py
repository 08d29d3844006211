"""Attention over documents that lie one behind the other, by torch's variable-length flash kernels (CUDA).

Rows are read as one line of tokens, and where a document ends is told by offsets: no mask is built, and a block of
another document costs nothing. The kernels are torch's FlashAttention-2 (Dao 2023), with windows.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen as kernels

LARGEST_DIM = 256  # head_dim of flash attention's kernels
# torch 2.11 takes fewer key heads than query heads as they come, later ones want to be told
_SAYS_GROUPED = "enable_gqa" in inspect.signature(kernels.varlen_attn).parameters


class Documents(NamedTuple):
    """Documents of rows laid one behind the other."""

    offsets: Tensor | None
    """(N + 1,) int32: where each begins, and the number of all tokens; None: each row is one"""
    longest: int
    """at least the tokens of the longest"""
    window: int | None
    """positions a query sees, itself included; None: all of its document"""


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "torch's flash kernels for documents need CUDA"
    return None if dtype in (torch.bfloat16, torch.float16) else f"flash attention has no kernels for {dtype}"


def visible(q_len: int, kv_len: int, window: int | None, doc_ids: Tensor | None, device: torch.device) -> Documents:
    """The documents of (B, T) doc_ids, each in one piece; waits for the device. Raises ValueError behind a cache."""
    if q_len != kv_len:
        raise ValueError(f"attention 'varlen' takes as many queries as keys, got {q_len} and {kv_len}")
    if doc_ids is None:
        return Documents(None, kv_len, window)
    starts = torch.ones_like(doc_ids, dtype=torch.bool)
    starts[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    first = starts.flatten().nonzero()[:, 0]
    return Documents(torch.cat((first, first.new_full((1,), doc_ids.numel()))).int(), kv_len, window)


def attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, scale: float | None) -> Tensor:
    (b, t), s = q.shape[:2], k.shape[1]
    offsets, longest, window = documents or Documents(None, t, None)
    if offsets is None:
        rows = torch.arange(b + 1, dtype=torch.int32, device=q.device)
        lines = rows * t, rows * s, t, s
    else:
        lines = offsets, offsets, longest, longest
    told: dict[str, Any] = {"enable_gqa": q.shape[2] != k.shape[2]} if _SAYS_GROUPED else {}
    dim = q.shape[3]
    q, k, v = (F.pad(x.flatten(0, 1), (0, -dim % 8)) for x in (q, k, v))  # the kernels take multiples of 8
    out = kernels.varlen_attn(
        q, k, v, *lines, scale=dim**-0.5 if scale is None else scale,
        window_size=(-1 if window is None else window - 1, 0), **told,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out[..., :dim].unflatten(0, (b, t))
