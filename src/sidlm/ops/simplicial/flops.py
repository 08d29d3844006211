"""What 2-simplicial attention must compute: pairs of keys seen, FLOPs, and their registration with torch's counter.

The convention: per visible pair and query head 4 D forward (two matrix products) and 12 D backward (six). The
elementwise product that joins two keys, the softmax and what a kernel computes on masked pairs are not counted.
"""

from collections.abc import Iterable, Sequence

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

FORWARD, BACKWARD = 4, 12  # FLOPs a pair and dimension


def _sum_product(count: int, a: int, b: int) -> int:
    """Sum of (t + a) (t + b) over 0 <= t < count."""
    return (count - 1) * count * (2 * count - 1) // 6 + (a + b) * (count * (count - 1) // 2) + count * a * b


def _pairs(count: int, a: int, b: int, w1: int, w2: int) -> int:
    """Sum of min(w1, t + a) min(w2, t + b) over 0 <= t < count: both windows grow, then one, then none."""
    first, second = (min(max(w - x, 0), count) for w, x in ((w1, a), (w2, b)))
    early, late = min(first, second), max(first, second)
    between = late - early
    shift, width = (a, w2) if second < first else (b, w1)  # which axis still grows between the two
    growing = between * (early + shift) + between * (between - 1) // 2  # sum of t + shift over [early, late)
    return _sum_product(early, a, b) + width * growing + (count - late) * w1 * w2


def visible_pairs(
    steps: int,
    window: tuple[int, int],
    s1: int | None = None,
    s2: int | None = None,
    doc_lengths: Iterable[int] | None = None,
) -> int:
    """Pairs (j, m) that the queries of one row see together, exactly, for one head.

    Args:
        steps: queries T.
        window: (w1, w2).
        s1, s2: positions of the first and second keys, T if None; all sequences end at the same position.
        doc_lengths: lengths of the documents in order, a negative one for so much padding; their sizes add up to
            max(s1, s2). None: one document.
    """
    s1, s2 = s1 or steps, s2 or steps
    length = max(s1, s2)
    documents = [length] if doc_lengths is None else list(doc_lengths)
    if (covered := sum(map(abs, documents))) != length:
        raise ValueError(f"doc_lengths cover {covered} positions, expected {length}")
    total, start = 0, 0
    for size in documents:
        stop = start + abs(size)
        query = max(start, length - steps)  # the document's first position that has a query
        if size > 0 and query < stop:
            a, b = (query - max(start, length - s) + 1 for s in (s1, s2))
            total += _pairs(stop - query, a, b, *window)
        start = stop
    return total


def forward_flops(pairs: int, heads: int, dim: int, batch: int = 1) -> int:
    """4 D for each visible pair and query head."""
    return FORWARD * dim * heads * batch * pairs


def backward_flops(pairs: int, heads: int, dim: int, batch: int = 1) -> int:
    """12 D for each visible pair and query head: the logits again, and five products for the gradients."""
    return BACKWARD * dim * heads * batch * pairs


def _counted(per_pair: int, q: Sequence[int], k: Sequence[int], k2: Sequence[int], others: Iterable[object]) -> int:
    w1, w2, *_ = (x for x in others if isinstance(x, int))
    batch, steps, heads, dim = q
    return per_pair * dim * heads * batch * visible_pairs(steps, (w1, w2), k[1], k2[1])


def _forward_formula(q, k, v, k2, v2, *settings, out_shape=None, **named) -> int:
    return _counted(FORWARD, q, k, k2, (*settings, *named.values()))


def _backward_formula(grad_out, grad_lse, q, k, v, k2, v2, *settings, out_shape=None, **named) -> int:
    return _counted(BACKWARD, q, k, k2, (*settings, *named.values()))


def register_flop_formulas() -> None:
    """Teach torch.utils.flop_counter.FlopCounterMode the two ops; they must exist. A second call does nothing.

    The counter hands a formula shapes, not values: with doc_ids a row counts as one document, an upper bound.
    """
    if torch.ops.sidlm.two_simplicial not in flop_registry:
        register_flop_formula(torch.ops.sidlm.two_simplicial)(_forward_formula)
        register_flop_formula(torch.ops.sidlm.two_simplicial_backward)(_backward_formula)
