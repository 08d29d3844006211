"""Where the training text comes from and how it becomes rows of tokens."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data of a run: sources, held-out validation, tokenizer, row length and cache.

    A source is `PATH` or `PATH=WEIGHT`. PATH is a text file, a folder (read recursively), a glob, a `.jsonl`,
    `.jsonl.gz`, `.jsonl.zst` or `.parquet` file, `hf:NAME[@CONFIG][:SPLIT]` (a Hugging Face data set or a local folder
    of one), or `embedded` (the standard library of the running Python).

    Weights: give one to every training source or to none. With weights, a source supplies that share of the rows (hence
    of the tokens), exactly, however small it is: small sources are repeated. Without weights all sources are one pool
    of documents, so each supplies tokens in proportion to its size and every document is seen once per epoch.
    """

    train: tuple[str, ...] = ("embedded",)
    """Training sources, each PATH or PATH=WEIGHT; one of weight 0 is read when recipe.mix gives it one."""

    valid: tuple[str, ...] = ()
    """Validation sources, used whole. Empty: hold out valid_fraction of the training documents instead."""

    valid_fraction: float = 0.01
    """Share of training documents held out for validation when valid is empty, chosen by a hash of the text."""

    tokenizer: str = ""
    """Folder of a tokenizer, or a tokenizer.json. Empty: train one on the training sources."""

    vocab_size: int = 4096
    """Vocabulary of the tokenizer to train, special tokens included. Unused when tokenizer is given."""

    text_key: str = "text"
    """Field (jsonl) or column (parquet, hf) that holds a document's text."""

    domain_key: str = "domain"
    """Field or column that names a document's domain, if there is one. Without it the domain is the source's name."""

    seq_len: int = 512
    """Tokens the model sees in a row."""

    cache_dir: str = ""
    """Folder of tokenised data. Empty: $SID_CACHE, else ~/.cache/sid."""

    skip_corrupt: bool = False
    """Skip the unreadable rest of a damaged input file with a warning instead of stopping."""

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"data.{name} must be a list of sources, got the single string {value!r}")
            object.__setattr__(self, name, tuple(value))
        if not self.train:
            raise ValueError("data.train is empty: give at least one source, for example 'embedded'")
        if not 0.0 <= self.valid_fraction < 1.0:
            raise ValueError(f"data.valid_fraction must be in [0, 1), got {self.valid_fraction}")
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len must be at least 1, got {self.seq_len}")
        if self.vocab_size < 1:
            raise ValueError(f"data.vocab_size must be positive, got {self.vocab_size}")
        if not self.text_key:
            raise ValueError("data.text_key is empty: name the field that holds the text")
        weights = [parse_source(source).weight for source in self.train]
        if any(w is None for w in weights) and any(w is not None for w in weights):
            bare = self.train[weights.index(None)]
            raise ValueError(f"data.train: {bare!r} has no weight but others have; give every source a weight, or none")
        if weights[0] is not None and not any(weights):
            raise ValueError("data.train: every weight is 0, so there is nothing to read")
        for source in self.valid:
            if parse_source(source).weight is not None:
                raise ValueError(
                    f"data.valid: {source!r} has a weight; validation sources are used whole, without weights"
                )

    @property
    def cache_path(self) -> Path:
        """The cache folder after defaults (cache_dir, $SID_CACHE, ~/.cache/sid)."""
        return Path(self.cache_dir or os.environ.get("SID_CACHE") or "~/.cache/sid").expanduser()


@dataclass(frozen=True)
class Source:
    """A source without its weight suffix; weight None means none was given."""

    location: str
    weight: float | None


def parse_source(text: str) -> Source:
    """Split `PATH=WEIGHT`; an existing path is left whole. Raises ValueError for an empty path or bad weight."""
    path, equals, tail = text.rpartition("=")
    if equals and not Path(text).expanduser().exists():
        try:
            weight = float(tail)
        except ValueError:
            weight = None
        if weight is not None:
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"data source {text!r}: the weight must be a number from 0 on, got {tail}")
            if not path:
                raise ValueError(f"data source {text!r} has no path before the weight")
            return Source(path, weight)
    if not text.strip():
        raise ValueError("a data source is an empty string")
    return Source(text, None)
