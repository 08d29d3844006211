"""The simpler forms that papers report: slopes without E, two points, IsoFLOP parabolas, compute-optimal power laws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from sidlm.errors import SidError
from sidlm.scaling.cells import Cells
from sidlm.scaling.fit import LEVEL, Fit
from sidlm.scaling.law import Floats


def slope_without_e(params: Sequence[float] | Floats, loss: Sequence[float]) -> dict[str, float]:
    """-log L = alpha log N + b at fixed D, by ordinary least squares (arXiv 2507.02754, section 7.1): E is taken for 0.

    Returns alpha, b, r2, the residual sum of squares and, with three sizes or more, the standard error of alpha.
    """
    x, y = np.log(np.asarray(params, float)), -np.log(np.asarray(loss, float))
    if len(np.unique(x)) < 2:
        raise SidError(f"a slope needs at least 2 sizes, got {len(np.unique(x))}")
    slope, intercept = np.polyfit(x - x.mean(), y, 1)
    residual = y - slope * (x - x.mean()) - intercept
    rss = float(residual @ residual)
    found = {"alpha": float(slope), "b": float(intercept - slope * x.mean()), "residual": rss}
    found["r2"] = 1.0 - rss / float(((y - y.mean()) ** 2).sum())
    if len(x) > 2:
        error = float(np.sqrt(rss / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))
        half = float(stats.t.ppf(0.5 + LEVEL / 2, len(x) - 2)) * error
        found |= {"alpha_low": float(slope) - half, "alpha_high": float(slope) + half}
    return found


def two_point(small: tuple[float, float], large: tuple[float, float]) -> float:
    """alpha of two (params, loss): log(L1 / L2) / log(N2 / N1), with E taken for 0."""
    return float(np.log(small[1] / large[1]) / np.log(large[0] / small[0]))


def without_e(cells: Cells) -> list[dict[str, Any]]:
    """slope_without_e and the two-point slope of the smallest and largest size, for each token budget of 2+ sizes.

    Seeds are averaged first: they are no sizes."""
    found = []
    for tokens in np.unique(cells.tokens):
        here = cells.tokens == tokens
        sizes = np.unique(cells.params[here])
        if len(sizes) < 2:
            continue
        loss = [float(cells.loss[here & (cells.params == size)].mean()) for size in sizes]
        ends = two_point((sizes[0], loss[0]), (sizes[-1], loss[-1]))
        found.append({"tokens": float(tokens), "sizes": len(sizes), **slope_without_e(sizes, loss), "two_point": ends})
    return found


@dataclass(frozen=True)
class PowerLaw:
    """optimum(C) = A * C^alpha: tokens, as in Llama 3. samples (replicates, 2): A and alpha of bootstrap replicates."""

    A: float
    alpha: float
    samples: Floats
    source: str

    def tokens(self, flops: float) -> float:
        return self.A * flops**self.alpha

    def interval(self, flops: float) -> tuple[float, float] | None:
        """Of the tokens; None without replicates."""
        if not len(self.samples):
            return None
        tail = (1 - LEVEL) / 2
        low, high = np.quantile(self.samples[:, 0] * flops ** self.samples[:, 1], [tail, 1 - tail])
        return float(low), float(high)


NOTHING = np.zeros((0, 2))
LLAMA3 = PowerLaw(0.299, 0.537, NOTHING, "Llama 3, figure 3 (arXiv 2407.21783): alpha 0.537, A 0.299")
LLAMA3_ROUNDED = PowerLaw(0.29, 0.53, NOTHING, "Llama 3, as rounded in its text: alpha 0.53, A 0.29")


def spent(cells: Cells) -> Floats:
    """FLOPs of each run: the column flops, else 6 N D."""
    return np.where(np.isfinite(cells.flops), cells.flops, 6 * cells.params * cells.tokens)


FARTHEST = 10.0
"""A parabola whose minimum is more than e^10 times the tokens of its runs away is flat: it has none."""


@dataclass(frozen=True)
class IsoFLOP:
    """One budget: its runs, the parabola c0 + c1 x + c2 x^2 in x = log(tokens / middle), its minimum, and whether the
    minimum lies among the runs (else it is an extrapolation)."""

    flops: float
    tokens: Floats
    loss: Floats
    middle: float
    coefficients: Floats
    best_tokens: float
    best_loss: float
    inside: bool


def isoflops(cells: Cells, tolerance: float = 0.15) -> list[IsoFLOP]:
    """Parabolas of loss over log tokens, one for each budget (Llama 3, section 3.2.1).

    Runs whose FLOPs lie within the tolerance of each other share a budget; a budget needs 3 token counts. Those whose
    parabola has no minimum are left out. Raises SidError if there is none.
    """
    flops, found, budgets = spent(cells), [], 0
    order = np.argsort(flops)
    cuts = np.flatnonzero(np.diff(np.log(flops[order])) > np.log1p(tolerance)) + 1
    for group in np.split(order, cuts):
        tokens, loss = cells.tokens[group], cells.loss[group]
        if len(np.unique(tokens)) < 3 or flops[group].max() > flops[group].min() * (1 + tolerance) ** 2:
            continue
        budgets += 1
        fitted = _parabola(float(np.exp(np.log(flops[group]).mean())), tokens, loss)
        found += [fitted] if fitted else []
    if not found:
        raise SidError(
            f"variant {cells.variant}: {budgets} FLOP budgets have runs at 3 or more token counts, none of them with a "
            "minimum: an IsoFLOP fit needs a grid with `flops` budgets"
        )
    return found


def _parabola(flops: float, tokens: Floats, loss: Floats) -> IsoFLOP | None:
    middle = float(np.exp(np.log(tokens).mean()))
    x = np.log(tokens / middle)
    c2, c1, c0 = np.polyfit(x, loss, 2)
    lowest = -c1 / (2 * c2)
    if c2 <= 0 or abs(lowest) > FARTHEST:
        return None
    return IsoFLOP(
        flops, tokens, loss, middle, np.array([c0, c1, c2]), float(middle * np.exp(lowest)),
        float(c0 - c1**2 / (4 * c2)), bool(x.min() <= lowest <= x.max()),
    )  # fmt: skip


def optimal_tokens(curves: Sequence[IsoFLOP], replicates: int = 400, seed: int = 0) -> PowerLaw:
    """The power law through the minima of two budgets or more; replicates redraw the residuals of each parabola.

    A replicate goes without the budgets whose redrawn parabola has no minimum.
    """
    if len(curves) < 2:
        raise SidError(f"a power law of the optimum needs IsoFLOP minima of 2 budgets or more, got {len(curves)}")
    rng = np.random.default_rng(seed)
    log_flops = np.log([curve.flops for curve in curves])
    minima = np.stack([_redrawn_minima(curve, replicates, rng) for curve in curves], -1)
    samples = _power_laws(log_flops, minima[np.isfinite(minima).sum(-1) > 1])
    a, alpha = _power_laws(log_flops, np.log([[curve.best_tokens for curve in curves]]))[0]
    return PowerLaw(float(a), float(alpha), samples, f"IsoFLOP minima of {len(curves)} budgets")


def _redrawn_minima(curve: IsoFLOP, replicates: int, rng: np.random.Generator) -> Floats:
    """log tokens of the minimum, (replicates,), when the residuals of the curve's runs, scaled up for the three numbers
    fitted, change their signs; nan where there is none."""
    x = np.log(curve.tokens / curve.middle)
    design = np.stack([x**0, x, x**2], -1)
    fitted = design @ curve.coefficients
    residual = (curve.loss - fitted) * np.sqrt(len(x) / max(1, len(x) - 3))
    redrawn = fitted + residual * rng.choice([-1.0, 1.0], (replicates, len(x)))
    _, c1, c2 = np.linalg.pinv(design) @ redrawn.T
    lowest = -c1 / (2 * c2)
    return np.where((c2 > 0) & (np.abs(lowest) < FARTHEST), np.log(curve.middle) + lowest, np.nan)


def _power_laws(log_flops: Floats, minima: Floats) -> Floats:
    """A and alpha, (k, 2), of lines through log minima (k, budgets), nan where a budget has none."""
    x = np.where(np.isfinite(minima), log_flops, np.nan)
    x = x - np.nanmean(x, -1, keepdims=True)
    alpha = np.nansum(x * minima, -1) / np.nansum(x * x, -1)
    log_a = np.nanmean(minima - alpha[:, None] * log_flops, -1)
    return np.stack([np.exp(log_a), alpha], -1)


def law_optimum(fit: Fit) -> PowerLaw:
    """The compute-optimal tokens of a fitted law under C = 6 N D: D = (C / 6)^(alpha / (alpha + beta)) / G (arXiv
    2203.15556, equation 4)."""
    laws = np.concatenate([fit.estimate[None], fit.samples])
    _, a, b, alpha, beta = laws.T
    g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
    power = alpha / (alpha + beta)
    pairs = np.stack([6.0**-power / g, power], -1)
    source = f"the law fitted to variant {fit.cells.variant}, with C = 6 N D"
    return PowerLaw(float(pairs[0, 0]), float(pairs[0, 1]), pairs[1:], source)
