"""Causal softmax attention with documents and sliding windows: one signature over torch's fused kernels."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidlm.ops import dispatch
from sidlm.ops.attention import flex, reference, sdpa, varlen


class Mask(NamedTuple):
    """What a query may see, built once and shared by the layers of one kind."""

    impl: str
    visible: object
    """A bool tensor (B or 1, 1, T, S), a FlexAttention block mask, documents, or None for plain causal attention."""
    is_query: Tensor | None
    """(B, T) bool, False at padding, whose output is zero; None if there is none to zero."""


IMPLEMENTATIONS = {
    "sdpa": dispatch.Implementation(sdpa.attention, sdpa.why_not),
    "flex": dispatch.Implementation(flex.attention, flex.why_not),
    "varlen": dispatch.Implementation(varlen.attention, varlen.why_not),
    "reference": dispatch.Implementation(reference.attention, reference.why_not),
}
FLEX_BLOCK = 128  # FlexAttention's block of queries
_VISIBLE = {"sdpa": sdpa.visible, "flex": flex.visible, "varlen": varlen.visible, "reference": sdpa.visible}


def attention_mask(
    q_len: int,
    kv_len: int,
    *,
    window: int | None = None,
    doc_ids: Int[Tensor, "b s"] | None = None,
    offsets: tuple[Int[Tensor, "n"], int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    impl: str | None = None,
) -> Mask:
    """The mask of :func:`attention` for these lengths, window and documents, to be passed as ``mask=``.

    On CUDA, training rows that are not plain causal attention take what skips the blocks that nothing sees, other than
    torch's dense kernels: in half precision flash kernels for documents with offsets and for windows, else
    FlexAttention. That one compiles once per length, so evaluation and decoding with their ragged lengths take a dense
    mask, as does a CPU, where it has no backward.

    Args:
        offsets: what doc_ids say, for rows without padding whose documents are each in one piece: where documents begin
            in the rows one behind the other, (N + 1,) int32 with the number of tokens at the end, and at least the
            length of the longest. Whoever has them on the host spares a wait for the device.
        dtype, head_dim: of q, k and v.
    """
    device = torch.device(device)
    plain = doc_ids is None and (window is None or kv_len <= window)
    impl = impl or dispatch.override("attention")
    if impl is None and not plain and device.type == "cuda":
        known = q_len == kv_len and (doc_ids is None or offsets is not None)
        if known and head_dim <= varlen.LARGEST_DIM and varlen.why_not(device, dtype) is None:
            impl = "varlen"
        elif torch.is_grad_enabled() and q_len % FLEX_BLOCK == 0:
            impl = "flex"
    impl = dispatch.choose("attention", IMPLEMENTATIONS, impl, device, dtype)
    if plain and (q_len == kv_len or q_len == 1) and impl != "flex":  # without a mask FlexAttention sees everything
        return Mask(impl, None, None)
    if impl == "varlen" and offsets is not None:
        return Mask(impl, varlen.Documents(*offsets, window), None)
    own = None if doc_ids is None else doc_ids[:, kv_len - q_len :]
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
        impl: "sdpa", "flex" or "varlen" (CUDA), or "reference".

    Raises:
        ValueError: shapes or windows that disagree, with the two values.
    """
    _check(q, k, v, window, doc_ids)
    if mask is None:
        mask = attention_mask(
            q.shape[1], k.shape[1], window=window, doc_ids=doc_ids,
            device=q.device, dtype=q.dtype, head_dim=q.shape[3], impl=impl,
        )  # fmt: skip
    out = IMPLEMENTATIONS[mask.impl].run(q, k, v, mask.visible, scale)
    return out if mask.is_query is None else out.masked_fill(~mask.is_query[..., None, None], 0.0)
