"""What 2-simplicial attention is compared with in benchmarks/simplicial.py, each as `prepare(...) -> function of xs`.

xs are (q, k, v, k2, v2) of the public function's shapes; a baseline returns the same (B, T, H, D).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

# numbers of others, from their own records: not measured by this script, and not on this machine
PUBLISHED = [
    {
        "what": "FBGEMM (stock Triton), forward + backward, B=1 N=2048 H=64 G=1 D=128 window (512,32)",
        "short": "FBGEMM, H100",
        "ms": 43.39,
        "device": "H100 80GB",
        "source": "benchmark records of github.com/tlh24/att3ntion, 2026-09",
    },
    {
        "what": "att3ntion research kernel, forward + backward, same shape",
        "short": "att3ntion, H100",
        "ms": 53.37,
        "device": "H100 80GB",
        "source": "benchmark records of github.com/tlh24/att3ntion, 2026-09",
    },
    {
        "what": "FBGEMM (stock Triton), best forward, D=128, Hkv=1, w1 or w2 = 32",
        "tflops": 337,
        "device": "H100",
        "source": "PyTorch blog on TLX and 2-simplicial attention, 2025-09",
    },
    {
        "what": "FBGEMM (TLX branch of Triton), best forward, D=128, Hkv=1, w1 or w2 = 32",
        "tflops": 588,
        "device": "H100",
        "source": "PyTorch blog on TLX and 2-simplicial attention, 2025-09",
    },
]


def flex_virtual_queries(window: tuple[int, int], compiled: bool = True) -> Callable[..., Tensor]:
    """FlexAttention over materialised virtual queries, then a softmax over the offsets' LSEs and the product with v2.

    Exact, differentiable, and what torch alone offers on a GPU. Memory: several tensors of B * T * H * w2 * D.
    """
    w1, w2 = window

    def attend(q, k, v, k2, v2, block_mask):
        batch, steps, heads, dim = q.shape
        groups = k.shape[2]
        per_group = heads // groups
        # (B, G, 1, w2, T, D): row s holds position i - (w2 - 1) + s
        k2, v2 = (
            F.pad(x, (0, 0, 0, 0, w2 - 1, 0)).unfold(1, w2, 1).permute(0, 2, 4, 1, 3).unsqueeze(2) for x in (k2, v2)
        )
        u = q.unflatten(2, (groups, per_group)).permute(0, 2, 3, 1, 4).unsqueeze(3) * k2  # (B, G, R, w2, T, D)
        values, aux = flex_attention(
            u.reshape(batch, heads * w2, steps, dim), k.transpose(1, 2), v.transpose(1, 2),
            block_mask=block_mask, scale=1.0 / math.sqrt(dim), enable_gqa=True, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        shape = (batch, groups, per_group, w2, steps)
        position = torch.arange(steps, device=q.device) + torch.arange(1 - w2, 1, device=q.device)[:, None]
        assert aux.lse is not None
        weights = aux.lse.reshape(shape).masked_fill(position < 0, -torch.inf).softmax(dim=3)
        out = (weights.unsqueeze(-1) * values.reshape(*shape, dim).float() * v2.float()).sum(dim=3)
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)

    if compiled:
        attend = torch.compile(attend, dynamic=False)
    masks = {}

    def run(q, k, v, k2, v2):
        if q.shape[1] not in masks:
            masks[q.shape[1]] = create_block_mask(
                lambda b, h, i, j: (i >= j) & (i - j < w1), None, None, q.shape[1], q.shape[1], device=str(q.device)
            )
        return attend(q, k, v, k2, v2, masks[q.shape[1]])

    return run


def simplicial_attention_package(window: tuple[int, int], dim: int) -> Callable[..., Tensor]:
    """The sliding-window Triton kernels of the PyPI package simplicial-attention (they repeat K and V for each head).

    Limits of version 0.1.6: D up to 64 (the tile's width is fixed, a larger D is cut off silently), bf16 inside,
    w2 <= 32 in the backward pass, CUDA only, no documents, no determinant.
    """
    if dim > 64 or window[1] > 32:
        raise ValueError(f"simplicial-attention takes D <= 64 and w2 <= 32, not D={dim} and w2={window[1]}")
    from simplicial_attention.triton_two_simplicial_attention import (  # pyright: ignore[reportMissingImports]
        sliding_two_simplicial_attn,
    )

    def run(q, k, v, k2, v2):
        return sliding_two_simplicial_attn(q, (k, k2), (v, v2), w1=window[0], w2=window[1])

    return run


def causal_sdpa(backend: str) -> Callable[..., Tensor]:
    """Causal dot-product attention by one backend of torch ("flash", "cudnn", "math"); k2 and v2 are not used."""
    chosen = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}

    def run(q, k, v, k2, v2):
        with sdpa_kernel(chosen[backend]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return run


def causal_length(pairs: int) -> int:
    """Length at which causal attention, 2 N^2 D FLOPs a head, does what 4 D a pair makes; a multiple of 128."""
    return max(128, round(math.sqrt(2 * pairs) / 128) * 128)
