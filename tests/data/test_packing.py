from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidlm.data.packing import TokenStore, TokenStream, mix64, pack, permutation


class Shard:
    """What a store needs of a shard; tokens are distinct, so that each tells where it comes from."""

    def __init__(self, first: int, size: int) -> None:
        self.num_tokens = size
        self.tokens = np.arange(first, first + size, dtype=np.uint32)

    def map_tokens(self):
        return self.tokens


def stream(lengths: list[int], cuts: int = 1, index: int = 0) -> TokenStream:
    """Documents of the lengths, laid over `cuts` shards (a document lies within one)."""
    parts = [part.tolist() for part in np.array_split(np.array(lengths), cuts)]
    first, shards = 0, []
    for part in parts:
        shards.append(Shard(first, sum(part)))
        first += sum(part)
    lens = np.array(lengths, np.int64)
    return TokenStream(TokenStore(shards), np.cumsum(lens) - lens, lens, index=index)


def naive(line: TokenStream, row: int, seq_len: int, seed: int) -> list[tuple[int, tuple[int, int]]]:
    """The row by walking the epochs token by token: (token, instance of its document)."""
    tokens: list[tuple[int, tuple[int, int]]] = []
    epoch = 0
    while len(tokens) < (row + 1) * seq_len + 1:
        for place, document in enumerate(permutation(line.num_documents, seed, line.index, epoch)):
            start, length = int(line.starts[document]), int(line.lengths[document])
            tokens += [(token, (epoch, place)) for token in range(start, start + length)]
        epoch += 1
    return tokens[row * seq_len : (row + 1) * seq_len + 1]


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=9)


@given(LENGTHS, st.integers(1, 20), st.integers(0, 30), st.integers(0, 2**64 - 1), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_rows_equal_the_naive_walk(lengths, seq_len, row, seed, cuts):
    line = stream(lengths, cuts, index=cuts)
    tokens, segments = line.rows(np.array([row, 0]), seq_len, seed)
    want = naive(line, row, seq_len, seed)
    assert tokens[0].tolist() == [token for token, _ in want]
    changes = [a != b for (_, a), (_, b) in pairwise(want)]
    assert (segments[0][1:] != segments[0][:-1]).tolist() == changes
    assert tokens[1].tolist() == [token for token, _ in naive(line, 0, seq_len, seed)]


@given(LENGTHS, st.integers(1, 20), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_token_is_an_input_once_per_epoch(lengths, seq_len, seed):
    line = stream(lengths)
    epochs = seq_len  # then the epochs end at a row's end
    tokens, segments = line.rows(np.arange(line.num_tokens), seq_len, seed)
    inputs, labels, _, _ = pack(tokens, segments)
    assert set(Counter(inputs.ravel().tolist()).values()) == {epochs}
    starts = set(line.starts.tolist())
    counted = Counter(labels[labels >= 0].tolist())
    assert counted == {token: epochs for token in range(line.num_tokens) if token not in starts}


def test_pack():
    tokens = np.array([[10, 11, 12, 20, 21, 30]])
    segments = np.array([[4, 4, 4, 5, 5, 6]])
    inputs, labels, positions, doc_ids = pack(tokens, segments)
    assert inputs.tolist() == [[10, 11, 12, 20, 21]]
    assert labels.tolist() == [[11, 12, -100, 21, -100]]
    assert positions.tolist() == [[0, 1, 2, 0, 1]]
    assert doc_ids.tolist() == [[0, 0, 0, 1, 1]]


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_pack_agrees_with_a_loop(changes):
    segments = np.cumsum(np.array(changes, np.int64), axis=1)
    tokens = np.arange(segments.size).reshape(segments.shape)
    inputs, labels, positions, doc_ids = pack(tokens, segments)
    for r in range(len(tokens)):
        position = document = 0
        for t in range(inputs.shape[1]):
            if t:
                same = segments[r, t] == segments[r, t - 1]
                position, document = (position + 1, document) if same else (0, document + 1)
            label = tokens[r, t + 1] if segments[r, t + 1] == segments[r, t] else -100
            assert (inputs[r, t], labels[r, t], positions[r, t], doc_ids[r, t]) == (
                tokens[r, t],
                label,
                position,
                document,
            )


@given(st.integers(0, 300), st.integers(0, 2**64 - 1), st.integers(0, 10))
@settings(deadline=None)
def test_permutation(size, seed, epoch):
    order = permutation(size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert order.tolist() == permutation(size, seed, epoch).tolist()


def test_permutations_differ_and_never_change():
    orders = {tuple(permutation(50, *keys).tolist()) for keys in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-1, 0)]}
    assert len(orders) == 6
    # splitmix64 from state 0, first outputs as published with the algorithm
    first = mix64(np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    assert [hex(x) for x in first] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_permutations_are_uniform():
    firsts = Counter(int(permutation(5, seed)[0]) for seed in range(2000))
    assert all(330 < count < 470 for count in firsts.values())  # 400 +- 4 sigma


def test_epochs_are_shuffled_differently():
    line = stream([3] * 40)
    tokens, _ = line.rows(np.arange(2), 120, 7)
    first, second = tokens[0, :120], tokens[1, :120]
    assert sorted(first) == sorted(second) == list(range(120))
    assert first.tolist() != second.tolist()


def test_no_documents():
    with pytest.raises(ValueError, match="at least one token, got 0 documents"):
        TokenStream(TokenStore([]), np.empty(0, np.int64), np.empty(0, np.int64))


def test_few_maps_are_open_at_once(monkeypatch):
    from sidlm.data import packing

    monkeypatch.setattr(packing, "OPEN_FILES", 2)
    line = stream([4] * 6, cuts=6)
    assert line.store.gather(np.arange(24)).tolist() == list(range(24))
    assert len(line.store._maps) == 2
