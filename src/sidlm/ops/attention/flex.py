"""Attention by FlexAttention on CUDA: skips the blocks that a window or a document boundary hides."""

import functools
import inspect

import torch
from torch import Tensor


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "FlexAttention has no backward pass on a CPU"


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def visible(q_len: int, kv_len: int, window: int | None, doc_ids: Tensor | None, device: torch.device):
    """The block mask of these lengths, window and documents. A padding query sees itself, as in `sdpa.visible`."""
    offset = kv_len - q_len
    reach = kv_len if window is None else window

    def seen(b, h, q, kv):
        q = q + offset
        inside = (kv <= q) & (kv > q - reach)
        if doc_ids is None:
            return inside
        own = doc_ids[b, q]
        return (inside & (doc_ids[b, kv] == own) & (own >= 0)) | (kv == q)

    batch = None if doc_ids is None else doc_ids.shape[0]
    # torch counts the positional arguments in the function's code, which a checker of types wraps as (*args, **kwargs)
    return _compiled()[1](inspect.unwrap(seen), batch, None, q_len, kv_len, device=str(device))


def attention(q: Tensor, k: Tensor, v: Tensor, mask, scale: float | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    run = flex_attention if torch.compiler.is_compiling() else _compiled()[0]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = run(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2)
