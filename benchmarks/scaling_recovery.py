"""Do the intervals of `sid scaling fit` hold the truth? Synthetic grids with known exponents, bias and coverage.

    python benchmarks/scaling_recovery.py --json benchmarks/results/scaling_recovery.json

Each scenario draws --grids grids from a known law, fits each and counts how often the 95% interval of an exponent holds
the true one; pairs of variants are drawn, too, to count how often each test says that they differ.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from sidlm.scaling.cells import Cells
from sidlm.scaling.fit import HYPOTHESES, REPLICATES, compare, fit_all
from sidlm.train.hardware import git_revision, processor

# E, A, B, alpha, beta: Hoffmann et al. (arXiv 2203.15556), Besiroglu et al. (arXiv 2404.10102), and a steep one
TRUTHS = {
    "hoffmann": (1.69, 406.4, 410.7, 0.34, 0.28),
    "besiroglu": (1.82, 482.0, 2085.4, 0.3478, 0.3658),
    "steep": (1.2, 2.0e3, 3.0e4, 0.45, 0.5),
}
# sizes, budgets, seeds, noise of log L, how it is distributed
SCENARIOS = {
    "5x5x3, noise 0.3%": (5, 5, 3, 0.003, "normal"),
    "5x5x3, noise 1%": (5, 5, 3, 0.01, "normal"),
    "4x4x3, noise 0.5%": (4, 4, 3, 0.005, "normal"),
    "5x5x1, noise 0.5%": (5, 5, 1, 0.005, "normal"),
    "6x6x1, noise 2%": (6, 6, 1, 0.02, "normal"),
    "5x5x3, noise 1%, heavy tails": (5, 5, 3, 0.01, "t3"),
    "5x5x3, noise 0.5%, half of it shared by a point's seeds": (5, 5, 3, 0.005, "point"),
    "5x5x3, noise 0.5%, half of it shared by a seed's runs": (5, 5, 3, 0.005, "seed"),
}


def grid(truth: tuple[float, ...], scenario: tuple, rng: np.random.Generator, name: str = "v") -> Cells:
    """Runs of a law over sizes 1e7..1e9 and budgets 2e8..2e10 tokens."""
    sizes, budgets, seeds, noise, kind = scenario
    i, j, s = (x.ravel() for x in np.meshgrid(*map(np.arange, (sizes, budgets, seeds)), indexing="ij"))
    n, d = np.geomspace(1e7, 1e9, sizes)[i], np.geomspace(2e8, 2e10, budgets)[j]
    e, a, b, alpha, beta = truth
    error = rng.normal(0, noise, len(n))
    if kind == "t3":
        error = rng.standard_t(3, len(n)) * noise / np.sqrt(3)
    if kind == "point":
        error = (error + rng.normal(0, noise, (sizes, budgets))[i, j]) / np.sqrt(2)
    if kind == "seed":
        error = (error + rng.normal(0, noise, seeds)[s]) / np.sqrt(2)
    loss = (e + a / n**alpha + b / d**beta) * np.exp(error)
    absent = np.full(len(n), np.nan)
    return Cells(name, n, d, s, loss, absent, absent, i * 100_000 + j)


def recovery(
    truth: tuple[float, ...], scenario: tuple, grids: int, seed: int, delta: float | None = None
) -> dict[str, dict[str, float]]:
    """Bias, spread, median width and coverage of both exponents; delta: Huber's, None as the noise is."""
    rng = np.random.default_rng(seed)
    estimates, widths, holds = [], [], []
    for _ in range(grids):
        found = fit_all([grid(truth, scenario, rng)], delta=delta)["v"].as_dict()
        estimates.append([found["alpha"], found["beta"]])
        bounds = np.array([found["alpha_ci"], found["beta_ci"]])
        widths.append(bounds[:, 1] - bounds[:, 0])
        holds.append((bounds[:, 0] <= truth[3:]) & (truth[3:] <= bounds[:, 1]))
    bias, spread = np.mean(estimates, 0) - truth[3:], np.std(estimates, 0)
    rows = zip(("alpha", "beta"), bias, spread, np.median(widths, 0), np.mean(holds, 0), strict=True)
    return {
        name: {"bias": float(b), "standard_deviation": float(s), "median_width": float(w), "coverage": float(c)}
        for name, b, s, w, c in rows
    }


def rejections(change: tuple[float, ...], scenario: tuple, pairs: int, seed: int) -> dict[str, float]:
    """Share of pairs of variants for which each test finds a difference at the 5% level.

    change: factors of E, A, B, alpha, beta between the two; A and B are changed at the middle of the design.
    """
    rng = np.random.default_rng(seed)
    one = TRUTHS["hoffmann"]
    e, a, b, alpha, beta = (x * f for x, f in zip(one, change, strict=True))
    a, b = a * 1e8 ** (alpha - one[3]), b * 2e9 ** (beta - one[4])
    hits = dict.fromkeys(HYPOTHESES, 0)
    for _ in range(pairs):
        cells = [grid(one, scenario, rng, "one"), grid((e, a, b, alpha, beta), scenario, rng, "other")]
        fits = fit_all(cells, replicates=200)
        for name, test in compare(fits["one"], fits["other"], replicates=200).items():
            hits[name] += test.p_bootstrap <= 0.05
    return {name: count / pairs for name, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--laws", nargs="+", choices=TRUTHS, default=list(TRUTHS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True, help="written after every scenario")
    args = parser.parse_args()
    report: dict = {
        "command": shlex.join(["python", *sys.argv]), "commit": git_revision(Path(__file__).parent),
        "machine": processor(), "numpy": np.__version__, "seed": args.seed, "grids": args.grids, "pairs": args.pairs,
        "replicates": REPLICATES, "recovery": {}, "delta_1e-3": {}, "tests": {},
    }  # fmt: skip

    def keep(part: str, name: str, found: dict) -> None:
        report[part][name] = found
        print(f"{part}: {name}: {found}", flush=True)
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")

    for law in args.laws:
        for name, scenario in SCENARIOS.items():
            keep("recovery", f"{law}, {name}", recovery(TRUTHS[law], scenario, args.grids, args.seed))
    for name in ("5x5x3, noise 1%", "5x5x1, noise 0.5%"):
        found = recovery(TRUTHS["hoffmann"], SCENARIOS[name], args.grids, args.seed, delta=1e-3)
        keep("delta_1e-3", f"hoffmann, {name}", found)
    changes = {
        "the same law": (1, 1, 1, 1, 1), "E 1% lower": (0.99, 1, 1, 1, 1), "B 5% lower": (1, 1, 0.95, 1, 1),
        "alpha 10% higher": (1, 1, 1, 1.1, 1), "beta 10% higher": (1, 1, 1, 1, 1.1),
    }  # fmt: skip
    for name, change in changes.items() if args.pairs else ():
        keep("tests", name, rejections(change, SCENARIOS["5x5x3, noise 0.3%"], args.pairs, args.seed))


if __name__ == "__main__":
    main()
