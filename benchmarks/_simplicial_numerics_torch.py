"""The yardsticks of benchmarks/simplicial_numerics.py, all in plain torch and independent of the package.

In float64, attention with the virtual queries u written out, so that u alone can be rounded; in a low precision, what
torch makes of the op with nothing but its own attention: scaled_dot_product_attention over written-out pairs of keys.

xs are (q, k, v, k2, v2): q (B, T, H, D), the others (B, T, G, D).
"""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

NAMES = ("out", "lse", "dq", "dk", "dv", "dk2", "dv2")
PAIRS = {"cuda": 1 << 27, "cpu": 1 << 22}  # elements of the pairs of keys that are written out at once


class Settings(NamedTuple):
    window: tuple[int, int]
    form: str = "trilinear"
    k2_bias: float = 0.0
    v2_bias: float = 0.0


class Virtual(NamedTuple):
    """Float64 results by virtual queries, and facts about them."""

    out: Tensor  # (B, T, H, D)
    lse: Tensor  # (B, T, H)
    largest_weight: Tensor  # (B, T, H): the largest weight of the softmax of each row
    largest_u: float
    overflows: int  # elements of u that the rounding made infinite


def windows(x: Tensor, size: int) -> Tensor:
    """(B, T, G, D) -> overlapping view (B, T, G, size, D): position i - size + 1 .. i, zeros before the first."""
    return F.pad(x, (0, 0, 0, 0, size - 1, 0)).unfold(1, size, 1).transpose(-1, -2)


def product(a: Tensor, b: Tensor, form: str) -> Tensor:
    """a o b, or for the determinant a x b per chunk of three: det([q, k, k2]) = k . (k2 x q) = q . (k x k2)."""
    if form == "trilinear":
        return a * b
    whole = a.shape[-1] // 3 * 3
    x, y = (z[..., :whole].unflatten(-1, (-1, 3)) for z in (a, b))
    cross = x.roll(-1, -1) * y.roll(-2, -1) - x.roll(-2, -1) * y.roll(-1, -1)
    return torch.cat((cross.flatten(-2), a[..., whole:] * b[..., whole:]), dim=-1)


def _virtual_queries(xs: Sequence[Tensor], s: Settings, i: slice) -> Tensor:
    """u (B, n, G, R, w2, D) of the queries i."""
    q, _, _, k2, _ = xs
    grouped = q[:, i].unflatten(2, (k2.shape[2], -1)).unsqueeze(4)
    return product(windows(k2 + s.k2_bias, s.window[1])[:, i].unsqueeze(3), grouped, s.form)


def _logits(u: Tensor, k: Tensor, s: Settings, i: slice, j: slice) -> Tensor:
    """(B, n, G, R, w2, J) for the keys j, -inf where a pair is not seen."""
    logits = torch.einsum("bngrsd,bjgd->bngrsj", u, k[:, j]) / math.sqrt(k.shape[-1])
    query, key = torch.arange(i.start, i.stop, device=k.device)[:, None], torch.arange(j.start, j.stop, device=k.device)
    first = (key <= query) & (key > query - s.window[0])
    second = query + torch.arange(1 - s.window[1], 1, device=k.device) >= 0
    return logits.masked_fill(~(first[:, None, None, None, :] & second[:, None, None, :, None]), -torch.inf)


def by_virtual_queries(
    xs: Sequence[Tensor], s: Settings, rounded: torch.dtype | None = None, block: int = 32
) -> Virtual:
    """The op in float64, with u rounded to a dtype if one is given, and nothing else rounded."""
    xs = [x.double() for x in xs]
    q, k, v, _, v2 = xs
    v2 = windows(v2 + s.v2_bias, s.window[1])
    parts, largest_u, overflows = [], 0.0, 0
    for start in range(0, q.shape[1], block):
        i = slice(start, min(start + block, q.shape[1]))
        j = slice(max(0, start - s.window[0] + 1), i.stop)
        u = _virtual_queries(xs, s, i)
        largest_u = max(largest_u, u.abs().max().item())
        if rounded is not None:
            u = u.to(rounded).double()
            overflows += int(u.isinf().sum())
        logits = _logits(u, k, s, i, j)
        lse = logits.logsumexp(dim=(-2, -1))
        weights = (logits - lse[..., None, None]).exp()
        values = torch.einsum("bngrsj,bjgd->bngrsd", weights, v[:, j])
        out = (values * v2[:, i].unsqueeze(3)).sum(-2)
        parts.append([x.flatten(2, 3) for x in (out, lse, weights.amax(dim=(-2, -1)))])
    out, lse, largest = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    return Virtual(out, lse, largest, largest_u, overflows)


def concentrating_factor(xs: Sequence[Tensor], s: Settings, target: float = 0.9, queries: int = 8) -> float:
    """What to multiply q by for a median largest weight of `target`, from the last queries."""
    xs = [x.double() for x in xs]
    steps = xs[0].shape[1]
    i, j = slice(max(0, steps - queries), steps), slice(max(0, steps - queries - s.window[0] + 1), steps)
    below = _logits(_virtual_queries(xs, s, i), xs[1], s, i, j).flatten(-2)
    below = below - below.amax(dim=-1, keepdim=True)
    low, high = 2.0**-6, 2.0**14
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        reached = (1 / (middle * below).exp().sum(-1)).median().item() >= target
        low, high = (low, middle) if reached else (middle, high)
    return float(f"{high:.3g}")


def _sdpa(leaves: Sequence[Tensor], keys: Tensor, values: Tensor, seen: Tensor, grad: Tensor, scale: float):
    """Output, gradients of the leaves and backend, by the first of torch's backends that takes these arguments."""
    fused = SDPBackend.EFFICIENT_ATTENTION if keys.is_cuda else SDPBackend.FLASH_ATTENTION
    for backend in (fused, SDPBackend.MATH):
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # it warns of why a backend refuses
            try:
                out = F.scaled_dot_product_attention(leaves[0], keys, values, attn_mask=seen, scale=scale)
            except RuntimeError as error:
                if backend is SDPBackend.MATH or isinstance(error, torch.OutOfMemoryError):
                    raise
                continue
        return out.detach(), torch.autograd.grad(out, leaves, grad), backend.name.lower()
    raise AssertionError("unreachable")


def _lse(q: Tensor, keys: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Float32 (float64) LSE of products accumulated in that precision, as within a fused kernel, which keeps it."""
    q, keys = q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        logits = torch.bmm(q, keys, out_dtype=torch.float32)
    else:
        high = torch.promote_types(q.dtype, torch.float32)
        logits = torch.bmm(q.to(high), keys.to(high))
    logits = logits.unflatten(0, (seen.shape[0], -1)) * scale
    return logits.masked_fill(~seen, -torch.inf).logsumexp(-1)


def by_pair_keys(xs: Sequence[Tensor], s: Settings, grad: Tensor) -> tuple[dict[str, Tensor], str]:
    """Torch's own: scaled_dot_product_attention over the pairs k o k2 and v o v2, everything in the dtype of xs.

    The gradients are autograd's. What several queries give to one key is summed in float64, so this is the best that
    such a computation can be. Returns the results by name, and the backend.
    """
    q, k = xs[:2]
    (batch, steps, _, dim), groups, (w1, w2) = q.shape, k.shape[2], s.window
    block = max(1, PAIRS[q.device.type] // (batch * groups * w1 * w2 * dim))
    sizes, scale, backend = (w1, w1, w2, w2), 1 / math.sqrt(dim), ""
    # the query's own position first: no block of keys that a fused kernel begins with is hidden whole
    views = [q.unflatten(2, (groups, -1)), *(windows(x, w).flip(3) for x, w in zip(xs[1:], sizes, strict=True))]
    shapes = [(batch, w - 1 + steps, groups, dim) for w in sizes]
    sums = [torch.zeros(shape, dtype=torch.float64, device=q.device) for shape in shapes]
    parts = []
    for start in range(0, steps, block):
        i = slice(start, min(start + block, steps))
        at = torch.arange(i.start, i.stop, device=q.device)
        # (B*n, G, rows, D)
        leaves = [x[:, i].flatten(0, 1).contiguous().requires_grad_() for x in views]
        qs, ks, vs, k2s, v2s = leaves
        keys = product(ks.unsqueeze(3), (k2s + s.k2_bias).unsqueeze(2), s.form).flatten(2, 3)
        values = (vs.unsqueeze(3) * (v2s + s.v2_bias).unsqueeze(2)).flatten(2, 3)
        first, second = (at[:, None] - torch.arange(w, device=q.device) >= 0 for w in (w1, w2))
        seen = (first[:, :, None] & second[:, None, :]).flatten(1).repeat(batch, 1)[:, None, None, :]
        grad_rows = grad[:, i].unflatten(2, (groups, -1)).flatten(0, 1)
        out, grads, backend = _sdpa(leaves, keys, values, seen, grad_rows, scale)
        lse = _lse(qs.detach(), keys.detach(), seen, scale)
        parts.append([x.unflatten(0, (batch, -1)).flatten(2, 3) for x in (out, lse, grads[0])])
        for total, part, w in zip(sums, grads[1:], sizes, strict=True):
            rows = (at[:, None] + w - 1 - torch.arange(w, device=q.device)).flatten()
            part = part.unflatten(0, (batch, -1)).transpose(2, 3).flatten(1, 2)
            total.index_add_(1, rows, part.double())
    sums = [total[:, w - 1 :].to(q.dtype) for total, w in zip(sums, sizes, strict=True)]
    results = [*(torch.cat(x, dim=1) for x in zip(*parts, strict=True)), *sums]
    return dict(zip(NAMES, results, strict=True)), backend


def errors(x: Tensor, exact: Tensor, name: str) -> dict[str, float | int | None]:
    """Error measures of one result; None where the exact result is zero. Absolute for the LSE, relative for the rest.

    frobenius: |x - exact| / |exact|. max_over_rms: largest |x - exact| over the rms of exact. row_median: median over
    the rows (batch, position, head) of the row's own |x - exact| / |exact|, in which no row outweighs another; rows
    below a thousandth of the rms row are left out (a softmax of one weight has no gradient to speak of).
    """
    bad = int((~x.isfinite()).sum())
    if bad:
        return {"nonfinite": bad}
    difference = (x.double() - exact).abs()
    if name == "lse":
        return {"rms": difference.square().mean().sqrt().item(), "max": difference.max().item()}
    norm, rms = exact.norm().item(), exact.square().mean().sqrt().item()
    if norm == 0:
        return {"frobenius": None, "max_over_rms": None, "row_median": None}
    sizes = exact.norm(dim=-1)
    counted = sizes > 1e-3 * sizes.square().mean().sqrt()
    rows = difference.norm(dim=-1)[counted] / sizes[counted]
    return {
        "frobenius": difference.norm().item() / norm,
        "max_over_rms": difference.max().item() / rms,
        "row_median": rows.median().item(),
    }
