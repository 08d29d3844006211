import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.data.mixing import Mixture, block_counts


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
@settings(deadline=None)
def test_counts_follow_the_weights(weights):
    counts = block_counts(weights)
    share = np.asarray(weights) / sum(weights)
    assert counts.min() >= 1
    assert np.abs(counts / counts.sum() - share).max() <= 1 / counts.sum()
    if share.min() > 64 / 2**20:
        assert np.all(np.abs(counts / counts.sum() / share - 1) < 1 / 32)


def test_a_vanishing_weight_still_gets_its_sample():
    counts = block_counts([1.0, 1e-9, 1e-9])
    assert counts.tolist() == [2**20 - 2, 1, 1]


def test_bad_weights_are_refused():
    for weights in ([], [0.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="from 0 on"):
            block_counts(weights)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=4), st.integers(0, 2**63), st.integers(0, 5000))
@settings(max_examples=30, deadline=None)
def test_every_source_counts_its_rows_without_gaps(weights, seed, probe):
    mixture = Mixture(weights)
    samples = np.arange(3 * mixture.block)
    sources, rows = mixture.assign(samples, seed)
    for source, count in enumerate(mixture.counts):
        mine = rows[sources == source]
        assert mine.tolist() == list(range(3 * count))  # in the order of the samples
        for block in range(3):
            assert (sources[block * mixture.block :][: mixture.block] == source).sum() == count
    # any sample alone, from a fresh object, is where it is in the whole
    probe %= len(samples)
    source, row = Mixture(weights).assign(samples[probe : probe + 1], seed)
    assert (source[0], row[0]) == (sources[probe], rows[probe])


def test_order_depends_on_seed_and_block():
    mixture = Mixture([1, 1])
    first, second = (mixture.assign(np.arange(2 * mixture.block), seed)[0] for seed in (1, 2))
    assert (first != second).any()
    assert (first[: mixture.block] != first[mixture.block :]).any()
    assert len(np.unique(first[:16])) == 2  # shuffled, not one source after the other
