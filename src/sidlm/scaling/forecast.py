"""Llama 3's forecast of a benchmark (arXiv 2407.21783, section 3.2.1): compute -> NLL of the answer -> accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from sidlm.errors import SidError
from sidlm.scaling.fit import LEVEL
from sidlm.scaling.law import Floats


@dataclass(frozen=True)
class Forecast:
    """Both stages. line: NLL = line[0] + line[1] log10 C. curve: middle and width of the sigmoid.

    chance: the sigmoid's floor. lines, curves: the same of bootstrap replicates.
    """

    line: Floats
    curve: Floats
    lines: Floats
    curves: Floats
    chance: float
    line_noise: float
    curve_noise: float
    line_df: int
    curve_df: int

    def nll(self, flops: float) -> tuple[float, float, float]:
        """Estimate and prediction interval of a new model's NLL."""
        values = self.lines @ [1.0, np.log10(flops)]
        return _spread(self.line @ [1.0, np.log10(flops)], values, self.line_noise, self.line_df)

    def accuracy(self, flops: float) -> tuple[float, float, float]:
        """Estimate and prediction interval of its accuracy, the error of both stages included."""
        rng = np.random.default_rng(1)
        nll = self.lines @ [1.0, np.log10(flops)]
        nll = nll + self.line_noise * rng.standard_t(max(1, self.line_df), len(nll))
        values = sigmoid(self.curves[rng.permutation(len(self.curves))], nll[:, None], self.chance)[:, 0]
        estimate = sigmoid(self.curve, self.line @ [1.0, np.log10(flops)], self.chance)[0]
        found = _spread(estimate, values, self.curve_noise, self.curve_df)
        return found[0], max(0.0, found[1]), min(1.0, found[2])


def sigmoid(curve: Floats, nll: Floats | float, chance: float) -> Floats:
    """Accuracy at an NLL: chance + (1 - chance) / (1 + exp((nll - middle) / width)); curve (..., 2)."""
    middle, width = curve[..., :1], curve[..., 1:]
    z = np.clip((nll - middle) / width, -700, 700)
    return chance + (1 - chance) / (1 + np.exp(z))


def _spread(estimate: Any, values: Floats, noise: float, df: int) -> tuple[float, float, float]:
    """With the noise of a new measurement added to replicates of its mean."""
    tail = (1 - LEVEL) / 2
    rng = np.random.default_rng(0)
    noisy = values + noise * rng.standard_t(max(1, df), len(values))
    low, high = np.quantile(noisy, [tail, 1 - tail])
    return float(estimate), float(min(low, estimate)), float(max(high, estimate))


def fit_forecast(
    flops: Sequence[float], nll: Sequence[float], accuracy: Sequence[float], *, chance: float = 0.0,
    max_flops: float = np.inf, replicates: int = 1000, seed: int = 0,
) -> Forecast:  # fmt: skip
    """Fit both stages.

    flops: nan for models of which only NLL and accuracy are known (in Llama 3, the Llama 2 family): they serve the
    second stage alone. accuracy: nan where unknown. max_flops: the first stage takes models up to it (Llama 3: 1e22).
    Raises SidError for fewer than 3 models in the first stage or 4 in the second, or NLLs that do not vary.
    """
    c, y, p = (np.asarray(x, float) for x in (flops, nll, accuracy))
    first = np.isfinite(c) & (np.nan_to_num(c, nan=np.inf) <= max_flops)
    second = np.isfinite(p)
    if len(np.unique(c[first])) < 3:
        raise SidError(
            f"the forecast's first stage needs models at 3 or more FLOP counts up to {max_flops:g}, got "
            f"{len(np.unique(c[first]))}"
        )
    if second.sum() < 4 or np.ptp(y[second]) == 0:
        raise SidError(f"the forecast's second stage needs 4 models of different NLL with accuracy, got {second.sum()}")
    if not 0 <= chance < 1 or ((p[second] < 0) | (p[second] > 1)).any():
        raise SidError(f"accuracies and chance are fractions between 0 and 1, got {p[second]} and {chance}")
    rng = np.random.default_rng(seed)
    x = np.stack([np.ones(first.sum()), np.log10(c[first])], -1)
    pseudo = np.linalg.pinv(x)
    line = pseudo @ y[first]
    rest, df = y[first] - x @ line, int(first.sum()) - 2
    rest = rest / np.sqrt(np.clip(1 - np.einsum("ij,ji->i", x, pseudo), 0.1, 1))
    flips = rng.choice([-1.0, 1.0], (replicates, len(rest)))
    lines = (x @ line + flips * rest) @ pseudo.T
    curve = _fit_sigmoid(y[second], p[second], chance)
    fitted = sigmoid(curve, y[second], chance)
    miss = (p[second] - fitted) * np.sqrt(len(fitted) / (len(fitted) - 2))
    flips = rng.choice([-1.0, 1.0], (min(replicates, 300), len(fitted)))
    curves = np.stack([_fit_sigmoid(y[second], fitted + flip * miss, chance, curve) for flip in flips])
    curves = np.resize(curves, (replicates, 2))
    return Forecast(
        np.asarray(line, np.float64), curve, lines, curves, chance, float(np.sqrt((rest**2).sum() / max(1, df))),
        float(np.sqrt((miss**2).mean())), df, len(fitted) - 2,
    )  # fmt: skip


def _fit_sigmoid(nll: Floats, accuracy: Floats, chance: float, start: Floats | None = None) -> Floats:
    """Middle and width, by least squares."""
    starts = [start] if start is not None else [
        np.array([middle, width * max(np.ptp(nll), 1e-9)])
        for middle in np.quantile(nll, [0.1, 0.5, 0.9]) for width in (0.1, 0.3, 1.0)
    ]  # fmt: skip
    tiny = 1e-3 * np.ptp(nll)
    found = [
        least_squares(
            lambda q: sigmoid(q, nll, chance) - accuracy, s,
            bounds=([-np.inf, tiny], [np.inf, np.inf]), x_scale=[1.0, 1.0],
        )
        for s in starts
    ]  # fmt: skip
    return min(found, key=lambda f: f.cost).x
