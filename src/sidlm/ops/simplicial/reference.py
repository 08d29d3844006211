"""The definition of 2-simplicial attention, query by query: the oracle that every other implementation is held to.

"Fast and Simplex" (arXiv 2507.02754), section 4 (trilinear form), section 5 (determinant form), Algorithm 1.
"""

import torch
from torch import Tensor

# the Levi-Civita symbol: det([x, y, z]) = sum_abc EPSILON[a, b, c] x_a y_b z_c
EPSILON = torch.tensor(
    [[[0, 0, 0], [0, 0, 1], [0, -1, 0]], [[0, 0, -1], [0, 0, 0], [1, 0, 0]], [[0, 1, 0], [-1, 0, 0], [0, 0, 0]]]
)


def _logits(q: Tensor, k: Tensor, k2: Tensor, form: str) -> Tensor:
    """(B, H, D), (B, J, H, D), (B, M, H, D) -> (B, H, J, M), unscaled."""
    if form == "trilinear":
        return torch.einsum("bhd,bjhd,bmhd->bhjm", q, k, k2)
    whole = q.shape[-1] // 3 * 3
    q3, k3, k23 = (x[..., :whole].unflatten(-1, (-1, 3)) for x in (q, k, k2))
    determinants = torch.einsum("xyz,bhcx,bjhcy,bmhcz->bhjm", EPSILON.to(q), q3, k3, k23)
    return determinants + torch.einsum("bhd,bjhd,bmhd->bhjm", q[..., whole:], k[..., whole:], k2[..., whole:])


def reference(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor, v2: Tensor, w1: int, w2: int, form: str, scale: float,
    k2_bias: float, v2_bias: float, doc_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (B, T, H, D) in q's dtype and natural-log LSE (B, T, H); O(T w1 w2) time and autograd memory.

    Arguments as in :func:`sidlm.ops.two_simplicial_attention`. Computes in float64 for float64 inputs, else float32.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads_per_group = q.shape[2] // k.shape[2]
    k, v, k2, v2 = (x.to(dtype).repeat_interleave(heads_per_group, dim=2) for x in (k, v, k2, v2))
    k2, v2 = k2 + k2_bias, v2 + v2_bias
    steps, length = q.shape[1], max(k.shape[1], k2.shape[1])
    ids = torch.zeros(q.shape[0], length, dtype=torch.long, device=q.device) if doc_ids is None else doc_ids
    outs, lses = [], []
    for step in range(steps):
        back = steps - 1 - step  # all sequences end at the same position
        i, j, m = length - 1 - back, k.shape[1] - 1 - back, k2.shape[1] - 1 - back
        first, second = slice(max(0, j - w1 + 1), j + 1), slice(max(0, m - w2 + 1), m + 1)
        own = ids[:, i : i + 1]
        sees_first = (ids[:, i - (j - first.start) : i + 1] == own) & (own >= 0)
        sees_second = (ids[:, i - (m - second.start) : i + 1] == own) & (own >= 0)
        # what is not seen may be NaN, and its weight of zero would not hide it
        k_i, v_i = (x[:, first].masked_fill(~sees_first[..., None, None], 0.0) for x in (k, v))
        k2_i, v2_i = (x[:, second].masked_fill(~sees_second[..., None, None], 0.0) for x in (k2, v2))
        logits = scale * _logits(q[:, step].to(dtype), k_i, k2_i, form)
        visible = sees_first[:, None, :, None] & sees_second[:, None, None, :]
        logits = logits.masked_fill(~visible, -torch.inf)
        lse = logits.logsumexp(dim=(-2, -1))
        weights = (logits - lse.clamp_min(torch.finfo(dtype).min)[..., None, None]).exp()
        outs.append(torch.einsum("bhjm,bjhd,bmhd->bhd", weights, v_i, v2_i))
        lses.append(lse)
    return torch.stack(outs, dim=1).to(q.dtype), torch.stack(lses, dim=1)
