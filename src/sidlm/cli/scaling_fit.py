"""``sid scaling fit | efficiency | plan | forecast``: what the losses of a grid say. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sidlm.cli.common import Parser, number, write_json
from sidlm.errors import SidError
from sidlm.scaling import efficiency as measure
from sidlm.scaling import forms, pages, plots, report
from sidlm.scaling.cells import Cells, numbers, read_cells, read_rows, require_columns, value_of
from sidlm.scaling.fit import REPLICATES, Fit, compare, fit_all, verdict
from sidlm.scaling.forms import LLAMA3, LLAMA3_ROUNDED, PowerLaw

CELLS = "CSV or JSON lines with columns variant, params, tokens, seed, loss; the cells.jsonl of a grid is one"

TESTED = 12
"""Variants that are compared unasked; each takes about a second."""


def _parser(command: str, about: str, example: str, cells: bool = True) -> Parser:
    parser = Parser(f"scaling {command}", about, example)
    if cells:
        parser.add_argument("cells", help=CELLS)
    parser.add_argument("--json", metavar="OUT", help="also write the numbers to this file")
    parser.add_argument("--html", metavar="OUT", help=f"the report; default: CELLS-{command}.html beside CELLS")
    return parser


def _fit_options(parser: Parser) -> None:
    parser.add_argument("--params", default="params", metavar="COLUMN", help="N, e.g. params_non_embedding")
    parser.add_argument("--loss", default="loss", metavar="COLUMN", help="L, e.g. domains.code or tasks.arc.nll")
    parser.add_argument(
        "--replicates", type=number(int, 20), default=REPLICATES, metavar="N", help=f"of bootstraps; {REPLICATES}"
    )
    parser.add_argument("--seed", type=number(int, 0), default=0, help="of bootstraps")
    parser.add_argument(
        "--delta",
        type=number(float, 1e-12),
        metavar="D",
        help="Huber's, in log L; default: as the noise is; 1e-3 is Chinchilla's",
    )


def _fitted(args: Any) -> dict[str, Fit]:
    variants = read_cells(args.cells, params=args.params, loss=args.loss)
    return fit_all(variants, replicates=args.replicates, seed=args.seed, delta=args.delta)


def _baseline(args: Any, names: Sequence[str]) -> str:
    name = args.baseline or names[0]
    if name not in names:
        raise SidError(f"--baseline {name}: no such variant, there are {', '.join(names)}")
    return name


def _report_path(args: Any, command: str, cells: str | None) -> Path:
    if args.html:
        return Path(args.html)
    return Path(f"scaling-{command}.html") if cells is None else Path(cells).with_suffix("").with_name(
        f"{Path(cells).stem}-{command}.html"
    )  # fmt: skip


def fit(argv: list[str]) -> int:
    parser = _parser(
        "fit",
        "Fit L(N, D) = E + A / N^alpha + B / D^beta to each variant, with 95% intervals; the forms without E; IsoFLOP "
        "parabolas where there are FLOP budgets; and tests of what differs from the first variant.",
        "  sid scaling fit runs/grid/cells.jsonl\n"
        "  sid scaling fit cells.csv --json fit.json --html fit.html\n"
        "  sid scaling fit runs/grid/cells.jsonl --params params_non_embedding --loss domains.code",
    )
    parser.add_argument("--baseline", metavar="VARIANT", help="what others are compared with; default: the first one")
    _fit_options(parser)
    args = parser.parse_args(argv)
    fits = _fitted(args)
    base = _baseline(args, list(fits))
    found = {name: _variant_report(one) for name, one in fits.items()}
    if len(fits) > TESTED and not args.baseline:
        print(f"{len(fits)} variants: --baseline NAME tests what differs from one of them")
    for name, one in fits.items():
        if name != base and (args.baseline or len(fits) <= TESTED):
            tests = compare(fits[base], one, replicates=args.replicates, seed=args.seed)
            found[name]["against"] = {
                "base": base, "verdict": verdict(tests), "tests": {key: asdict(test) for key, test in tests.items()}
            }  # fmt: skip
    _show_fits(found)
    if args.json:
        write_json(args.json, found)
    path = _report_path(args, "fit", args.cells)
    report.write_page(path, pages.fit_page(args.cells, fits, found))
    print(f"report: {path}")
    return 0


def _variant_report(one: Fit) -> dict[str, Any]:
    found = one.as_dict() | {"without_E": forms.without_e(one.cells)}
    law = forms.law_optimum(one)
    found["optimum"] = {"A": law.A, "alpha": law.alpha, "source": law.source}
    try:
        curves = forms.isoflops(one.cells)
        power = forms.optimal_tokens(curves)
        low, high = np.quantile(power.samples[:, 1], [0.025, 0.975])
        found["isoflop"] = {
            "A": power.A, "alpha": power.alpha, "alpha_ci": [float(low), float(high)],
            "budgets": [
                {"flops": c.flops, "tokens": c.best_tokens, "loss": c.best_loss, "inside": c.inside} for c in curves
            ],
        }  # fmt: skip
    except SidError as error:
        found["isoflop"] = {"none": str(error)}
    return found


def _show_fits(found: dict[str, Any]) -> None:
    width = max(7, *map(len, found))
    print(
        f"{'variant':<{width}}  {'E':>7} {'A':>9} {'B':>9}  {'alpha':>6} {'interval, 95%':>16}  "
        f"{'beta':>6} {'interval, 95%':>16}"
    )
    for name, one in found.items():
        spans = ["{:.3f} to {:.3f}".format(*one[f"{key}_ci"]) for key in ("alpha", "beta")]
        print(
            f"{name:<{width}}  {one['E']:>7.4f} {one['A']:>9.4g} {one['B']:>9.4g}  {one['alpha']:>6.4f} "
            f"{spans[0]:>16}  {one['beta']:>6.4f} {spans[1]:>16}"
        )
    for name, one in found.items():
        if "against" in one:
            print(f"{name} against {one['against']['base']}: {one['against']['verdict']}")


def efficiency(argv: list[str]) -> int:
    parser = _parser(
        "efficiency",
        "Tokens, FLOPs and seconds that a variant needs to reach the baseline's loss at equal parameters, and its loss "
        "at equal tokens, FLOPs and seconds, with 95% intervals.",
        "  sid scaling efficiency runs/grid/cells.jsonl --baseline llama --json efficiency.json",
    )
    parser.add_argument("--baseline", metavar="VARIANT", help="whose loss is to be reached; default: the first one")
    _fit_options(parser)
    args = parser.parse_args(argv)
    fits = _fitted(args)
    base = _baseline(args, list(fits))
    others = {name: one for name, one in fits.items() if name != base}
    if not others:
        raise SidError(f"{args.cells} has one variant, {base}: an efficiency compares two")
    found = {name: measure.efficiency(fits[base], one) for name, one in others.items()}
    for name, part in found.items():
        for point in part["points"]:
            print(f"{name} at {report.amount(point['params'])} parameters, to the loss of {base} after "
                  f"{report.amount(point['tokens_of_base'])} tokens: {_needs(point)}")  # fmt: skip
        largest = part["frontier"][-1]
        where = "" if largest["inside"] else " (beyond those that ran)"
        print(f"{name} at {largest['budget']:.3g} FLOPs, both at their best sizes{where}: "
              f"{pages.nats(largest['loss_at_equal_flops'])}, "
              f"{_times(largest['flops'])} FLOPs for the loss of {base}")  # fmt: skip
        pooled = part["paired"]["all"]
        print(f"{name} minus {base}, measured at equal tokens, paired by seed: {pages.nats(pooled)}")
    if args.json:
        write_json(args.json, found)
    path = _report_path(args, "efficiency", args.cells)
    report.write_page(path, pages.efficiency_page(args.cells, base, found))
    print(f"report: {path}")
    return 0


def _needs(point: dict[str, Any]) -> str:
    words = []
    for kind in ("tokens", "flops", "seconds"):
        if kind in point:
            words.append(f"{_times(point[kind])} {kind.replace('flops', 'FLOPs')}")
    return ", ".join(words)


def _times(found: dict[str, Any]) -> str:
    return f"{report.amount(found['ratio'])} x ({report.between(*found['ci'])})"


def plan(argv: list[str]) -> int:
    parser = _parser(
        "plan",
        "Parameters and tokens for a budget of training FLOPs: from Llama 3's printed fit, or from your own cells.",
        "  sid scaling plan --flops 3.8e25\n  sid scaling plan --flops 1e20 --cells runs/grid/cells.jsonl",
        cells=False,
    )
    parser.add_argument("--flops", type=number(float, 1.0), required=True, help="the budget")
    parser.add_argument("--cells", metavar="CELLS", help="fit these instead: " + CELLS)
    parser.add_argument("--variant", metavar="NAME", help="which of the cells; default: the first one")
    _fit_options(parser)
    args = parser.parse_args(argv)
    law, others = _optimum(args)
    tokens, span = law.tokens(args.flops), law.interval(args.flops)
    params = args.flops / (6 * tokens)
    found: dict[str, Any] = {
        "flops": args.flops, "tokens": tokens, "params": params, "source": law.source, "A": law.A, "alpha": law.alpha,
        "tokens_ci": span, "params_ci": None if span is None else [args.flops / (6 * x) for x in reversed(span)],
    }  # fmt: skip
    print(f"{args.flops:.4g} FLOPs: train {report.amount(params)} parameters on {report.amount(tokens, 4)} tokens")
    if span is not None:
        print(f"95% intervals: {report.between(*found['params_ci'])} parameters, {report.between(*span)} tokens")
    print(f"from {law.source}; tokens = {law.A:.4g} C^{law.alpha:.4g}, parameters = C / (6 tokens)")
    notes = _llama_notes(args.flops, found) if law is LLAMA3 else []
    print("\n".join(notes), end="\n" if notes else "")
    if args.json:
        write_json(args.json, found)
    path = _report_path(args, "plan", args.cells)
    rows = [("parameters", report.amount(params)), ("tokens", report.amount(tokens, 4)), ("from", law.source)]
    parts = [report.table(("", f"{args.flops:.4g} FLOPs"), rows), plots.optimum(law, args.flops, others)]
    report.write_page(
        path,
        report.page("Plan", f"{args.flops:.4g} training FLOPs", [*parts, *(report.paragraph(note) for note in notes)]),
    )
    print(f"report: {path}")
    return 0


def _optimum(args: Any) -> tuple[PowerLaw, list[PowerLaw]]:
    """The law to plan with, and others to show beside it."""
    if not args.cells:
        return LLAMA3, [LLAMA3_ROUNDED]
    variants = {cells.variant: cells for cells in read_cells(args.cells, params=args.params, loss=args.loss)}
    name = args.variant or next(iter(variants))
    if name not in variants:
        raise SidError(f"--variant {name}: no such variant, there are {', '.join(variants)}")
    return _own_law(variants[name], args), [LLAMA3]


def _own_law(cells: Cells, args: Any) -> PowerLaw:
    """Of the IsoFLOP minima where there are FLOP budgets, else of the fitted law."""
    try:
        return forms.optimal_tokens(forms.isoflops(cells))
    except SidError:
        found = fit_all([cells], replicates=args.replicates, seed=args.seed, delta=args.delta)
        return forms.law_optimum(found[cells.variant])


def _llama_notes(flops: float, found: dict[str, Any]) -> list[str]:
    rounded = LLAMA3_ROUNDED.tokens(flops)
    found["rounded_tokens"] = rounded
    return [
        f"note: the paper's text rounds the fit to (0.53, 0.29), which would give {report.amount(rounded)} tokens",
        "note: at 3.8e25 FLOPs the paper quotes 16.55T tokens and 402B parameters, whose 6 N D is 4.0e25: its FLOP "
        "count is not plain 6 N D; it trained 405B on 15.6T, whose 6 N D is 3.79e25",
    ]


def forecast(argv: list[str]) -> int:
    parser = _parser(
        "forecast",
        "Llama 3's two stages: a line from log FLOPs to the NLL of the right answer, and a sigmoid from there to "
        "accuracy, with 95% prediction intervals.",
        "  sid scaling forecast models.csv --flops 3.8e25 --max-flops 1e22 --chance 0.25\n"
        "  sid scaling forecast runs/grid/cells.jsonl --task arc --flops 1e20",
    )
    parser.add_argument("--flops", type=number(float, 1.0), nargs="+", required=True, help="budgets to forecast for")
    parser.add_argument("--task", metavar="NAME", help="a task of the cells: its nll_per_byte and accuracy")
    parser.add_argument("--nll", default="nll", metavar="COLUMN", help="NLL of the right answer, per character or byte")
    parser.add_argument("--accuracy", default="accuracy", metavar="COLUMN", help="a fraction; may be empty in rows")
    parser.add_argument("--variant", metavar="NAME", help="only rows of this variant")
    parser.add_argument("--max-flops", type=number(float, 1.0), default=float("inf"), help="largest model of stage 1")
    parser.add_argument("--chance", type=number(float, 0, 1), help="accuracy of guessing; default: the task's, else 0")
    args = parser.parse_args(argv)
    from sidlm.scaling.forecast import fit_forecast

    flops, nll, accuracy, chance = _models(args)
    model = fit_forecast(flops, nll, accuracy, chance=chance, max_flops=args.max_flops)
    found = {"line": model.line.tolist(), "sigmoid": model.curve.tolist(), "chance": chance, "forecasts": []}
    for c in args.flops:
        (y, *y_ci), (p, *p_ci) = model.nll(c), model.accuracy(c)
        found["forecasts"].append({"flops": c, "nll": y, "nll_ci": y_ci, "accuracy": p, "accuracy_ci": p_ci})
        print(
            f"{c:.4g} FLOPs: NLL {y:.4f} ({y_ci[0]:.4f} to {y_ci[1]:.4f}), "
            f"accuracy {p:.3f} ({p_ci[0]:.3f} to {p_ci[1]:.3f})"
        )
    if args.json:
        write_json(args.json, found)
    path = _report_path(args, "forecast", args.cells)
    report.write_page(path, pages.forecast_page(args.cells, model, flops, nll, accuracy, found["forecasts"]))
    print(f"report: {path}")
    return 0


def _models(args: Any) -> tuple[Any, Any, Any, float]:
    rows = read_rows(args.cells)
    if args.variant:
        rows = [row for row in rows if str(row.get("variant")) == args.variant]
        if not rows:
            raise SidError(f"{args.cells}: no rows of variant {args.variant}")
    nll, accuracy = args.nll, args.accuracy
    if args.task:
        nll, accuracy = f"tasks.{args.task}.nll_per_byte", f"tasks.{args.task}.accuracy"
    require_columns(rows, ("flops", nll, accuracy))

    def optional(row: dict[str, Any], column: str) -> float:
        return numbers(row, column, positive=False) if value_of(row, column) not in (None, "") else float("nan")

    chance = args.chance
    if chance is None:
        chance = optional(rows[0], f"tasks.{args.task}.chance") if args.task else 0.0
    return (
        np.array([optional(row, "flops") for row in rows]),
        np.array([numbers(row, nll) for row in rows]),
        np.array([optional(row, accuracy) for row in rows]),
        0.0 if np.isnan(chance) else chance,
    )
