"""2-simplicial attention: every query attends to pairs of positions ("Fast and Simplex", arXiv 2507.02754)."""

from typing import Any

import torch
from torch import Tensor, nn

from sidlm import ops
from sidlm.nn.linear import residual_linear
from sidlm.nn.norm import RMSNorm
from sidlm.nn.rotary import Positions
from sidlm.ops.simplicial.api import choose

POSITIONS = ("none", "rope", "rotation")
DECODED_AT_ONCE = 16
"""With a cache and without gradients, up to so many tokens take the path for decoding, where it has a kernel."""


class SimplicialAttention(nn.Module):
    """Causal windowed 2-simplicial attention with grouped query heads (section 4, algorithm 1; section 5).

    window: (w1, w2); a query at i sees pairs (j, k) with i - w1 < j <= i and i - w2 < k <= i.
    form: "trilinear" (equation of section 4) or "determinant" (section 5, rotation invariant).
    position: "none"; "rope", ordinary RoPE on q, k and k2 (absolute positions enter a trilinear product); "rotation",
    one rotation about a fixed axis per chunk of three dimensions, which leaves a determinant dependent on relative
    positions only, and is therefore refused for the trilinear form and with a nonzero k2_bias.
    scale: factor of the logits, None for 1/sqrt(head_dim).
    qk_norm: RMS norm of each head of q, k and k2 with learned weights, before positions are applied.
    k2_bias, v2_bias: constants added to k2 and v2; at 1 the layer starts near ordinary attention.
    Raises ValueError for an unknown position and for a position that the form cannot carry.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: tuple[int, int] = (512, 32),
        form: str = "trilinear",
        position: str = "rope",
        scale: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-5,
        k2_bias: float = 0.0,
        v2_bias: float = 0.0,
        layer_idx: int = 0,
    ):
        super().__init__()
        check_position(position, form, k2_bias)
        self.head_dim = head_dim
        self.window = (window[0], window[1])
        self.form = form
        self.position = position
        self.scale = scale
        self.k2_bias = k2_bias
        self.v2_bias = v2_bias
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.k2_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v2_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = residual_linear(num_heads * head_dim, hidden_size)
        self.q_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None
        self.k2_norm = RMSNorm(head_dim, norm_eps) if qk_norm else None

    def forward(
        self, x: Tensor, positions: Positions, *, cache: Any = None, mask: Any = None, doc_ids: Tensor | None = None,
        impl: str | None = None,
    ) -> Tensor:  # fmt: skip
        """x: (B, T, hidden_size) -> the same shape.

        cache: an object whose ``update(k, v, layer_idx, k2=, v2=, window=)`` takes (B, G, T, D) tensors and returns
        ``((k, k2), (v, v2))`` with the positions still in reach in front, or None. Where few tokens need no gradient it
        is given ``rings=True`` and may return ``((k, k2, lengths), (v, v2))``, ring buffers (B, G, C, D) that hold the
        new positions too (:func:`sidlm.ops.two_simplicial_decode`).
        doc_ids: (B, S) int, S >= the longest keys, aligned at the end; negative is padding. mask is not used.
        impl: the implementation of :func:`sidlm.ops.two_simplicial_attention`, None for the default; decoding from ring
        buffers has its own. "eager" where padding lies inside a document, unless the keys come as rings.
        """
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, self.head_dim)
        k = self.k_proj(x).view(b, t, -1, self.head_dim)
        v = self.v_proj(x).view(b, t, -1, self.head_dim)
        k2 = self.k2_proj(x).view(b, t, -1, self.head_dim)
        v2 = self.v2_proj(x).view(b, t, -1, self.head_dim)
        if self.q_norm is not None:
            assert self.k_norm is not None and self.k2_norm is not None
            q, k, k2 = self.q_norm(q), self.k_norm(k), self.k2_norm(k2)
        if self.position == "rope":
            q, k, k2 = (ops.apply_rope(z, positions.cos, positions.sin) for z in (q, k, k2))
        elif self.position == "rotation":
            cos3, sin3 = positions.cos3, positions.sin3
            assert cos3 is not None and sin3 is not None
            q, k, k2 = (ops.apply_rope3(z, cos3, sin3) for z in (q, k, k2))
        lengths = None
        if cache is not None:
            k, v, k2, v2, lengths = self._through_cache(cache, k, v, k2, v2)
        settings: dict[str, Any] = {
            "window": self.window, "form": self.form, "scale": self.scale, "k2_bias": self.k2_bias,
            "v2_bias": self.v2_bias,
        }  # fmt: skip
        if lengths is not None:
            out = ops.two_simplicial_decode(q, k, v, k2, v2, lengths, doc_ids=doc_ids, **settings)
        else:
            if doc_ids is not None:
                doc_ids = doc_ids[:, -max(k.shape[1], k2.shape[1]) :]
            out = ops.two_simplicial_attention(q, k, v, k2, v2, doc_ids=doc_ids, impl=impl, **settings)
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return self.o_proj(out.reshape(b, t, -1))

    def _through_cache(
        self, cache: Any, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """What the queries see, each (B, S, G, D); lengths (B,) if these are ring buffers, else None."""
        k, v, k2, v2 = (z.transpose(1, 2) for z in (k, v, k2, v2))
        rings = _wants_rings(k)
        (k, k2, *lengths), (v, v2) = cache.update(k, v, self.layer_idx, k2=k2, v2=v2, window=self.window, rings=rings)
        k, v, k2, v2 = (z.transpose(1, 2) for z in (k, v, k2, v2))
        return k, v, k2, v2, lengths[0] if lengths else None


def _wants_rings(new_keys: Tensor) -> bool:
    """Whether these keys (B, G, T, D) behind a cache are a step of decoding from ring buffers.

    Without the kernel the rows in order cost less: the rings would be put in order first. A compiled graph would depend
    on the slot that is written to.
    """
    few = new_keys.shape[2] <= DECODED_AT_ONCE
    if not few or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return choose("simplicial_decode", ops.IMPLEMENTATIONS["simplicial_decode"], None, new_keys) == "triton"


def check_position(position: str, form: str, k2_bias: float) -> None:
    """Raise ValueError unless the position treatment is known and meaningful for the form and bias."""
    if position not in POSITIONS:
        raise ValueError(f"simplicial_position must be one of {POSITIONS}, got {position!r}")
    if position == "rotation" and form != "determinant":
        raise ValueError(
            f"simplicial_position 'rotation' needs simplicial_form 'determinant', got {form!r}: "
            "only the determinant is invariant under a common rotation"
        )
    if position == "rotation" and k2_bias != 0:
        raise ValueError(
            f"simplicial_position 'rotation' needs simplicial_k2_bias 0, got {k2_bias}: "
            "a constant added after the rotation makes the logits depend on absolute positions"
        )
