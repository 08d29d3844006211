"""L(N, D) = E + A / N^alpha + B / D^beta, fitted to losses: many problems at once, which makes bootstraps cheap.

The objective is that of Hoffmann et al. (arXiv 2203.15556, section D.2): the Huber loss of the residual of log L. As
there, many starts are tried and L-BFGS has the last word; the many fits around it (starts, bootstrap replicates) run as
one batch of Levenberg-Marquardt steps on the same objective.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NAMES = ("E", "A", "B", "alpha", "beta")
# log E, log A', log B' at the middle of the design, alpha, beta
STARTS = np.array(
    list(
        itertools.product(
            (-1.0, -0.5, 0.0, 0.5, 1.0), (-3.0, -1.5, -0.5, 0.5), (-3.0, -1.5, -0.5, 0.5), (0.1, 0.3, 0.5, 0.9, 1.4),
            (0.1, 0.3, 0.5, 0.9, 1.4),
        )
    )
)  # fmt: skip
LOW = np.array([-30.0, -30.0, -30.0, 1e-3, 1e-3])
HIGH = np.array([5.0, 10.0, 10.0, 4.0, 4.0])


@dataclass(frozen=True)
class Problem:
    """n observations of one or several laws, which may share coordinates.

    u, v (n,): log N and log D, centred, so that the unknowns are of one size. which (n,): the law of an observation.
    index (laws, 5): where in the vector phi of unknowns the five coordinates of each law are.
    A law is (log E, log A', log B', alpha, beta) with A' = A / N0^alpha and B' = B / D0^beta at the centre.
    """

    u: Floats
    v: Floats
    log_loss: Floats
    which: Ints
    index: Ints
    centre: tuple[float, float]

    @classmethod
    def of(cls, params: Floats, tokens: Floats, loss: Floats, which: Ints | None = None) -> Problem:
        """One law for each number in `which` (default: one for all), nothing shared."""
        u, v = np.log(params), np.log(tokens)
        which = np.zeros(len(u), np.int64) if which is None else which
        laws = int(which.max()) + 1
        index = np.arange(5 * laws).reshape(laws, 5)
        return cls(u - u.mean(), v - v.mean(), np.log(loss), which, index, (float(u.mean()), float(v.mean())))

    def sharing(self, names: tuple[str, ...]) -> Problem:
        """The problem with these coordinates the same in all laws."""
        index = self.index.copy()
        for name in names:
            index[:, NAMES.index(name)] = index[0, NAMES.index(name)]
        return replace(self, index=np.unique(index, return_inverse=True)[1].reshape(index.shape))

    @property
    def size(self) -> int:
        return int(self.index.max()) + 1

    def merged(self, laws: Floats) -> Floats:
        """Laws (..., laws, 5) as unknowns (..., size): the mean where they share one."""
        total = np.zeros((*laws.shape[:-2], self.size))
        for coordinates in range(len(self.index)):
            total[..., self.index[coordinates]] += laws[..., coordinates, :]
        return total / np.bincount(self.index.ravel())

    def public(self, phi: Floats) -> Floats:
        """Unknowns (..., size) -> (..., laws, 5): E, A, B, alpha, beta."""
        e, a, b, alpha, beta = np.moveaxis(phi[..., self.index], -1, 0)
        a, b = a + alpha * self.centre[0], b + beta * self.centre[1]
        return np.stack([np.exp(e), np.exp(a), np.exp(b), alpha, beta], -1)

    def bounds(self) -> tuple[Floats, Floats]:
        low, high = np.empty(self.size), np.empty(self.size)
        low[self.index], high[self.index] = LOW, HIGH
        return low, high

    def residuals(self, phi: Floats, log_loss: Floats) -> tuple[Floats, Floats]:
        """log of the law minus log_loss, (..., n), and its derivative by phi, (..., n, size)."""
        e, a, b, alpha, beta = np.moveaxis(phi[..., self.index][..., self.which, :], -1, 0)
        parts = np.stack([np.exp(e), np.exp(a - alpha * self.u), np.exp(b - beta * self.v)])
        total = parts.sum(0)
        share = parts / total
        jacobian = np.zeros((*total.shape, self.size))
        rows = np.arange(len(self.u))
        for place, slope in enumerate((*share, -share[1] * self.u, -share[2] * self.v)):
            jacobian[..., rows, self.index[self.which, place]] = slope
        return np.log(total) - log_loss, jacobian


def huber(r: Floats, delta: float) -> Floats:
    """Sum over the last axis of r^2 / 2 within delta, and of delta (|r| - delta / 2) beyond."""
    size = np.abs(r)
    return np.where(size <= delta, 0.5 * r * r, delta * (size - 0.5 * delta)).sum(-1)


def descend(
    problem: Problem, phi: Floats, log_loss: Floats, delta: float, *, steps: int = 80, tolerance: float = 1e-9
) -> tuple[Floats, Floats]:
    """K fits at once, from the starts phi (K, size) to log losses (K, n) or (n,): (phi, objective (K,)).

    Levenberg-Marquardt, each step of which weighs the residuals anew as Huber's loss asks (within the bounds).
    """
    low, high = problem.bounds()
    phi = np.array(phi, float)
    target = np.broadcast_to(log_loss, (len(phi), len(problem.u)))
    r, jacobian = problem.residuals(phi, target)
    value = huber(r, delta)
    damping, active = np.full(len(phi), 1e-2), np.arange(len(phi))
    for _ in range(steps):
        weighted = jacobian * np.minimum(1.0, delta / np.maximum(np.abs(r), 1e-300))[..., None]
        hessian = np.swapaxes(weighted, -1, -2) @ jacobian
        gradient = (weighted * r[..., None]).sum(-2)
        diagonal = np.einsum("kii->ki", hessian)
        ridge = damping[active, None] * (diagonal + 1e-9 * diagonal.max(-1, keepdims=True)) + 1e-15
        step = np.linalg.solve(hessian + ridge[..., None] * np.eye(problem.size), gradient[..., None])[..., 0]
        trial = np.clip(phi[active] - step, low, high)
        new_r, new_jacobian = problem.residuals(trial, target[active])
        new_value = huber(new_r, delta)
        better, gain = new_value < value[active], value[active] - new_value
        phi[active[better]] = trial[better]
        damping[active] = np.clip(np.where(better, damping[active] / 4, damping[active] * 6), 1e-10, 1e8)
        settled = (better & (gain <= tolerance * value[active])) | (~better & (damping[active] >= 1e6))
        value[active[better]] = new_value[better]
        r, jacobian = np.where(better[:, None], new_r, r), np.where(better[:, None, None], new_jacobian, jacobian)
        active, r, jacobian = active[~settled], r[~settled], jacobian[~settled]
        if not len(active):
            break
    return phi, value


def polish(problem: Problem, phi: Floats, delta: float) -> tuple[Floats, float]:
    """L-BFGS from one start (size,): (phi, objective)."""
    scale = 1 / delta**2  # of order one for the line search

    def objective(x: Floats) -> tuple[float, Floats]:
        r, jacobian = problem.residuals(x, problem.log_loss)
        return float(huber(r, delta)) * scale, np.clip(r, -delta, delta) @ jacobian * scale

    found = minimize(objective, phi, jac=True, method="L-BFGS-B", bounds=list(zip(*problem.bounds(), strict=True)))
    return found.x, float(found.fun) / scale


def best_of_many(problem: Problem, delta: float, keep: int = 32) -> Floats:
    """The fit of one law, (5,): the best `keep` of all STARTS descend, and the best of those is polished."""
    values = [huber(problem.residuals(some, problem.log_loss)[0], delta) for some in np.array_split(STARTS, 8)]
    starts = STARTS[np.argsort(np.concatenate(values))[:keep]]
    phi, value = descend(problem, starts, problem.log_loss, delta)
    best = int(np.argmin(value))
    polished, final = polish(problem, phi[best], delta)
    return polished if final < value[best] else phi[best]
