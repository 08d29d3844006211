"""The reports of `sid scaling fit`, `efficiency` and `forecast`, from the numbers they write as JSON."""

from __future__ import annotations

from typing import Any

from sidlm.scaling import forms, plots, report
from sidlm.scaling.fit import Fit
from sidlm.scaling.forecast import Forecast


def fit_page(cells: str, fits: dict[str, Fit], found: dict[str, Any]) -> str:
    every = list(fits.values())
    runs = sum(one["runs"] for one in found.values())
    head = ("variant", "E", "A", "B", "alpha", "its interval", "beta", "its interval", "points", "runs", "rms residual")
    rows = [
        (
            name, f"{one['E']:.4f}", report.amount(one["A"]), report.amount(one["B"]), f"{one['alpha']:.4f}",
            "{:.4f} to {:.4f}".format(*one["alpha_ci"]), f"{one['beta']:.4f}",
            "{:.4f} to {:.4f}".format(*one["beta_ci"]), one["points"], one["runs"],
            f"{100 * one['rms_log_residual']:.2f}%",
        )
        for name, one in found.items()
    ]  # fmt: skip
    parts = [
        report.heading("The law of each variant", "L(N, D) = E + A / N^alpha + B / D^beta; intervals are of 95%."),
        report.table(head, rows), plots.exponents(every),
        report.heading("Losses and laws", _shown(len(every))), plots.curves(every),
        report.heading("Where the law misses"), plots.residuals(every),
    ]  # fmt: skip
    compared = {name: one["against"] for name, one in found.items() if "against" in one}
    if compared:
        parts.append(report.heading("Do they differ?", "Nested models; p values of the bootstrap, and of chi2."))
        names = list(next(iter(compared.values()))["tests"])
        parts.append(report.table(
            ("variant", "against", *names, "in words"),
            ((name, one["base"], *(_p(one["tests"][key]) for key in names), one["verdict"])
             for name, one in compared.items()),
        ))  # fmt: skip
    for name, one in list(fits.items())[: plots.SHOWN]:
        if "none" not in found[name]["isoflop"]:
            isoflop = found[name]["isoflop"]
            words = f"{name}: optimal tokens = {isoflop['A']:.4g} C^{isoflop['alpha']:.4f}"
            parts += [report.heading("IsoFLOP", words), plots.parabolas(name, forms.isoflops(one.cells))]
    parts.append(
        report.heading("Without E", "-log L = alpha log N + b at fixed tokens, as the 2-simplicial paper has it.")
    )
    parts.append(report.table(
        ("variant", "tokens", "alpha", "95% interval", "b", "R2", "residual", "two-point alpha"),
        (
            (name, report.amount(row["tokens"]), f"{row['alpha']:.4f}",
             f"{row['alpha_low']:.4f} to {row['alpha_high']:.4f}" if "alpha_low" in row else "-",
             f"{row['b']:.4f}", f"{row['r2']:.4f}", f"{row['residual']:.2g}", f"{row['two_point']:.4f}")
            for name, one in found.items() for row in one["without_E"]
        ),
    ))  # fmt: skip
    return report.page("Scaling laws", f"{len(fits)} variants, {runs} runs of {cells}", parts)


def _p(test: dict[str, Any]) -> str:
    return f"{test['p_bootstrap']:.3f} ({test['p_chi2']:.3f})"


def _shown(count: int) -> str:
    return f"The first {plots.SHOWN} of {count} variants." if count > plots.SHOWN else ""


def nats(found: dict[str, Any]) -> str:
    span = "" if found["ci"] is None else " ({:+.4f} to {:+.4f})".format(*found["ci"])
    seeds = f", {found['seeds']} seeds" if "seeds" in found else ""
    return f"{found['difference']:+.4f} nats{span}{seeds}"


def efficiency_page(cells: str, base: str, found: dict[str, Any]) -> str:
    kinds = [k for k in ("tokens", "flops", "seconds") if all(k in p for one in found.values() for p in one["points"])]
    points = [(name, point) for name, part in found.items() for point in part["points"]]
    named = [kind.replace("flops", "FLOPs") for kind in kinds]
    return report.page(
        "Token efficiency",
        f"What each variant needs to reach the loss of {base}, of {cells}; below 1 it needs less",
        [
            plots.ratios(found),
            report.table(
                ("variant", "parameters", f"tokens of {base}", "loss", *(f"{kind} needed" for kind in named)),
                ((name, report.amount(p["params"]), report.amount(p["tokens_of_base"]), f"{p['loss_of_base']:.4f}",
                  *(f"{report.amount(p[k]['ratio'])} ({report.between(*p[k]['ci'])})" for k in kinds))
                 for name, p in points),
            ),
            report.heading("Loss at equal cost", f"Of the fitted laws, minus that of {base}; below 0 is better."),
            report.table(
                ("variant", "parameters", *(f"equal {kind}" for kind in named)),
                ((name, report.amount(p["params"]), *(nats(p[f"loss_at_equal_{k}"]) for k in kinds))
                 for name, p in points),
            ),
            report.heading(
                "Each at its best size",
                "The laws' best size for a budget of FLOPs, of either variant. A star: one of the sizes lies beyond "
                "those that ran.",
            ),
            plots.frontiers(base, found),
            report.table(
                ("variant", "FLOPs", f"parameters of {base}", "parameters", f"loss of {base}", "at equal FLOPs",
                 "FLOPs needed"),
                ((name, f"{p['budget']:.3g}", report.amount(p["params_of_base"]),
                  report.amount(p["params"]) + "*" * (not p["inside"]), f"{p['loss_of_base']:.4f}",
                  nats(p["loss_at_equal_flops"]),
                  f"{report.amount(p['flops']['ratio'])} ({report.between(*p['flops']['ci'])})")
                 for name, part in found.items() for p in part["frontier"]),
            ),
            report.heading("Measured, no law", "Runs of one place of the grid and one seed; Student's t over seeds."),
            report.table(
                ("variant", "parameters", "tokens", "loss minus the baseline's"),
                [(name, report.amount(x["params"]), report.amount(x["tokens"]), nats(x))
                 for name, part in found.items() for x in part["paired"]["places"]]
                + [(name, "all", "all", nats(part["paired"]["all"])) for name, part in found.items()],
            ),
        ],
    )  # fmt: skip


def forecast_page(cells: str, model: Forecast, flops: Any, nll: Any, accuracy: Any, found: list[dict[str, Any]]) -> str:
    return report.page(
        "Forecast",
        f"compute -> NLL of the right answer -> accuracy, from {len(nll)} models of {cells}",
        [
            plots.stages(model, flops, nll, accuracy, [one["flops"] for one in found]),
            report.table(
                ("FLOPs", "NLL", "95% interval", "accuracy", "95% interval"),
                ((f"{x['flops']:.4g}", f"{x['nll']:.4f}", "{:.4f} to {:.4f}".format(*x["nll_ci"]),
                  f"{x['accuracy']:.3f}", "{:.3f} to {:.3f}".format(*x["accuracy_ci"])) for x in found),
            ),
        ],
    )  # fmt: skip
