"""Statistics of the study of token efficiency: pairs by seed, intervals from Student's t, spread between seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


def student(degrees: int) -> float:
    """The half-width of a 95% interval in standard errors."""
    from scipy import stats  # slow to import, and not needed by who only wants differences

    return float(stats.t.ppf(0.975, degrees))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with the half-width of its 95% interval (infinite for one seed)."""

    value: float
    half: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:+.4f} ± {self.half:.4f}" if math.isfinite(self.half) else f"{self.value:+.4f} (one)"


def mean(values: list[float]) -> Mean:
    n = len(values)
    half = student(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Mean(statistics.mean(values), float(half), n)


def key(row: Row) -> tuple[Any, ...]:
    """What two rows of a pair share: the size, the length, the batch, the seed, the learning rate and its run."""
    return row["size"], row["steps"], row["batch"], row["seed"], row["lr"], row["repeat"]


def losses(rows: list[Row], variant: str, value: Any = lambda row: row["loss"]) -> dict[tuple[Any, ...], float]:
    return {key(row): value(row) for row in rows if row["variant"] == variant}


def differences(rows: list[Row], variant: str, base: str, value: Any = lambda row: row["loss"]) -> list[float]:
    """variant minus base, a number for each pair."""
    one, other = losses(rows, variant, value), losses(rows, base, value)
    return [one[k] - other[k] for k in sorted(one.keys() & other.keys())]


def common_spread(groups: list[list[float]]) -> tuple[float, int]:
    """(standard deviation, degrees of freedom) within the groups, one for all of them."""
    degrees = sum(len(g) - 1 for g in groups)
    if degrees == 0:
        return math.inf, 0
    return math.sqrt(sum((x - statistics.mean(g)) ** 2 for g in groups for x in g) / degrees), degrees


def pooled(groups: list[list[float]], spread: float, degrees: int) -> Mean:
    """Mean over sizes of the mean over seeds, where single differences have this standard deviation everywhere."""
    groups = [g for g in groups if g]
    centre = statistics.mean(statistics.mean(g) for g in groups)
    if degrees == 0:
        return Mean(centre, math.inf, sum(map(len, groups)))
    error = spread * math.sqrt(sum(1 / len(g) for g in groups)) / len(groups)
    return Mean(centre, student(degrees) * error, sum(map(len, groups)))


def seeds_needed(spread: float, resolve: float) -> int:
    """Pairs whose 95% interval is at most +- resolve for differences of this standard deviation."""
    n = 2
    while student(n - 1) * spread / math.sqrt(n) > resolve and n < 10_000:
        n += 1
    return n


def by_length(rows: list[Row], size: str, variant: str) -> dict[int, dict[int, float]]:
    """{seed: {tokens: loss}} of the runs of one size and variant."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if (row["size"], row["variant"]) == (size, variant):
            found[row["seed"]][row["tokens"]] = row["loss"]
    return found


def loss_at(curve: dict[int, float], tokens: float) -> float:
    """Loss at a number of tokens, by lines in log-log between measured lengths and on beyond the last two."""
    known = sorted(curve)
    after = next((i for i, n in enumerate(known) if n >= tokens), len(known) - 1)
    low, high = known[max(1, after) - 1], known[max(1, after)]
    slope = math.log(curve[high] / curve[low]) / math.log(high / low)
    return curve[low] * (tokens / low) ** slope


def at_equal_flops(rows: list[Row], variant: str, base: str, size: str, tokens: int) -> list[float]:
    """Loss of a variant after `tokens` minus the base's after as many FLOPs, for each seed that has both."""
    mine, other = by_length(rows, size, variant), by_length(rows, size, base)
    cost = {row["variant"]: row["flops"] / row["tokens"] for row in rows if row["size"] == size}
    return [
        mine[seed][tokens] - loss_at(other[seed], tokens * cost[variant] / cost[base])
        for seed in sorted(mine.keys() & other.keys())
        if tokens in mine[seed] and len(other[seed]) > 1
    ]


def slope(rows: list[Row], size: str, variant: str = "full") -> Mean | None:
    """dL / d ln D at the size between its two longest lengths, by seeds that have both."""
    found = []
    for curve in by_length(rows, size, variant).values():
        if len(curve) > 1:
            low, high = sorted(curve)[-2:]
            found.append((curve[high] - curve[low]) / math.log(high / low))
    return mean(found) if found else None


def tokens_saved(difference: Mean, steepness: Mean) -> tuple[float, float, float]:
    """(estimate, low, high): share of the baseline's tokens that a variant needs less for the baseline's loss.

    A difference d is worth a factor exp(d / |dL / d ln D|) of tokens; the slope's own error is not in the interval.
    """
    factors = [math.exp(d / abs(steepness.value)) for d in
               (difference.value, difference.value + difference.half, difference.value - difference.half)]  # fmt: skip
    return 1 - factors[0], 1 - factors[1], 1 - factors[2]
