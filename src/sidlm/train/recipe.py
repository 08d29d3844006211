"""What changes while a run goes on: batch size, row length and mix of sources, after numbers of tokens.

Llama 3 begins with 4M tokens a step in rows of 4,096, doubles both after 252M tokens and the batch again after 2.87T
(arXiv 2407.21783, section 3.4.1), and changes the mix of its sources several times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sidlm.data.phases import Phase, last_steps, plan_phases
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.train.config import RunConfig

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What changes while the run goes on, after numbers of tokens: `252M` is 252,000,000, with K, M, B or T."""

    batch: tuple[str, ...] = ()
    """TOKENS:ROWSxLENGTH, in any number: after so many tokens a step has ROWS rows of LENGTH tokens, e.g.
    252M:1024x8192; before, train.batch_size rows of data.seq_len. A micro-batch keeps its number of tokens"""
    mix: tuple[str, ...] = ()
    """TOKENS:WEIGHT,WEIGHT,...: after so many tokens the sources of data.train have these weights, in their order; 0
    leaves one out"""


def phases(cfg: RunConfig) -> tuple[Phase, ...]:
    """The phases of a run. Raises SidError for a change that cannot be read, naming it."""
    first = Phase(first_step=0, tokens=0, batch_size=cfg.train.batch_size, seq_len=cfg.data.seq_len)
    changes: list[tuple[int, dict]] = []
    for text in cfg.recipe.batch:
        tokens, (rows, length) = parse_change("recipe.batch", text, "TOKENS:ROWSxLENGTH", "x", 2)
        if rows < 1 or length < 1 or rows % 1 or length % 1:
            raise SidError(f"recipe.batch: {text!r} must have whole numbers above 0 of rows and tokens in a row")
        changes.append((tokens, {"batch_size": int(rows), "seq_len": int(length)}))
    sources = len(cfg.data.train)
    for text in cfg.recipe.mix:
        tokens, weights = parse_change("recipe.mix", text, "TOKENS:WEIGHT,WEIGHT,...", ",", sources)
        if min(weights) < 0 or not sum(weights) > 0 or not all(map(math.isfinite, weights)):
            raise SidError(f"recipe.mix: the weights of {text!r} must be 0 or more, and not all 0")
        changes.append((tokens, {"weights": tuple(weights)}))
    if cfg.recipe.mix and sources > 1 and not any(_weighted(source) for source in cfg.data.train):
        raise SidError("recipe.mix changes weights, but the sources of data.train have none: give each PATH=WEIGHT")
    return plan_phases(first, changes)


def micro_batch_rows(cfg: RunConfig, seq_len: int) -> int:
    """Rows of a micro-batch where rows have `seq_len` tokens, 0 if train.micro_batch_size is: one keeps its tokens."""
    size = cfg.train.micro_batch_size
    return max(1, size * cfg.data.seq_len // seq_len) if size else 0


def anneal_steps(cfg: RunConfig) -> int:
    """Last steps in which the learning rate falls to zero: those that hold schedule.anneal_tokens."""
    if not cfg.schedule.anneal_tokens:
        return 0
    return last_steps(phases(cfg), cfg.train.steps, cfg.schedule.anneal_tokens)


def _weighted(source: str) -> bool:
    from sidlm.data.config import parse_source

    return parse_source(source).weight is not None


def parse_change(key: str, text: str, form: str, separator: str, count: int) -> tuple[int, list[float]]:
    """TOKENS:NUMBER<separator>NUMBER... as (tokens, `count` numbers). Raises SidError, naming the key, for others."""
    after, _, what = text.partition(":")
    try:
        numbers = [float(word) for word in what.split(separator)]
        unit = after[-1:].upper() if after[-1:].isalpha() else ""
        tokens = round(float(after[: len(after) - len(unit)]) * UNITS[unit])
    except (ValueError, KeyError) as error:
        raise SidError(f"{key}: {text!r} is not {form}") from error
    if len(numbers) != count:
        raise SidError(f"{key}: {text!r} has {len(numbers)} numbers behind the colon, not {count} ({form})")
    if tokens < 0:
        raise SidError(f"{key}: {text!r} begins before the run")
    return tokens, numbers
