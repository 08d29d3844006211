"""Causal grouped-query attention, full or over a sliding window."""

from typing import Any

from torch import Tensor, nn

from sidlm import ops
from sidlm.nn.linear import residual_linear
from sidlm.nn.rotary import Positions


class Attention(nn.Module):
    """Llama's attention: bias-free projections, RoPE on q and k, query heads in groups over the key/value heads.

    window: number of positions a query sees, itself included; None for all of them.
    layer_idx: which layer of a cache this one reads and writes.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        layer_idx: int = 0,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.window = window
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = residual_linear(num_heads * head_dim, hidden_size)

    def forward(
        self, x: Tensor, positions: Positions, *, cache: Any = None, mask: Any = None, doc_ids: Tensor | None = None,
        impl: str | None = None,
    ) -> Tensor:  # fmt: skip
        """x: (B, T, hidden_size) -> the same shape.

        cache: an object with ``update(k, v, layer_idx)`` that takes and returns (B, G, S, D) tensors, or None.
        mask: what ``ops.attention_mask`` gave for this kind of layer. It carries the document structure, so doc_ids
        is needed only by a caller who builds no mask: (B, S) int, aligned at the end with the keys.
        impl: the implementation of ``ops.attention`` for a caller who builds no mask, None for the default.
        """
        b, t, _ = x.shape
        q = self.q_proj(x).view(b, t, -1, self.head_dim)
        k = self.k_proj(x).view(b, t, -1, self.head_dim)
        v = self.v_proj(x).view(b, t, -1, self.head_dim)
        q = ops.apply_rope(q, positions.cos, positions.sin)
        k = ops.apply_rope(k, positions.cos, positions.sin)
        if cache is not None:
            keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            if self.window is not None:
                # a cache may hand back more than the window needs; the mask was built for exactly this much
                visible = self.window - 1 + t
                keys, values = keys[:, :, -visible:], values[:, :, -visible:]
            k, v = keys.transpose(1, 2), values.transpose(1, 2)
        out = ops.attention(q, k, v, window=self.window, doc_ids=doc_ids, mask=mask, impl=impl)
        return self.o_proj(out.reshape(b, t, -1))
