"""Documents laid end to end in a seeded order and cut into rows; any row is computed from its number alone.

An epoch is all documents of a stream, concatenated in an order that depends on (seed, stream, epoch). Epochs follow
each other without a gap, and row r covers positions r * seq_len to (r + 1) * seq_len of that endless line, both ends
included: a row's last token is only predicted and is the first input of the next row, so every token is predicted once
per epoch. A row may thus hold the end of one epoch and the start of the next or, if the data is shorter than a row,
several epochs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sidlm.data.cache import TokenShard

IGNORE = -100  # label of a position with nothing to predict
OPEN_FILES = 256  # memory maps held at once; each costs a file descriptor
OPEN_EPOCHS = 3

Ints = NDArray[np.int64]


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's output function, a scattering bijection. Unlike numpy's generators it will never change."""
    with np.errstate(over="ignore"):
        values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def permutation(size: int, *keys: int) -> Ints:
    """A permutation of range(size) that is a pure function of the integer keys."""
    state = np.zeros(1, np.uint64)
    for key in keys:
        state = mix64(state ^ mix64(np.array([key & 0xFFFFFFFFFFFFFFFF], np.uint64)))
    with np.errstate(over="ignore"):
        # golden-ratio steps from a random start are splitmix64 itself
        draws = mix64(state + np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(draws, kind="stable").astype(np.int64)


class TokenStore:
    """The tokens of many shards under one address: shard i's first token is `bases[i]`."""

    def __init__(self, shards: Sequence[TokenShard]) -> None:
        self.shards = tuple(shards)
        sizes = np.array([shard.num_tokens for shard in self.shards], np.int64)
        self.bases: Ints = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._maps: OrderedDict[int, NDArray[np.integer]] = OrderedDict()

    def gather(self, addresses: Ints) -> Ints:
        """Tokens at the addresses, same shape, int64."""
        result = np.empty(addresses.shape, np.int64)
        owner = np.searchsorted(self.bases, addresses, side="right") - 1
        for shard in np.unique(owner):
            here = owner == shard
            result[here] = self._map(int(shard))[addresses[here] - self.bases[shard]]
        return result

    def slice(self, start: int, stop: int) -> Ints:
        """Tokens of one document, int64."""
        return self.gather(np.arange(start, stop, dtype=np.int64))

    def _map(self, shard: int) -> NDArray[np.integer]:
        if shard not in self._maps:
            if len(self._maps) >= OPEN_FILES:
                self._maps.popitem(last=False)
            self._maps[shard] = self.shards[shard].map_tokens()
        self._maps.move_to_end(shard)
        return self._maps[shard]


class TokenStream:
    """An endless shuffled line of documents, given by their addresses and lengths in a store (int64, each (n,))."""

    def __init__(self, store: TokenStore, starts: Ints, lengths: Ints, *, index: int = 0) -> None:
        if len(starts) == 0 or int(lengths.min()) < 1:
            raise ValueError(f"a token stream needs documents of at least one token, got {len(starts)} documents")
        self.store, self.starts, self.lengths, self.index = store, starts, lengths, index
        self.num_tokens = int(lengths.sum())
        self.num_documents = len(starts)
        self._epochs: OrderedDict[tuple[int, int], tuple[Ints, Ints]] = OrderedDict()

    def rows(self, row_ids: Ints, seq_len: int, seed: int, offset: int = 0) -> tuple[Ints, Ints]:
        """Tokens (n, seq_len + 1) of the rows (n,), and segment numbers alike that change at each document.

        offset: position of the endless line at which row 0 begins.
        """
        line = row_ids[:, None] * seq_len + np.arange(offset, offset + seq_len + 1, dtype=np.int64)
        epochs, offsets = np.divmod(line, self.num_tokens)
        addresses, segments = np.empty_like(line), np.empty_like(line)
        for epoch in np.unique(epochs):
            order, ends = self._epoch(seed, int(epoch))
            here = epochs == epoch
            within = offsets[here]
            place = np.searchsorted(ends, within, side="right")
            document = order[place]
            addresses[here] = self.starts[document] + within - (ends[place] - self.lengths[document])
            segments[here] = epoch * self.num_documents + place
        return self.store.gather(addresses), segments

    def _epoch(self, seed: int, epoch: int) -> tuple[Ints, Ints]:
        key = (seed, epoch)
        if key not in self._epochs:
            if len(self._epochs) >= OPEN_EPOCHS:
                self._epochs.popitem(last=False)
            order = permutation(self.num_documents, seed, self.index, epoch)
            self._epochs[key] = (order, np.cumsum(self.lengths[order]))
        self._epochs.move_to_end(key)
        return self._epochs[key]


def pack(tokens: Ints, segments: Ints) -> tuple[Ints, Ints, Ints, Ints]:
    """Inputs, labels, positions and doc_ids (n, T) of rows (n, T + 1).

    A label is the next token, or -100 where that one belongs to another document. Positions count from 0 at the start
    of the row and of each document in it; doc_ids number the row's documents 0, 1, 2...
    """
    same = segments[:, 1:] == segments[:, :-1]
    labels = np.where(same, tokens[:, 1:], IGNORE)
    fresh = np.zeros_like(same)
    fresh[:, 1:] = ~same[:, :-1]
    doc_ids = np.cumsum(fresh, axis=1, dtype=np.int64)
    column = np.arange(same.shape[1], dtype=np.int64)[None, :]
    positions = column - np.maximum.accumulate(np.where(fresh, column, 0), axis=1)
    return np.ascontiguousarray(tokens[:, :-1]), labels, positions, doc_ids
