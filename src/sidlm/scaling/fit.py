"""Fits of the law with intervals, for each variant of a table, and tests of what differs between two of them.

Intervals come from a wild cluster bootstrap: the design stays, and the residuals of all runs of a point (N, D) change
their sign together, so that errors which the seeds of a point share (the law does not fit there) count as one. They are
scaled up by the leverage of their point (1 / (1 - h), a jackknife's), and percentiles of log estimates are widened by
Student's t of (points - 5) degrees of freedom. benchmarks/scaling_recovery.py measures how often they hold the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sidlm.scaling.cells import Cells, require_points
from sidlm.scaling.law import NAMES, Floats, Ints, Problem, best_of_many, descend

REPLICATES = 400
LEVEL = 0.95


@dataclass(frozen=True)
class Fit:
    """A variant's law. estimate (5,): E, A, B, alpha, beta; samples (replicates, 5): the same of bootstrap replicates,
    which are paired across variants; df: degrees of freedom of the intervals."""

    cells: Cells
    estimate: Floats
    samples: Floats
    delta: float
    residual: Floats
    df: int

    def loss(self, params: Floats | float, tokens: Floats | float) -> Floats:
        """L(N, D) of the estimate."""
        return law(self.estimate, params, tokens)

    def as_dict(self) -> dict[str, object]:
        """The numbers of a JSON report, with intervals NAME_ci."""
        found: dict[str, object] = dict(zip(NAMES, self.estimate.tolist(), strict=True))
        for place, name in enumerate(NAMES):
            found[f"{name}_ci"] = list(interval(self.estimate[place], self.samples[:, place], self.df))
        return found | {
            "level": LEVEL,
            "points": self.cells.points,
            "runs": len(self.cells.loss),
            "huber_delta": self.delta,
            "rms_log_residual": float(np.sqrt(np.mean(self.residual**2))),
        }


def law(theta: Floats, params: Floats | float, tokens: Floats | float) -> Floats:
    """E + A / N^alpha + B / D^beta for theta (..., 5)."""
    e, a, b, alpha, beta = np.moveaxis(np.asarray(theta), -1, 0)
    return e + a * np.power(params, -alpha) + b * np.power(tokens, -beta)


def interval(estimate: float, samples: Floats, df: int, *, log: bool = True) -> tuple[float, float]:
    """The LEVEL interval around an estimate: percentiles of the replicates, their distances times t / z.

    log: distances are ratios; for numbers above 0.
    """
    tail = (1 - LEVEL) / 2
    centre = np.log(estimate) if log else estimate
    values = np.log(samples) if log else samples
    wider = stats.t.ppf(1 - tail, max(df, 1)) / stats.norm.ppf(1 - tail)
    low, high = (centre + wider * (edge - centre) for edge in np.quantile(values, [tail, 1 - tail]))
    low, high = min(low, centre), max(high, centre)
    return (float(np.exp(low)), float(np.exp(high))) if log else (float(low), float(high))


def signs(pairs: Sequence[int], replicates: int, seed: int) -> dict[int, Floats]:
    """A column of signs for each place of the grid, the same for all variants: what makes replicates paired."""
    rng = np.random.default_rng(seed)
    return {pair: rng.choice([-1.0, 1.0], replicates) for pair in sorted(set(pairs))}


def noise_scale(problem: Problem, phi: Floats) -> float:
    """Huber's delta for the noise there is: 1.345 robust standard deviations, 95% efficient for normal errors.

    Hoffmann et al. take 1e-3 whatever the noise, which for seeds that differ by more is the least absolute deviation:
    wider and less honest intervals (docs/scaling.md).
    """
    r = problem.residuals(phi, problem.log_loss)[0]
    scale = 1.4826 * np.median(np.abs(r)) * np.sqrt(len(r) / max(1, len(r) - problem.size))
    return float(max(1.345 * scale, 1e-5))


def scaled_residuals(problem: Problem, phi: Floats, cluster: Ints) -> Floats:
    """Residuals (n,), the mean of each cluster divided by 1 - its leverage."""
    r, jacobian = problem.residuals(phi, problem.log_loss)
    hat = jacobian @ np.linalg.pinv(jacobian)
    groups = np.unique(cluster, return_inverse=True)[1]
    member = np.eye(groups.max() + 1)[groups]  # (n, clusters)
    count = member.sum(0)
    leverage = np.einsum("nc,nm,mc->c", member, hat, member) / count
    mean = member.T @ r / count
    return r + (mean / np.clip(1 - leverage, 0.1, 1.0) - mean)[groups]


def fit_variant(cells: Cells, weights: dict[int, Floats], *, delta: float | None = None) -> Fit:
    """One variant's fit. weights: of `signs`. Raises SidError for too few points."""
    require_points(cells)
    problem = Problem.of(cells.params, cells.tokens, cells.loss)
    phi = best_of_many(problem, delta or 1e-3)
    if delta is None:
        delta = noise_scale(problem, phi)
        phi = best_of_many(problem, delta)
    residual = problem.residuals(phi, problem.log_loss)[0]
    scaled = scaled_residuals(problem, phi, cells.pair)
    flips = np.stack([weights[pair] for pair in cells.pair.tolist()], -1)
    replicas = problem.log_loss + residual - flips * scaled
    samples, _ = descend(problem, np.repeat(phi[None], len(flips), 0), replicas, delta)
    df = max(1, cells.points - 5)
    return Fit(cells, problem.public(phi)[0], problem.public(samples)[:, 0], delta, residual, df)


def fit_all(
    variants: Sequence[Cells], *, replicates: int = REPLICATES, seed: int = 0, delta: float | None = None
) -> dict[str, Fit]:
    """{variant: Fit}, their replicates paired."""
    for cells in variants:
        require_points(cells)
    weights = signs([pair for cells in variants for pair in cells.pair.tolist()], replicates, seed)
    return {cells.variant: fit_variant(cells, weights, delta=delta) for cells in variants}


@dataclass(frozen=True)
class Test:
    """One nested hypothesis: the coordinates that are the same, against a model where they are not."""

    equal: tuple[str, ...]
    likelihood_ratio: float
    df: int
    p_chi2: float
    p_bootstrap: float


HYPOTHESES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "alpha": (("alpha",), ()),
    "beta": (("beta",), ()),
    "exponents": (("alpha", "beta"), ()),
    "E, A and B, given equal exponents": (NAMES, ("alpha", "beta")),
    "anything": (NAMES, ()),
}
"""What two variants may differ in -> (shared under the null hypothesis, shared under the alternative)."""


def compare(one: Fit, other: Fit, *, replicates: int = REPLICATES, seed: int = 0) -> dict[str, Test]:
    """Tests of each of HYPOTHESES for two variants.

    The likelihood ratio is n log(S0 / S1), S the Huber sum of the nested fits; its p value comes from chi2 and, without
    trusting independence, from wild cluster bootstrap replicates of the null hypothesis, paired by place in the grid.
    """
    both = (one.cells, other.cells)
    which = np.repeat([0, 1], [len(cells.loss) for cells in both])
    params, tokens, loss, pair = (
        np.concatenate([getattr(cells, name) for cells in both]) for name in ("params", "tokens", "loss", "pair")
    )
    full = Problem.of(params, tokens, loss, which)
    delta = max(one.delta, other.delta)
    laws = np.stack([_inner(full, fit.estimate) for fit in (one, other)])
    weights = signs(pair.tolist(), replicates, seed)
    flips = np.stack([weights[place] for place in pair.tolist()], -1)
    scaled = scaled_residuals(full, full.merged(laws), pair + 10**9 * which)
    return {
        name: _test(full.sharing(null), full.sharing(alternative), null, laws, delta, scaled, flips)
        for name, (null, alternative) in HYPOTHESES.items()
    }


def _inner(problem: Problem, estimate: Floats) -> Floats:
    """E, A, B, alpha, beta as the coordinates of a law of the problem."""
    e, a, b, alpha, beta = estimate
    return np.array(
        [np.log(e), np.log(a) - alpha * problem.centre[0], np.log(b) - beta * problem.centre[1], alpha, beta]
    )


def _test(
    null: Problem,
    alternative: Problem,
    equal: tuple[str, ...],
    laws: Floats,
    delta: float,
    scaled: Floats,
    flips: Floats,
) -> Test:
    def best(problem: Problem, log_loss: Floats, starts: Floats) -> tuple[Floats, Floats]:
        """The better of two starts, for each row of log_loss."""
        k, s = len(log_loss), len(starts)
        phi, value = descend(problem, np.tile(starts, (k, 1)), np.repeat(log_loss, s, 0), delta)
        choice = np.argmin(value.reshape(k, s), 1)
        return phi.reshape(k, s, -1)[np.arange(k), choice], value.reshape(k, s)[np.arange(k), choice]

    candidates = np.stack([laws, laws[[0, 0]], laws[[1, 1]]])
    observed = null.log_loss[None]
    phi0, value0 = best(null, observed, null.merged(candidates))
    start1 = _lifted(null, alternative, phi0)
    phi1, value1 = best(alternative, observed, np.concatenate([alternative.merged(candidates), start1]))
    fitted = null.residuals(phi0[0], observed[0])[0] + observed[0]
    replicas = fitted - flips * scaled
    _, r0 = best(null, replicas, phi0)
    _, r1 = best(alternative, replicas, np.concatenate([start1, phi1]))
    n = observed.shape[1]
    ratio = n * np.log(np.maximum(value0[0], 1e-300) / np.maximum(min(value1[0], value0[0]), 1e-300))
    ratios = n * np.log(np.maximum(r0, 1e-300) / np.maximum(np.minimum(r1, r0), 1e-300))
    df = alternative.size - null.size
    p = (1 + int((ratios >= ratio).sum())) / (1 + len(ratios))
    return Test(equal, float(ratio), df, float(stats.chi2.sf(ratio, df)), p)


def _lifted(null: Problem, alternative: Problem, phi: Floats) -> Floats:
    """The null's unknowns as those of the wider model."""
    return alternative.merged(phi[:, null.index])


def verdict(tests: dict[str, Test], level: float = 0.05) -> str:
    """The tests in a sentence."""
    p = {name: test.p_bootstrap for name, test in tests.items()}
    if p["anything"] > level:
        return f"no difference is seen (p = {p['anything']:.3g})"
    if p["exponents"] > level:
        return f"no difference in the exponents is seen (p = {p['exponents']:.3g}); they differ in E, A or B"
    which = [name for name in ("alpha", "beta") if p[name] <= level]
    return f"the exponents differ (p = {p['exponents']:.3g}){': ' + ' and '.join(which) if which else ''}"
