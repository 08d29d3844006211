"""Opening the data of a run, and batches that are a pure function of (seed, step, world)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from sidlm.data.cache import Log, TokenShard, load_shard
from sidlm.data.config import DataConfig, parse_source
from sidlm.data.mixing import Mixture
from sidlm.data.packing import Ints, TokenStore, TokenStream, pack
from sidlm.data.sources import find_shards
from sidlm.data.tokenizer import Tokenizer
from sidlm.errors import SidError


@dataclass(frozen=True)
class Batch:
    """Packed rows, each field int64 of shape (rows, seq_len).

    labels are already shifted, -100 where the next token belongs to another document; positions restart at 0 with each
    document and row; doc_ids number a row's documents from 0.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    doc_ids: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.tokens[rows], self.labels[rows], self.positions[rows], self.doc_ids[rows])

    @property
    def packed(self) -> bool:
        """Whether some row holds more than one document; of a batch on the host, for on a GPU it waits."""
        return bool(self.doc_ids.any())

    def offsets(self) -> tuple[Tensor, int]:
        """Where documents begin in the rows one behind the other, (N + 1,) int32 with the number of tokens at the end,
        and the length of the longest, rounded up to a power of two so that compiled code meets few of them."""
        first = (self.positions == 0).flatten().nonzero()[:, 0]
        offsets = torch.cat((first, first.new_full((1,), self.positions.numel())))
        longest = 1 << (int(offsets.diff().max()) - 1).bit_length()
        return offsets.int(), min(longest, self.positions.shape[1])

    def pinned(self) -> Batch:
        """A copy in memory that a GPU reads while the CPU goes on."""
        return Batch(*(t.pin_memory() for t in (self.tokens, self.labels, self.positions, self.doc_ids)))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        fields = (self.tokens, self.labels, self.positions, self.doc_ids)
        return Batch(*(field.to(device, non_blocking=non_blocking) for field in fields))


class TrainDataset:
    """The endless sequence of training samples; sample n, a row, depends on n and the seed only.

    streams: one per weighted source, or a single one with every document when no weights were given.
    tokens_by_source, tokens_by_domain: training tokens of one epoch. fingerprint: changes with the documents, tokenizer
    or weights.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[float],
        *,
        seq_len: int,
        tokens_by_source: dict[str, int] | None = None,
        tokens_by_domain: dict[str, int] | None = None,
        fingerprint: str = "",
    ) -> None:
        if len(streams) != len(weights):
            raise ValueError(f"{len(streams)} streams but {len(weights)} weights")
        self.streams = tuple(streams)
        self.offsets = [0] * len(self.streams)
        self.mixture = Mixture(weights)
        self.seq_len = seq_len
        self.tokens_by_source = tokens_by_source or {}
        self.tokens_by_domain = tokens_by_domain or {}
        self.fingerprint = fingerprint
        self.num_tokens = sum(stream.num_tokens for stream in streams)
        self.num_documents = sum(stream.num_documents for stream in streams)

    def part(self, seq_len: int, weights: Sequence[float] | None, offsets: Sequence[int]) -> TrainDataset:
        """The same documents in rows of another length or by other weights, from these positions of the streams on."""
        other = copy.copy(self)
        other.seq_len, other.offsets = seq_len, list(offsets)
        if weights is not None:
            if len(weights) != len(self.streams):
                raise ValueError(f"{len(self.streams)} streams but {len(weights)} weights")
            other.mixture = Mixture(weights)
        return other

    def batch(self, samples: Ints, seed: int) -> Batch:
        """The samples (n,) as a Batch of n rows. Raises ValueError for a negative sample."""
        if len(samples) and int(samples.min()) < 0:
            raise ValueError(f"sample numbers start at 0, got {int(samples.min())}")
        sources, rows = self.mixture.assign(samples, seed)
        tokens = np.empty((len(samples), self.seq_len + 1), np.int64)
        segments = np.empty_like(tokens)
        for source in np.unique(sources):
            here = sources == source
            tokens[here], segments[here] = self.streams[source].rows(
                rows[here], self.seq_len, seed, self.offsets[source]
            )
        return Batch(*map(torch.from_numpy, pack(tokens, segments)))


class Loader:
    """The batches of one rank. `batch_size` is the number of rows of the whole (global) batch.

    Rank r of `world` gets rows [r, r + 1) * batch_size / world of the global batch, which itself does not depend on
    `world`. There is no state: a resumed run asks for the step it is at.
    """

    def __init__(self, dataset: TrainDataset, *, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world} ranks (0 to {world - 1})")
        if batch_size % world:
            raise ValueError(f"batch_size {batch_size} is not divisible by the {world} data-parallel ranks")
        self.dataset, self.seed, self.rank, self.world = dataset, seed, rank, world
        self.batch_size, self.local_batch_size = batch_size, batch_size // world

    def batch(self, step: int) -> Batch:
        """This rank's (batch_size / world, seq_len) rows of the step's batch, steps from 0."""
        first = step * self.batch_size + self.rank * self.local_batch_size
        return self.dataset.batch(np.arange(first, first + self.local_batch_size, dtype=np.int64), self.seed)


@dataclass(frozen=True)
class ValidDocument:
    """A held-out document: token ids with bos and eos (int64), its text and the text's UTF-8 size."""

    domain: str
    tokens: Ints
    num_bytes: int
    text: str


class ValidDocuments(Sequence[ValidDocument]):
    """Held-out documents, read when asked for. The text is decoded from the tokens (exact for byte-level BPE)."""

    def __init__(self, store: TokenStore, pool: _Pool, tokenizer: Tokenizer) -> None:
        self._store, self._pool, self._tokenizer = store, pool, tokenizer
        self.num_tokens = int(pool.lengths.sum())
        self.num_bytes = int(pool.num_bytes.sum())

    def __len__(self) -> int:
        return len(self._pool.starts)

    @overload
    def __getitem__(self, index: int) -> ValidDocument: ...

    @overload
    def __getitem__(self, index: slice) -> list[ValidDocument]: ...

    def __getitem__(self, index: int | slice) -> ValidDocument | list[ValidDocument]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        index %= len(self)
        pool = self._pool
        tokens = self._store.slice(int(pool.starts[index]), int(pool.starts[index] + pool.lengths[index]))
        text = self._tokenizer.decode(tokens[1:-1].tolist())
        return ValidDocument(pool.domain_names[pool.domains[index]], tokens, int(pool.num_bytes[index]), text)

    def __iter__(self) -> Iterator[ValidDocument]:
        return (self[i] for i in range(len(self)))


class Data(NamedTuple):
    """What a run reads: rows to train on and documents to validate on (possibly none)."""

    train: TrainDataset
    valid: ValidDocuments


def open_data(cfg: DataConfig, tokenizer: Tokenizer, *, log: Log | None = None) -> Data:
    """Tokenise (or find in the cache) all sources and split off validation.

    `log` gets one line per shard built and per warning. Without `cfg.valid`, documents are held out by
    `held_out_hashes`. Raises SidError for missing, damaged or empty sources.
    """
    log = log or (lambda _: None)
    names = [parse_source(source).location for source in cfg.train]
    train_shards = [_load_source(source, cfg, tokenizer, log) for source in cfg.train]
    valid_shards = [_load_source(source, cfg, tokenizer, log) for source in cfg.valid]
    store = TokenStore([shard for shards in (*train_shards, *valid_shards) for shard in shards])
    pools, first = [], 0
    for shards in (*train_shards, *valid_shards):
        pools.append(_pool(store, first, shards))
        first += len(shards)
    train, valid = pools[: len(names)], pools[len(names) :]
    if cfg.valid:
        held_out = _concatenate(valid)
        shared = int(sum(np.isin(pool.hashes, held_out.hashes).sum() for pool in train))
        if shared:
            log(f"warning: {shared:,} training documents are also validation documents; validation will look too good")
    else:
        everything = _concatenate(train)
        hashes = held_out_hashes(everything.hashes, everything.domains, cfg.valid_fraction)
        for pool in train:  # a source keeps a document to train on
            if np.isin(pool.hashes, hashes).all():
                hashes = hashes[hashes != pool.hashes.max()]
        held_out = everything.select(np.isin(everything.hashes, hashes))
        train = [pool.select(~np.isin(pool.hashes, hashes)) for pool in train]
        if cfg.valid_fraction > 0 and not len(held_out.starts):
            log("warning: there are too few documents to hold any out for validation")
    return Data(_dataset(cfg, tokenizer, store, names, train), ValidDocuments(store, held_out, tokenizer))


def held_out_hashes(hashes: np.ndarray, domains: np.ndarray, fraction: float) -> np.ndarray:
    """Hashes of the documents to hold out: those below fraction * 2**64, independent of any order.

    Chance may leave small data with too few, so the lowest hashes are added up to round(fraction * n) of each domain's
    n documents (100 at most), up to one in all, and never the last of all.
    """
    unique = np.unique(hashes)
    if fraction <= 0 or len(unique) < 2:
        return unique[:0]
    chosen = [unique[unique < np.uint64(fraction * 2**64)], unique[:1]]
    for domain in np.unique(domains):
        inside = np.unique(hashes[domains == domain])
        chosen.append(inside[: min(100, int(fraction * len(inside) + 0.5))])
    held_out = np.unique(np.concatenate(chosen))
    return held_out[: len(unique) - 1]


@dataclass(frozen=True)
class _Pool:
    """Columns over documents; `starts` are addresses in the store."""

    starts: Ints
    lengths: Ints
    hashes: np.ndarray
    num_bytes: Ints
    domains: Ints
    domain_names: tuple[str, ...]

    def select(self, mask: np.ndarray) -> _Pool:
        return _Pool(
            self.starts[mask],
            self.lengths[mask],
            self.hashes[mask],
            self.num_bytes[mask],
            self.domains[mask],
            self.domain_names,
        )

    def tokens_by_domain(self) -> dict[str, int]:
        sums = np.zeros(len(self.domain_names), np.int64)
        np.add.at(sums, self.domains, self.lengths)
        return {name: int(count) for name, count in zip(self.domain_names, sums, strict=True) if count}


def _load_source(source: str, cfg: DataConfig, tokenizer: Tokenizer, log: Log) -> list[TokenShard]:
    shards = [load_shard(shard, cfg, tokenizer, log=log) for shard in find_shards(source, cfg)]
    if not sum(len(shard.ends) for shard in shards):
        raise SidError(f"data source {source!r} holds no documents: every text in its {len(shards)} shards is empty")
    return shards


def _pool(store: TokenStore, first: int, shards: Sequence[TokenShard]) -> _Pool:
    parts = []
    for index, shard in enumerate(shards, first):
        begins = np.concatenate([[0], shard.ends])[:-1].astype(np.int64)
        domains = shard.domains.astype(np.int64)
        starts = begins + store.bases[index]
        parts.append(_Pool(starts, shard.ends - begins, shard.hashes, shard.num_bytes, domains, shard.domain_names))
    return _concatenate(parts)


def _concatenate(pools: Sequence[_Pool]) -> _Pool:
    names: dict[str, int] = {}
    domains = []
    for pool in pools:
        renumber = np.array([names.setdefault(name, len(names)) for name in pool.domain_names], np.int64)
        domains.append(renumber[pool.domains])
    return _Pool(
        np.concatenate([pool.starts for pool in pools]),
        np.concatenate([pool.lengths for pool in pools]),
        np.concatenate([pool.hashes for pool in pools]),
        np.concatenate([pool.num_bytes for pool in pools]),
        np.concatenate(domains),
        tuple(names),
    )


def _dataset(
    cfg: DataConfig, tokenizer: Tokenizer, store: TokenStore, names: list[str], pools: list[_Pool]
) -> TrainDataset:
    weights = [parse_source(source).weight for source in cfg.train]
    total: dict[str, int] = {}
    for pool in pools:
        for domain, count in pool.tokens_by_domain().items():
            total[domain] = total.get(domain, 0) + count
    digest = hashlib.sha256(json.dumps([tokenizer.fingerprint, weights]).encode())
    by_source: dict[str, int] = {}
    for name, pool in zip(names, pools, strict=True):
        by_source[name] = by_source.get(name, 0) + int(pool.lengths.sum())
        for column in (pool.hashes, pool.lengths):
            digest.update(np.ascontiguousarray(column).tobytes())
    weighted = [weight for weight in weights if weight is not None]
    if not weighted:  # one pool: every document once per epoch
        pools, weighted = [_concatenate(pools)], [1.0]
    streams = [TokenStream(store, pool.starts, pool.lengths, index=i) for i, pool in enumerate(pools)]
    return TrainDataset(
        streams,
        weighted,
        seq_len=cfg.seq_len,
        tokens_by_source=by_source,
        tokens_by_domain=total,
        fingerprint=digest.hexdigest()[:32],
    )
