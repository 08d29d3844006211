"""Decoding for 2-simplicial attention: one or a few new tokens against ring buffers of the positions in reach."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidlm.ops import dispatch
from sidlm.ops.simplicial import eager, prepare
from sidlm.ops.simplicial.api import FORMS, check_window, choose, emulated


def _gathered(ring: Tensor, slots: Tensor, hidden: Tensor) -> Tensor:
    """Rows (B, S, G, D) of a ring in the order of slots (B, S); zero where hidden, whatever the ring holds there."""
    rows = torch.arange(ring.shape[0], device=ring.device)[:, None]
    return ring[rows, slots].masked_fill_(hidden[..., None, None], 0.0)


def _eager(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, lengths: Tensor, w1: int, w2: int, form: str,
    scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The rings in order, then the eager form of the dense op; positions before a sequence's start are padding."""
    n, longest = q.shape[1], max(w1, w2) + q.shape[1] - 1
    positions = lengths[:, None] + torch.arange(-longest, 0, device=q.device)  # (B, longest)
    ids = positions.clamp(max=0)  # any ids will do that are negative before the start, and equal from there on
    if doc_ids is not None:
        given = torch.nn.functional.pad(doc_ids[:, -longest:], (max(longest - doc_ids.shape[1], 0), 0), value=-1)
        ids = given.masked_fill(positions < 0, -1)
    ordered = []
    for ring, w in ((k, w1), (v, w1), (k2, w2), (v2, w2)):
        at = slice(-(w + n - 1), None)
        ordered.append(_gathered(ring, positions[:, at] % ring.shape[1], ids[:, at] < 0))
    return eager.forward(q, *ordered, w1, w2, form, scale, k2_bias, v2_bias, ids)


def _triton(*args) -> tuple[Tensor, Tensor]:
    from sidlm.ops.simplicial import triton_decode

    return triton_decode.forward(*args)


_BACKENDS = {"triton": _triton, "eager": _eager}


@torch.library.custom_op("sidlm::two_simplicial_decode", mutates_args=())
def _two_simplicial_decode(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, lengths: Tensor, w1: int, w2: int, form: str,
    scale: float, k2_bias: float, v2_bias: float, doc_ids: Tensor | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _BACKENDS[impl](q, k, v, k2, v2, lengths, w1, w2, form, scale, k2_bias, v2_bias, doc_ids)


@_two_simplicial_decode.register_fake
def _(q, k, v, k2, v2, lengths, w1, w2, form, scale, k2_bias, v2_bias, doc_ids, impl):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _why_not_eager(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype.is_floating_point else f"{dtype} is not a floating-point type"


IMPLEMENTATIONS = {
    "triton": dispatch.Implementation(_triton, prepare.why_not_triton, emulated),
    "eager": dispatch.Implementation(_eager, _why_not_eager),
}


def _check(
    q: Tensor, rings: dict[str, Tensor], lengths: Tensor, window: tuple[int, int], form: str, doc_ids: Tensor | None
) -> None:
    """ValueError naming the argument and the two values that disagree; the same for every implementation."""
    if q.ndim != 4:
        raise ValueError(f"q must be (B, n, H, D), got shape {tuple(q.shape)}")
    batch, n, heads, dim = q.shape
    groups = rings["k"].shape[2] if rings["k"].ndim == 4 else 0
    if form not in FORMS:
        raise ValueError(f"form is {form!r}, but must be one of {', '.join(FORMS)}")
    for (name, x), i in zip(rings.items(), (0, 0, 1, 1), strict=True):
        if x.ndim != 4:
            raise ValueError(f"{name} must be (B, C, G, D), got shape {tuple(x.shape)}")
        for label, index, expected in (("batch size", 0, batch), ("G", 2, groups), ("D", 3, dim)):
            if x.shape[index] != expected:
                raise ValueError(f"{name} has {label} {x.shape[index]}, expected {expected} (q {tuple(q.shape)})")
        if x.shape[1] < window[i] + n - 1:
            raise ValueError(
                f"{name} has {x.shape[1]} slots, fewer than the {window[i] + n - 1} that window[{i}] = {window[i]} "
                f"and {n} new tokens need"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}, but q is {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    for name in ("v", "v2"):
        partner = "k" + name[1:]
        if rings[name].shape[1] != rings[partner].shape[1]:
            raise ValueError(f"{name} has {rings[name].shape[1]} slots, but {partner} has {rings[partner].shape[1]}")
    if groups == 0 or heads % groups:
        raise ValueError(f"q has {heads} heads, not a multiple of the {groups} heads of k")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected {(batch,)}")
    if doc_ids is not None and (doc_ids.ndim != 2 or doc_ids.shape[0] != batch or doc_ids.shape[1] < n):
        raise ValueError(f"doc_ids has shape {tuple(doc_ids.shape)}, expected ({batch}, {n} or more)")
    for name, x in (("lengths", lengths), ("doc_ids", doc_ids)):
        if x is not None and (x.is_floating_point() or x.device != q.device):
            raise ValueError(f"{name} is {x.dtype} on {x.device}, expected integers on {q.device}")


def two_simplicial_decode(
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b c1 g d"],
    v: Float[Tensor, "b c1 g d"],
    k2: Float[Tensor, "b c2 g d"],
    v2: Float[Tensor, "b c2 g d"],
    lengths: Int[Tensor, " b"],
    *,
    window: tuple[int, int] = (512, 32),
    form: str = "trilinear",
    scale: float | None = None,
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    doc_ids: Int[Tensor, "b s"] | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "b n h d"] | tuple[Float[Tensor, "b n h d"], Float[Tensor, "b n h"]]:
    """:func:`two_simplicial_attention` of the last few tokens of each sequence, from ring buffers ("Fast and Simplex").

    Position p of a sequence lies in slot p % C of its rings, the new tokens included: write them before the call. What
    other slots hold is never read. Cost and shapes do not depend on the sequences' lengths, which stay on the device:
    a call can be part of a CUDA graph that is replayed while the sequences grow.

    Args:
        q: queries (B, n, H, D) of the last n tokens; n is small (1 to 16), and every token takes its own programs.
        k, v: rings (B, C1, G, D) with C1 >= w1 + n - 1, H a multiple of G. Dense in D, any other strides.
        k2, v2: rings (B, C2, G, D) with C2 >= w2 + n - 1.
        lengths: (B,) integers, the tokens of each sequence, its new ones included. A sequence shorter than n
            has its first queries before its start: their output is zero and their LSE -inf.
        window, form, scale, k2_bias, v2_bias, return_lse: as in :func:`two_simplicial_attention`.
        doc_ids: (B, S) integers, S >= n, the documents of the last S positions, aligned at the end: no pair crosses a
            document, negative ids (left padding) are never seen, nor is a position more than S from the end.
        impl: name of an implementation ("triton", "eager"); None takes the first that can run, a kernel only on a GPU.

    Returns:
        (B, n, H, D) in q's dtype, and the natural-log LSE (B, n, H) if asked for.

    Raises:
        ValueError: shapes, dtypes, devices or windows that disagree, with the names and the two values.
        RuntimeError: gradients are wanted; use two_simplicial_attention.
    """
    rings = {"k": k, "v": v, "k2": k2, "v2": v2}
    check_window(window)
    _check(q, rings, lengths, window, form, doc_ids)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, *rings.values())):
        raise RuntimeError(
            "two_simplicial_decode has no gradient: call it under torch.no_grad, or use two_simplicial_attention"
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    chosen = choose("simplicial_decode", IMPLEMENTATIONS, impl, q)
    settings = (int(window[0]), int(window[1]), form, scale, float(k2_bias), float(v2_bias))
    out, lse = _two_simplicial_decode(q, k, v, k2, v2, lengths, *settings, doc_ids, chosen)
    return (out, lse) if return_lse else out
