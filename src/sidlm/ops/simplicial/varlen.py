"""2-simplicial attention over packed sequences, and over one rank's shard of a long sequence."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sidlm.ops.simplicial.api import check_window, readable, two_simplicial_attention

HALO = ("k", "v", "k2", "v2")


def two_simplicial_attention_varlen(
    q: Float[Tensor, "total h d"],
    k: Float[Tensor, "total g d"],
    v: Float[Tensor, "total g d"],
    k2: Float[Tensor, "total g d"],
    v2: Float[Tensor, "total g d"],
    cu_seqlens: Int[Tensor, " n"],
    *,
    window: tuple[int, int] = (512, 32),
    form: str = "trilinear",
    scale: float | None = None,
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    return_lse: bool = False,
    compensate: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "total h d"] | tuple[Float[Tensor, "total h d"], Float[Tensor, "total h"]]:
    """:func:`two_simplicial_attention` over sequences of any lengths, one behind the other without padding.

    Args:
        q: (total, H, D); k, v, k2, v2: (total, G, D).
        cu_seqlens: (N + 1,) int32 or int64 on q's device, 0 = c[0] <= ... <= c[N] = total: sequence n is the tokens
            c[n] to c[n + 1], none if the two are equal. Its values are checked on a CPU only.
        The other arguments are those of two_simplicial_attention.

    Returns:
        (total, H, D) in q's dtype, and the LSE (total, H) if asked for.

    Raises:
        ValueError: as two_simplicial_attention, or a cu_seqlens that does not fit, with the values.
    """
    for name, x in zip(("q", *HALO), (q, k, v, k2, v2), strict=True):
        if x.ndim != 3:
            raise ValueError(f"{name} must be (total, {'H' if name == 'q' else 'G'}, D), got shape {tuple(x.shape)}")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has {x.shape[0]} tokens, but q has {q.shape[0]}")
    _check_cu_seqlens(cu_seqlens, q)
    if q.shape[0] == 0:
        return (q.clone(), q.sum(-1)) if return_lse else q.clone()
    tokens = torch.arange(q.shape[0], device=q.device, dtype=cu_seqlens.dtype)
    doc_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)[None]
    out, lse = two_simplicial_attention(
        *(x[None] for x in (q, k, v, k2, v2)), window=window, form=form, scale=scale, k2_bias=k2_bias, v2_bias=v2_bias,
        doc_ids=doc_ids, return_lse=True, compensate=compensate, impl=impl,
    )  # fmt: skip
    return (out[0], lse[0]) if return_lse else out[0]


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor) -> None:
    if cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (N + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.device != q.device:
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} on {cu_seqlens.device}, expected int32 or int64 on {q.device}"
        )
    if not readable(cu_seqlens):
        return
    values, total = cu_seqlens.tolist(), q.shape[0]
    if values[0] != 0:
        raise ValueError(f"cu_seqlens starts at {values[0]}, expected 0")
    if values[-1] != total:
        raise ValueError(f"cu_seqlens ends at {values[-1]}, but q has {total} tokens")
    for before, after in pairwise(values):
        if after < before:
            raise ValueError(f"cu_seqlens must not decrease: {after} follows {before}")


def halo_sizes(window: tuple[int, int]) -> tuple[int, int]:
    """How many positions before its own a rank needs of (k, v) and of (k2, v2)."""
    return window[0] - 1, window[1] - 1


def two_simplicial_attention_halo(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g d"],
    k2: Float[Tensor, "b t g d"],
    v2: Float[Tensor, "b t g d"],
    halo: Sequence[Tensor],
    *,
    window: tuple[int, int] = (512, 32),
    form: str = "trilinear",
    scale: float | None = None,
    k2_bias: float = 0.0,
    v2_bias: float = 0.0,
    doc_ids: Int[Tensor, "b s"] | None = None,
    return_lse: bool = False,
    compensate: bool = False,
    impl: str | None = None,
) -> Float[Tensor, "b t h d"] | tuple[Float[Tensor, "b t h d"], Float[Tensor, "b t h"]]:
    """:func:`two_simplicial_attention` of one rank's shard of sequences that are split over ranks.

    A query sees w1 and w2 positions, itself included, so all that a rank needs from those before it is the halo: for
    (512, 32) at most 511 + 31 positions, whatever the sequence's length. Exchanging it is the caller's; the gradients
    of the halo belong to the ranks that it came from, to be added to theirs.

    Args:
        q: (B, T, H, D); k, v, k2, v2: (B, T, G, D), this rank's positions.
        halo: (k, v, k2, v2) of the positions directly before them: (B, h1, G, D) twice, then (B, h2, G, D) twice, with
            h1, h2 = halo_sizes(window), fewer where the sequence starts within reach (none on the first rank).
        doc_ids: (B, max(h1, h2) + T), the documents of halo and shard.
        The other arguments are those of two_simplicial_attention.

    Returns:
        (B, T, H, D) in q's dtype, and the LSE (B, T, H) if asked for; differentiable in q, the shard and the halo.

    Raises:
        ValueError: as two_simplicial_attention, or a halo that does not fit, with the values.
    """
    check_window(window)
    if len(halo) != len(HALO):
        raise ValueError(f"halo has {len(halo)} tensors, expected {len(HALO)}: {', '.join(HALO)}")
    own = (k, v, k2, v2)
    for i, (name, before, x) in enumerate(zip(HALO, halo, own, strict=True)):
        named = f"halo[{i}] ({name})"
        if before.ndim != 4 or x.ndim != 4 or before.shape[0] != x.shape[0] or before.shape[2:] != x.shape[2:]:
            expected = f"({x.shape[0]}, h, {', '.join(str(size) for size in x.shape[2:])})"
            raise ValueError(f"{named} has shape {tuple(before.shape)}, expected {expected}")
        if before.dtype != x.dtype or before.device != x.device:
            raise ValueError(
                f"{named} is {before.dtype}, but {name} is {x.dtype}"
                if before.dtype != x.dtype
                else f"{named} is on {before.device}, but {name} is on {x.device}"
            )
        if i % 2 and before.shape[1] != halo[i - 1].shape[1]:
            raise ValueError(
                f"{named} has {before.shape[1]} positions, but halo[{i - 1}] ({HALO[i - 1]}) has {halo[i - 1].shape[1]}"
            )
        needed = window[i // 2] - 1
        if before.shape[1] > needed:
            raise ValueError(
                f"{named} has {before.shape[1]} positions, more than the {needed} that "
                f"window[{i // 2}] = {window[i // 2]} can see"
            )
    joined = (torch.cat((before, x), dim=1) if before.shape[1] else x for before, x in zip(halo, own, strict=True))
    return two_simplicial_attention(
        q, *joined, window=window, form=form, scale=scale, k2_bias=k2_bias, v2_bias=v2_bias, doc_ids=doc_ids,
        return_lse=return_lse, compensate=compensate, impl=impl,
    )  # fmt: skip
