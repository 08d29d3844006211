"""The closed form of the visible pairs against counting them, and torch's FLOP counter with the ops registered."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sidlm.ops import two_simplicial_attention
from sidlm.ops.simplicial.flops import (
    backward_flops,
    forward_flops,
    register_flop_formulas,
    visible_pairs,
)

WINDOWS = [(1, 1), (7, 3), (3, 7), (5, 5), (64, 8), (1, 9), (9, 1)]


def counted(steps, window, s1=None, s2=None, doc_lengths=None):
    """Every query, every pair of positions, one comparison each."""
    s1, s2 = s1 or steps, s2 or steps
    length = max(s1, s2)
    ids = [n if size > 0 else -1 for n, size in enumerate(doc_lengths or [length]) for _ in range(abs(size))]
    total = 0
    for i in range(length - steps, length):
        if ids[i] >= 0:
            j = sum(ids[p] == ids[i] for p in range(max(length - s1, i - window[0] + 1), i + 1))
            m = sum(ids[p] == ids[i] for p in range(max(length - s2, i - window[1] + 1), i + 1))
            total += j * m
    return total


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 40])
def test_pairs_of_one_document(steps, window):
    assert visible_pairs(steps, window) == counted(steps, window)
    for s1, s2 in ((steps + 3, steps), (steps, steps + 6), (steps + 2, steps + 9), (steps + 70, steps + 70)):
        assert visible_pairs(steps, window, s1, s2) == counted(steps, window, s1, s2)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("lengths", [[30], [1, 29], [-4, 10, 1, 15], [11, -8, 11], [13, 15, -2], [-30]], ids=str)
def test_pairs_of_documents(lengths, window):
    assert visible_pairs(30, window, doc_lengths=lengths) == counted(30, window, doc_lengths=lengths)
    for steps, s1, s2 in ((7, 30, 12), (7, 12, 30), (20, 30, 30), (1, 30, 1)):
        expected = counted(steps, window, s1, s2, lengths)
        assert visible_pairs(steps, window, s1, s2, lengths) == expected


def test_documents_must_fill_the_row():
    with pytest.raises(ValueError, match="doc_lengths cover 9 positions, expected 10"):
        visible_pairs(10, (4, 2), doc_lengths=[5, 4])


def test_the_published_shape():
    pairs = visible_pairs(2048, (512, 32))
    assert pairs == sum(min(i + 1, 512) * min(i + 1, 32) for i in range(2048))
    assert forward_flops(pairs, 64, 128) == pytest.approx(0.962e12, rel=1e-3)
    assert backward_flops(pairs, 64, 128) == 3 * forward_flops(pairs, 64, 128)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("s1, s2", [(20, 20), (27, 24)])
def test_torch_counts_the_ops(s1, s2, documents):
    register_flop_formulas()
    register_flop_formulas()  # harmless
    batch, steps, heads, groups, dim, window = 2, 20, 4, 2, 6, (9, 4)
    shapes = [(steps, heads), (s1, groups), (s1, groups), (s2, groups), (s2, groups)]
    xs = [torch.randn(batch, *shape, dim, requires_grad=True) for shape in shapes]
    ids = torch.arange(max(s1, s2)).div(8, rounding_mode="floor").expand(batch, -1) if documents else None
    with FlopCounterMode(display=False) as forward:
        out = two_simplicial_attention(*xs, window=window, doc_ids=ids, impl="eager")
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(out.square().sum(), xs)
    pairs = visible_pairs(steps, window, s1, s2)  # the counter sees no values, so no documents either
    assert forward.get_total_flops() == forward_flops(pairs, heads, dim, batch)
    assert backward.get_total_flops() == backward_flops(pairs, heads, dim, batch)
