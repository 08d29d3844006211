"""Token efficiency as a number: what one variant needs to reach another's loss, and what it gains at equal cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from sidlm.errors import SidError
from sidlm.scaling.cells import Cells
from sidlm.scaling.fit import LEVEL, Fit, interval, law
from sidlm.scaling.forms import spent
from sidlm.scaling.law import Floats


def cost_per_token(cells: Cells, cost: Floats, params: Floats) -> Floats:
    """Cost of a token at sizes params, from runs' costs (n,): a line in log-log through the medians of the sizes."""
    sizes = np.unique(cells.params)
    if not np.isfinite(cost).all():
        return np.full(len(params), np.nan)
    each = [np.median((cost / cells.tokens)[cells.params == size]) for size in sizes]
    slope, intercept = np.polyfit(np.log(sizes), np.log(each), 1)
    # exact at measured sizes, by the line between and beyond them
    known = dict(zip(sizes.tolist(), each, strict=True))
    line = np.exp(intercept + slope * np.log(params))
    return np.array([known.get(size, value) for size, value in zip(params.tolist(), line.tolist(), strict=True)])


def tokens_to_reach(theta: Floats, params: float, loss: Floats) -> Floats:
    """Tokens at which a law (..., 5) of that size has the loss; inf where it never has."""
    e, a, b, _, beta = np.moveaxis(np.asarray(theta), -1, 0)
    alpha = np.asarray(theta)[..., 3]
    room = loss - e - a * params**-alpha
    reached = room > 0
    with np.errstate(over="ignore"):  # more tokens than a float holds is never, too
        return np.where(reached, np.exp(np.log(b / np.where(reached, room, 1.0)) / beta), np.inf)


def efficiency(base: Fit, other: Fit) -> dict[str, Any]:
    """`other` against `base`, in JSON: for each size of base at its largest token budget

    - tokens, flops, seconds: what other needs to reach base's loss at equal parameters, as ratios to what base spends
      (below 1: other is more efficient), with intervals from paired replicates; null where other never reaches it;
    - loss_at_equal_tokens, _flops, _seconds: other's loss minus base's at the same size and the same cost;

    `frontier`: the same where either variant has its best size for a budget of FLOPs (`frontier`);
    `paired`: measured differences of runs of one place and seed. flops are 6 N D unless the table has the column;
    seconds are absent unless it has tokens_per_second or wall_seconds.
    """
    df = min(base.df, other.df)
    points = []
    for size in np.unique(base.cells.params):
        tokens = float(base.cells.tokens[base.cells.params == size].max())
        points.append(_point(base, other, float(size), tokens, df))
    return {
        "base": base.cells.variant, "points": points, "frontier": frontier(base, other),
        "paired": paired(base.cells, other.cells),
    }  # fmt: skip


def _point(base: Fit, other: Fit, size: float, tokens: float, df: int) -> dict[str, Any]:
    ours, theirs = (np.concatenate([fit.estimate[None], fit.samples]) for fit in (base, other))
    target = law(ours, size, tokens)
    ratio = tokens_to_reach(theirs, size, target) / tokens
    found: dict[str, Any] = {"params": size, "tokens_of_base": tokens, "loss_of_base": float(target[0])}
    costs = {"tokens": 1.0}
    for name, spend in (("flops", spent), ("seconds", lambda cells: cells.seconds)):
        both = [cost_per_token(fit.cells, spend(fit.cells), np.array([size]))[0] for fit in (base, other)]
        if np.isfinite(both).all():
            costs[name] = both[1] / both[0]
    for name, cost in costs.items():
        found[name] = _ratio(ratio * cost, df)
        gap = law(theirs, size, tokens / cost) - target
        low, high = interval(gap[0], gap[1:], df, log=False)
        found[f"loss_at_equal_{name}"] = {"difference": float(gap[0]), "ci": [low, high]}
    return found


BUDGETS = 5
"""FLOP budgets of a frontier, from those of the smallest to those of the largest runs."""
FARTHEST = 10.0
"""Sizes are tried from so many times below the smallest that ran to as many times above the largest."""


@dataclass(frozen=True)
class Frontier:
    """The best a variant's law can do with a budget of FLOPs, for its estimate and replicates (r,): sizes tried (n,),
    what a token costs at each (n,), laws (r, 5)."""

    sizes: Floats
    cost: Floats
    laws: Floats

    @classmethod
    def of(cls, fit: Fit) -> Frontier:
        ran = np.unique(fit.cells.params)
        sizes = np.geomspace(ran[0] / FARTHEST, ran[-1] * FARTHEST, 161)
        cost = cost_per_token(fit.cells, spent(fit.cells), sizes)
        return cls(sizes, cost, np.concatenate([fit.estimate[None], fit.samples]))

    def best(self, flops: float) -> tuple[Floats, Floats]:
        """(loss, size) of the best size for the budget, each (r,)."""
        losses = law(self.laws[:, None], self.sizes, flops / self.cost)
        at = losses.argmin(1)
        return losses[np.arange(len(at)), at], self.sizes[at]


def frontier(base: Fit, other: Fit) -> list[dict[str, Any]]:
    """Both variants where each is as large as is best for a budget of FLOPs (Hoffmann et al., arXiv 2203.15556).

    For each of BUDGETS: base's best loss, size and tokens; other's loss minus base's at equal FLOPs; and `flops`, what
    other needs to reach base's loss as a ratio to the budget, both with intervals of paired replicates. `inside` says
    whether the best sizes of both lie among those that ran: elsewhere the laws are extrapolated. A token of a size
    costs what it does in the table (6 N FLOPs where that has none), on a line between and beyond the sizes.
    """
    ours, theirs = Frontier.of(base), Frontier.of(other)
    ran = spent(base.cells)
    df, found = min(base.df, other.df), []
    factors = np.geomspace(1 / 64, 64, 49)
    for budget in np.geomspace(ran.min(), ran.max(), BUDGETS).tolist():
        (target, size), (loss, their_size) = ours.best(budget), theirs.best(budget)
        curve = np.stack([theirs.best(budget * factor)[0] for factor in factors], -1)
        needed = np.array([_crossing(factors, losses, goal) for losses, goal in zip(curve, target, strict=True)])
        gap = loss - target
        low, high = interval(gap[0], gap[1:], df, log=False)
        inside = all(
            fit.cells.params.min() <= best <= fit.cells.params.max()
            for fit, best in ((base, size[0]), (other, their_size[0]))
        )
        tokens = budget / np.interp(size[0], ours.sizes, ours.cost)
        found.append({
            "budget": budget, "params_of_base": float(size[0]), "tokens_of_base": float(tokens),
            "params": float(their_size[0]), "loss_of_base": float(target[0]), "inside": inside,
            "flops": _ratio(needed, df), "loss_at_equal_flops": {"difference": float(gap[0]), "ci": [low, high]},
        })  # fmt: skip
    return found


def _crossing(factors: Floats, losses: Floats, goal: float) -> float:
    """The factor at which falling losses reach the goal; inf where they do not, the first factor where all have."""
    if losses[-1] > goal:
        return np.inf
    return float(np.exp(np.interp(-goal, -losses, np.log(factors))))


def _ratio(values: Floats, df: int) -> dict[str, Any]:
    """The estimate and its interval; null stands for "never"."""
    low, high = np.quantile(values[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    if np.isfinite([values[0], low, high]).all():
        low, high = interval(values[0], values[1:][np.isfinite(values[1:])], df)
    numbers = [float(x) if np.isfinite(x) else None for x in (values[0], low, high)]
    return {"ratio": numbers[0], "ci": numbers[1:]}


def paired(base: Cells, other: Cells) -> dict[str, Any]:
    """Measured loss of other minus base in runs of the same place of the grid and the same seed, in nats.

    The mean over seeds is taken at each place first; the interval is Student's over seeds (each seed's mean over all
    places) if there are three, since runs of one seed share their data order.
    """
    mine = {(p, s): x for p, s, x in zip(base.pair.tolist(), base.seed.tolist(), base.loss.tolist(), strict=True)}
    rows = [
        (p, s, n, d, x - mine[p, s])
        for p, s, n, d, x in zip(
            other.pair.tolist(), other.seed.tolist(), other.params, other.tokens, other.loss.tolist(), strict=True
        )
        if (p, s) in mine
    ]
    if not rows:
        raise SidError(f"variants {base.variant} and {other.variant} share no place and seed of the grid")
    places = [
        {"params": float(n), "tokens": float(d), **_mean([r[4] for r in rows if r[0] == p])}
        for p, (n, d) in {r[0]: (r[2], r[3]) for r in rows}.items()
    ]
    seeds = sorted({r[1] for r in rows})
    return {"places": places, "all": _mean([float(np.mean([r[4] for r in rows if r[1] == s])) for s in seeds])}


def _mean(values: list[float]) -> dict[str, Any]:
    mean, n = float(np.mean(values)), len(values)
    found: dict[str, Any] = {"difference": mean, "seeds": n, "ci": None}
    if n > 1:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
        found["ci"] = [mean - half, mean + half]
    return found
