"""Statistics of the study of token efficiency: pairs by seed, intervals from Student's t, spread between seeds."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from scipy import stats

Row = dict[str, Any]


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
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
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
    return Mean(centre, float(stats.t.ppf(0.975, degrees) * error), sum(map(len, groups)))


def seeds_needed(spread: float, resolve: float) -> int:
    """Pairs whose 95% interval is at most +- resolve for differences of this standard deviation."""
    n = 2
    while stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) > resolve and n < 10_000:
        n += 1
    return n


def slope(rows: list[Row], size: str, variant: str = "full") -> Mean | None:
    """dL / d ln D at the size between its shortest and longest runs of the base rate and batch; by seeds that have
    both, each run with a schedule of its own length."""
    by_seed: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        kind = row["size"], row["variant"], row["lr"], row["batch"], row["repeat"]
        if kind == (size, variant, 1.0, 16, 0) and row["group"] != "speed":
            by_seed[row["seed"]][row["tokens"]] = row["loss"]
    found = []
    for curve in by_seed.values():
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


def exponent(rows: list[Row], variant: str) -> Mean | None:
    """The paper's form: -ln L = alpha ln N + const by least squares over the sizes, a line for each seed; E = 0."""
    by_seed: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["variant"] == variant:
            by_seed[row["seed"]].append((math.log(row["params_non_embedding"]), -math.log(row["loss"])))
    full = max((len(points) for points in by_seed.values()), default=0)
    lines = []
    for points in by_seed.values():
        if len(points) == full:
            (x, y), n = zip(*points, strict=True), len(points)
            centre = sum(x) / n
            lines.append(sum((a - centre) * b for a, b in zip(x, y, strict=True)) / sum((a - centre) ** 2 for a in x))
    return mean(lines) if full > 2 else None
