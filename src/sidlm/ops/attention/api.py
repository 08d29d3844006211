"""Causal softmax attention with documents and sliding windows: one signature over torch's fused kernels."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidlm.ops import dispatch
from sidlm.ops.attention import flex, reference, sdpa


class Mask(NamedTuple):
    """What a query may see, built once and shared by the layers of one kind."""

    impl: str
    visible: object
    """A bool tensor (B or 1, 1, T, S), a FlexAttention block mask, or None for plain causal attention."""
    is_query: Tensor | None
    """(B, T) bool, False at padding, whose output is zero; None if there is none to zero."""


IMPLEMENTATIONS = {
    "sdpa": dispatch.Implementation(sdpa.attention, sdpa.why_not),
    "flex": dispatch.Implementation(flex.attention, flex.why_not),
    "reference": dispatch.Implementation(reference.attention, reference.why_not),
}
FLEX_BLOCK = 128  # FlexAttention's block of queries
_VISIBLE = {"sdpa": sdpa.visible, "flex": flex.visible, "reference": sdpa.visible}


def attention_mask(
    q_len: int,
    kv_len: int,
    *,
    window: int | None = None,
    doc_ids: Int[Tensor, "b s"] | None = None,
    device: torch.device | str = "cpu",
    impl: str | None = None,
) -> Mask:
    """The mask of :func:`attention` for these lengths, window and documents, to be passed as ``mask=``.

    On CUDA, FlexAttention serves training rows that are not plain causal attention, since torch's fused kernels there
    skip no masked block. It compiles once per length, so evaluation and decoding with their ragged lengths take a dense
    mask, as does a CPU, where it has no backward.
    """
    device = torch.device(device)
    plain = doc_ids is None and (window is None or kv_len <= window)
    training = torch.is_grad_enabled() and q_len % FLEX_BLOCK == 0
    if impl is None and not plain and device.type == "cuda" and training:
        impl = "flex"
    impl = dispatch.choose("attention", IMPLEMENTATIONS, impl, device, torch.float32)
    own = None if doc_ids is None else doc_ids[:, kv_len - q_len :]
    if plain and (q_len == kv_len or q_len == 1):
        return Mask(impl, None, None)
    return Mask(impl, _VISIBLE[impl](q_len, kv_len, window, doc_ids, device), None if own is None else own >= 0)


def _check(q: Tensor, k: Tensor, v: Tensor, window: int | None, doc_ids: Tensor | None) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k has shape {tuple(k.shape)}, but v has {tuple(v.shape)}")
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} must be (B, T, H, D) and (B, S, G, D)")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, not a multiple of the {k.shape[2]} heads of k")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} positions, fewer than the {q.shape[1]} of q")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, but must be at least 1")
    if doc_ids is not None and tuple(doc_ids.shape) != (k.shape[0], k.shape[1]):
        raise ValueError(f"doc_ids has shape {tuple(doc_ids.shape)}, expected {(k.shape[0], k.shape[1])}")


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g d"],
    *,
    window: int | None = None,
    doc_ids: Int[Tensor, "b s"] | None = None,
    mask: Mask | None = None,
    scale: float | None = None,
    impl: str | None = None,
) -> Float[Tensor, "b t h d"]:
    """Grouped-query causal attention; query i sees (i - window, i], or all of [0, i] if window is None.

    Args:
        q: (B, T, H, D). k, v: (B, S, G, D) with S >= T and H a multiple of G, aligned at the end: query i sits at key
            position i + S - T, so that S > T is decoding with a cache.
        doc_ids: (B, S) integers: a query sees its own document only; negative ids are padding, never seen, and a
            padding query's output is zero.
        mask: what :func:`attention_mask` built from the same lengths, window and doc_ids, which then go unread.
        scale: factor of the logits, 1/sqrt(D) if None.
        impl: "sdpa", "flex" (CUDA) or "reference".

    Raises:
        ValueError: shapes or windows that disagree, with the two values.
    """
    _check(q, k, v, window, doc_ids)
    if mask is None:
        mask = attention_mask(q.shape[1], k.shape[1], window=window, doc_ids=doc_ids, device=q.device, impl=impl)
    out = IMPLEMENTATIONS[mask.impl].run(q, k, v, mask.visible, scale)
    return out if mask.is_query is None else out.masked_fill(~mask.is_query[..., None, None], 0.0)
