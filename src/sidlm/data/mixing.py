"""Which source a sample comes from, computed from its number alone: exact shares in fixed, shuffled blocks."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidlm.data.packing import permutation

MIN_BLOCK, MAX_BLOCK = 1 << 10, 1 << 20
OPEN_BLOCKS = 4
_MIX_KEY = 0x6D6978  # keeps the block shuffle apart from the document shuffles of the same seed

Ints = NDArray[np.int64]


def block_counts(weights: Sequence[float]) -> Ints:
    """Samples of each source in a block: the weights in whole numbers by largest remainder, at least one each that has
    a weight above 0.

    The block grows for small weights so that the smallest share stays accurate, up to 2**20 samples.
    """
    if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or not any(weights):
        raise ValueError(f"mixing weights must be numbers from 0 on, and not all 0, got {list(weights)}")
    if len(weights) > MAX_BLOCK:
        raise ValueError(f"cannot mix {len(weights)} sources, at most {MAX_BLOCK}")
    share = np.asarray(weights, np.float64) / math.fsum(weights)
    block = min(MAX_BLOCK, max(MIN_BLOCK, 2 ** math.ceil(math.log2(64 / float(share[share > 0].min())))))
    exact = share * block
    counts = np.maximum(np.floor(exact).astype(np.int64), (share > 0).astype(np.int64))
    missing = block - int(counts.sum())
    if missing > 0:
        behind = np.where(share > 0, counts - exact, np.inf)
        counts[np.argsort(behind, kind="stable")[:missing]] += 1
    while missing < 0:  # the ones raised to 1 are paid for by the largest
        largest = int(np.argmax(counts))
        counts[largest] -= 1
        missing += 1
    return counts


class Mixture:
    """Deals samples to sources by weight."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts = block_counts(weights)
        self.block = int(self.counts.sum())
        self._owners = np.repeat(np.arange(len(self.counts)), self.counts)
        # number of the sample among its source's samples in the block, before the shuffle
        self._blocks: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()

    def assign(self, samples: Ints, seed: int) -> tuple[Ints, Ints]:
        """The source (n,) of each sample (n,) and the row (n,) within that source's own sequence of rows."""
        blocks, places = np.divmod(samples, self.block)
        sources, rows = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks):
            here = blocks == block
            source, rank = self._deal(seed, int(block))
            sources[here] = source[places[here]]
            rows[here] = block * self.counts[sources[here]] + rank[places[here]]
        return sources, rows

    def rows_before(self, samples: int, seed: int) -> list[int]:
        """How many of the first `samples` samples each source has."""
        blocks, rest = divmod(samples, self.block)
        counts = blocks * self.counts
        if rest:
            counts = counts + np.bincount(self._deal(seed, blocks)[0][:rest], minlength=len(counts))
        return counts.tolist()

    def _deal(self, seed: int, block: int) -> tuple[Ints, Ints]:
        key = (seed, block)
        if key not in self._blocks:
            if len(self._blocks) >= OPEN_BLOCKS:
                self._blocks.popitem(last=False)
            dealt = self._owners[permutation(self.block, seed, _MIX_KEY, block)]
            by_source = np.argsort(dealt, kind="stable")
            firsts = np.cumsum(self.counts) - self.counts
            rank = np.empty(self.block, np.int64)
            rank[by_source] = np.arange(self.block) - firsts[dealt[by_source]]
            self._blocks[key] = (dealt, rank)
        self._blocks.move_to_end(key)
        return self._blocks[key]
