"""The figures of `sid scaling fit` and of its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sidlm.scaling.fit import LEVEL, Fit, interval, law
from sidlm.scaling.forecast import Forecast, sigmoid
from sidlm.scaling.forms import IsoFLOP, PowerLaw
from sidlm.scaling.report import COLOURS, INK, amount, label, legend, new_figure, plain_ticks, svg

SHOWN = 8
"""Variants in a figure; more cannot be told apart."""


def curves(fits: Sequence[Fit]) -> str:
    """Measured losses over tokens, the fitted law of each size with its interval, a panel for each variant."""
    fits = fits[:SHOWN]
    columns = min(2, len(fits))
    rows = -(-len(fits) // columns)
    figure, panels = new_figure(9.6 if columns > 1 else 7.5, 3.7 * rows, columns, rows, sharey=True)
    for axes, fit in zip(panels, fits, strict=False):
        sizes = np.unique(fit.cells.params)
        grid = np.geomspace(fit.cells.tokens.min() / 1.3, fit.cells.tokens.max() * 1.3, 60)
        if len(sizes) > SHOWN:  # each budget of an IsoFLOP grid has its own: some of the laws, all the runs
            axes.plot(fit.cells.tokens, fit.cells.loss, "o", color="#94a3b8", markersize=3.2)
            sizes = sizes[np.linspace(0, len(sizes) - 1, SHOWN).round().astype(int)]
        for colour, size in zip(_ramp(len(sizes)), sizes, strict=True):
            band = law(fit.samples[:, None], size, grid)
            tail = (1 - LEVEL) / 2
            axes.fill_between(grid, *np.quantile(band, [tail, 1 - tail], axis=0), color=colour, alpha=0.2, linewidth=0)
            axes.plot(grid, fit.loss(size, grid), color=colour, linewidth=1.3, label=f"{amount(size)} parameters")
            here = fit.cells.params == size
            axes.plot(fit.cells.tokens[here], fit.cells.loss[here], "o", color=colour, markersize=3.2, alpha=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
        label(axes, "tokens", "loss, nats per token", fit.cells.variant)
        legend(axes, loc="upper right")
    for axes in panels[len(fits) :]:
        axes.set_visible(False)
    return svg(figure, "curves")


def _ramp(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](x) for x in np.linspace(0.0, 0.82, count)]


def exponents(fits: Sequence[Fit]) -> str:
    """alpha and beta of each variant with their intervals."""
    fits = fits[: 5 * SHOWN]
    figure, panels = new_figure(9.6, 1.3 + 0.32 * len(fits), 2, sharey=True)
    for axes, place, name in zip(panels, (3, 4), ("alpha (parameters)", "beta (tokens)"), strict=True):
        for row, fit in enumerate(fits):
            low, high = interval(fit.estimate[place], fit.samples[:, place], fit.df)
            _bar(axes, row, fit.estimate[place], low, high, COLOURS[row % len(COLOURS)])
        axes.set_yticks(range(len(fits)), [fit.cells.variant for fit in fits])
        axes.set_ylim(len(fits) - 0.5, -0.5)
        label(axes, f"exponent {name}, with its {LEVEL:.0%} interval", "")
    return svg(figure, "exponents")


def _bar(axes: Any, row: float, value: float, low: float, high: float, colour: str) -> None:
    axes.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot([low, low, high, high], [row - 0.12, row + 0.12, np.nan, np.nan], color=colour, linewidth=1.2)
    axes.plot([high, high], [row - 0.12, row + 0.12], color=colour, linewidth=1.2)
    axes.plot([value], [row], "o", color=colour, markersize=5)


def residuals(fits: Sequence[Fit]) -> str:
    """Where the law misses: measured over fitted loss against tokens."""
    fits = fits[:SHOWN]
    figure, (axes,) = new_figure(9.6, 3.0)
    for place, fit in enumerate(fits):
        shift = 1 + 0.02 * (place - len(fits) / 2)
        axes.plot(
            fit.cells.tokens * shift, -100 * fit.residual, "o", markersize=3.2, alpha=0.7,
            color=COLOURS[place % len(COLOURS)], label=fit.cells.variant,
        )  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    label(axes, "tokens", "measured over fitted loss, %")
    legend(axes, ncols=min(4, len(fits)))
    return svg(figure, "residuals")


def parabolas(variant: str, found: Sequence[IsoFLOP]) -> str:
    """Loss over tokens at each budget with its minimum."""
    figure, (axes,) = new_figure(8, 3.8)
    for colour, curve in zip(_ramp(len(found)), found, strict=True):
        low, high = curve.tokens.min(), curve.tokens.max()
        grid = np.geomspace(low / 1.2, high * 1.2, 60)
        c0, c1, c2 = curve.coefficients
        x = np.log(grid / curve.middle)
        axes.plot(grid, c0 + c1 * x + c2 * x**2, color=colour, linewidth=1.3, label=f"{curve.flops:.2g} FLOPs")
        axes.plot(curve.tokens, curve.loss, "o", color=colour, markersize=3.5)
        axes.plot([curve.best_tokens], [curve.best_loss], "*", color=colour, markersize=11, markeredgecolor=INK)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    label(axes, "tokens", "loss, nats per token", f"{variant}: IsoFLOP curves, a star at each minimum")
    legend(axes)
    return svg(figure, f"parabolas-{variant}")


def ratios(found: dict[str, dict[str, Any]]) -> str:
    """Tokens, FLOPs and seconds to reach the base's loss, for each variant and size."""
    rows = [(name, point) for name, part in found.items() for point in part["points"]]
    kinds = [kind for kind in ("tokens", "flops", "seconds") if all(kind in point for _, point in rows)]
    figure, panels = new_figure(10.4, 1.4 + 0.3 * len(rows), len(kinds), sharex=True, sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        finite = [x for _, p in rows for x in (p[kind]["ratio"], *p[kind]["ci"]) if x is not None]
        edge = max([*finite, 1.1]) * 1.1
        for row, (name, point) in enumerate(rows):
            colour = COLOURS[list(found).index(name) % len(COLOURS)]
            value, (low, high) = point[kind]["ratio"], point[kind]["ci"]
            if low is not None:
                _bar(axes, row, edge if value is None else value, low, edge if high is None else high, colour)
            if value is None:
                axes.text(edge, row, " never", color=INK, fontsize=8, va="center")
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        axes.set_yticks(range(len(rows)), [f"{name}, {amount(p['params'])} parameters" for name, p in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        label(axes, f"{'FLOPs' if kind == 'flops' else kind} needed, base = 1", "")
    return svg(figure, "ratios")


def frontiers(base: str, found: dict[str, dict[str, Any]]) -> str:
    """Loss minus the base's at equal FLOPs, either at its best size, for each budget with its interval."""
    figure, (axes,) = new_figure(9.6, 3.6)
    for place, (name, part) in enumerate(list(found.items())[:SHOWN]):
        colour = COLOURS[place % len(COLOURS)]
        budgets = np.array([point["budget"] for point in part["frontier"]]) * 1.04 ** (place - len(found) / 2)
        gaps = np.array([point["loss_at_equal_flops"]["difference"] for point in part["frontier"]])
        low, high = np.array([point["loss_at_equal_flops"]["ci"] for point in part["frontier"]]).T
        axes.errorbar(budgets, gaps, (gaps - low, high - gaps), color=colour, marker="o", markersize=4, capsize=3,
                      linewidth=1.2, label=name)  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xscale("log")
    label(axes, "training FLOPs", f"loss minus that of {base}, nats", "each variant at its best size for the FLOPs")
    legend(axes)
    return svg(figure, "frontiers")


def optimum(law: PowerLaw, flops: float, others: Sequence[PowerLaw] = ()) -> str:
    """Compute-optimal tokens over FLOPs, and the plan."""
    figure, (axes,) = new_figure(8, 3.8)
    grid = np.geomspace(min(6e18, flops / 1e3), flops * 10, 80)
    for place, one in enumerate((law, *others)):
        colour = COLOURS[place]
        axes.plot(grid, [one.tokens(c) for c in grid], color=colour, linewidth=1.5, label=one.source)
        if len(one.samples):
            low, high = np.array([one.interval(c) for c in grid]).T
            axes.fill_between(grid, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot([flops], [law.tokens(flops)], "*", color=COLOURS[0], markersize=13, markeredgecolor=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    label(axes, "training FLOPs", "compute-optimal tokens")
    legend(axes)
    return svg(figure, "optimum")


def stages(found: Forecast, flops: Any, nll: Any, accuracy: Any, targets: Sequence[float]) -> str:
    """Both stages of a forecast, with the models they rest on and prediction intervals."""
    figure, (first, second) = new_figure(10.4, 3.9, 2)
    known = np.isfinite(flops)
    grid = np.geomspace(np.min(flops[known]) / 2, max(np.max(flops[known]), *targets) * 2, 40)
    middle, low, high = np.array([found.nll(c) for c in grid]).T
    first.fill_between(grid, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    first.plot(grid, middle, color=COLOURS[0], linewidth=1.5)
    first.plot(flops[known], nll[known], "o", color=COLOURS[0], markersize=4)
    second.plot(nll, accuracy, "o", color=COLOURS[0], markersize=4, label="models")
    ends = [found.nll(c)[0] for c in targets]
    line = np.linspace(min(np.min(nll), *ends) * 0.95, max(np.max(nll), *ends) * 1.05, 100)
    band = sigmoid(found.curves[:, None, :], line[:, None], found.chance)[..., 0]
    second.fill_between(line, *np.quantile(band, [0.025, 0.975], axis=0), color=COLOURS[0], alpha=0.2, linewidth=0)
    second.plot(line, sigmoid(found.curve, line[:, None], found.chance)[:, 0], color=COLOURS[0], linewidth=1.5)
    for c in targets:
        y, y_low, y_high = found.nll(c)
        p, p_low, p_high = found.accuracy(c)
        first.errorbar([c], [y], [[y - y_low], [y_high - y]], color=COLOURS[1], fmt="*", markersize=11, capsize=4)
        second.errorbar([y], [p], [[p - p_low], [p_high - p]], color=COLOURS[1], fmt="*", markersize=11, capsize=4)
    first.set_xscale("log")
    label(first, "training FLOPs", "NLL of the right answer", "stage 1")
    label(second, "NLL of the right answer", "accuracy", "stage 2; stars: the forecast")
    return svg(figure, "stages")
