"""Tables of runs of a known law, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

TRUTH = (1.69, 406.4, 410.7, 0.34, 0.28)


def runs(variant="a", truth=TRUTH, sizes=5, budgets=5, seeds=3, noise=0.003, rng=0, cost=1.0):
    """Rows of a full grid; seeds share nothing, places do not either."""
    random = np.random.default_rng(rng)
    e, a, b, alpha, beta = truth
    rows = []
    for n in np.geomspace(1e7, 1e9, sizes):
        for d in np.geomspace(2e8, 2e10, budgets):
            for seed in range(seeds):
                loss = (e + a / n**alpha + b / d**beta) * np.exp(random.normal(0, noise))
                rows.append(
                    {
                        "variant": variant, "params": round(n), "tokens": round(d), "seed": seed, "loss": loss,
                        "flops": 6 * n * d * cost, "tokens_per_second": 1e13 / n / cost,
                    }
                )  # fmt: skip
    return rows


def write_csv(path: Path, rows, columns=("variant", "params", "tokens", "seed", "loss")) -> Path:
    lines = [",".join(columns), *(",".join(str(row[c]) for c in columns) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path
