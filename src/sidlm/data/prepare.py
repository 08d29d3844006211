"""The tokenizer of a run: the one the config names, or one trained on a bounded sample of the training data."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sidlm.data.cache import Log, build_lock, text_hash
from sidlm.data.config import DataConfig, parse_source
from sidlm.data.packing import permutation
from sidlm.data.sources import Shard, find_shards, iter_shard
from sidlm.data.tokenizer import SPLIT_PATTERN, Tokenizer, clean, train_tokenizer
from sidlm.errors import SidError

SAMPLE_BYTES = 8 << 20
SAMPLE_SHARDS = 32  # per source; the first part of this many evenly spaced shards is read


def prepare_tokenizer(
    cfg: DataConfig,
    out_dir: str | Path,
    *,
    num_special: int = 256,
    max_bytes: int = SAMPLE_BYTES,
    log: Log | None = None,
) -> Tokenizer:
    """Load cfg.tokenizer, or train one on at most max_bytes of cfg.train; save it in out_dir either way.

    The sources share the bytes by weight, equally without weights; texts whose hash falls below valid_fraction are left
    out. Training is deterministic and remembered in the cache folder, so asking again for unchanged data costs nothing.
    Raises SidError when the sources are missing or empty, ValueError when vocab_size is too small.
    """
    log = log or (lambda _: None)
    given = cfg.tokenizer
    tokenizer = Tokenizer.load(given) if given else _train_or_find(cfg, num_special, max_bytes, log)
    try:
        tokenizer.save(out_dir)
    except OSError as error:
        raise SidError(f"cannot save the tokenizer in {out_dir}: {error.strerror or error}") from error
    return tokenizer


def sample_texts(cfg: DataConfig, max_bytes: int = SAMPLE_BYTES) -> Iterator[str]:
    """At most max_bytes of training text, always the same: sources give by weight, the shards of one evenly."""
    readers: list[Iterator[str]] = []
    costs: list[float] = []
    for source in cfg.train:
        shards = find_shards(source, cfg)
        if len(shards) > SAMPLE_SHARDS:
            shards = [shards[i * len(shards) // SAMPLE_SHARDS] for i in range(SAMPLE_SHARDS)]
        readers += [_texts(_shuffled_files(shard), cfg) for shard in shards]
        costs += [len(shards) / (parse_source(source).weight or 1.0)] * len(shards)
    queue = [(0.0, i) for i in range(len(readers))]
    left = max_bytes
    while queue and left > 0:
        paid, i = heapq.heappop(queue)  # the shard that has given the least for its share
        text = next(readers[i], None)
        if text is None:
            continue
        piece = text.encode()[:left]
        left -= len(piece)
        heapq.heappush(queue, (paid + len(piece) * costs[i], i))
        yield piece.decode("utf-8", "ignore")


def _shuffled_files(shard: Shard) -> Shard:
    # the first megabytes of a sorted folder are one corner of it
    order = permutation(len(shard.paths), len(shard.paths))
    return replace(shard, paths=tuple(shard.paths[i] for i in order))


def _texts(shard: Shard, cfg: DataConfig) -> Iterator[str]:
    limit = int((0.0 if cfg.valid else cfg.valid_fraction) * 2**64)
    for document in iter_shard(shard, cfg, on_corrupt=lambda _: None):  # reported when the shard is tokenised
        text = clean(document.text)
        if text_hash(text) >= limit:
            yield text


def _train_or_find(cfg: DataConfig, num_special: int, max_bytes: int, log: Log) -> Tokenizer:
    shards = [
        [parse_source(source).weight, [s.identity(cfg) for s in find_shards(source, cfg)]] for source in cfg.train
    ]
    recipe = [1, SPLIT_PATTERN, cfg.vocab_size, num_special, max_bytes, cfg.valid_fraction, bool(cfg.valid), shards]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:32]
    folder = cfg.cache_path / "tokenizers"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with build_lock(folder / f"{key}.lock", log):
            if (folder / key / "tokenizer_config.json").is_file():  # written last
                return Tokenizer.load(folder / key)
            tokenizer = _train(cfg, num_special, max_bytes, log)
            tokenizer.save(folder / key)
            return tokenizer
    except OSError as error:
        raise SidError(f"cannot write the data cache in {folder}: {error.strerror or error}") from error


def _train(cfg: DataConfig, num_special: int, max_bytes: int, log: Log) -> Tokenizer:
    texts = list(sample_texts(cfg, max_bytes))
    if not texts:
        raise SidError(f"data sources {', '.join(cfg.train)} hold no text to train a tokenizer on")
    size = sum(len(text.encode()) for text in texts)
    log(f"training a tokenizer of {cfg.vocab_size:,} tokens on {size / 1e6:.1f} MB of text")
    tokenizer = train_tokenizer(texts, cfg.vocab_size, num_special=num_special)
    if tokenizer.vocab_size < cfg.vocab_size:
        log(f"warning: the text is too short for {cfg.vocab_size:,} tokens, the tokenizer has {tokenizer.vocab_size:,}")
    return tokenizer
