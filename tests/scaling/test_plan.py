"""IsoFLOP parabolas, the compute-optimal power law, forecasts, and token efficiency, on numbers with known truth."""

from __future__ import annotations

import json

import numpy as np
import pytest

from scaling.tables import TRUTH, runs, write_csv
from sidlm.cli.main import main
from sidlm.errors import SidError
from sidlm.scaling.cells import read_cells
from sidlm.scaling.efficiency import efficiency, paired
from sidlm.scaling.fit import fit_all
from sidlm.scaling.forecast import fit_forecast
from sidlm.scaling.forms import isoflops, law_optimum, optimal_tokens

ALL = ("variant", "params", "tokens", "seed", "loss", "flops", "tokens_per_second")


def isoflop_rows(rng=0, noise=0.001):
    """Runs at 5 budgets whose loss is a parabola around tokens = 0.3 C^0.54."""
    random, rows = np.random.default_rng(rng), []
    for c in np.geomspace(6e18, 1e22, 5):
        for shift in np.linspace(-1.5, 1.5, 7):
            tokens = 0.3 * c**0.54 * np.exp(shift)
            loss = 10 * c**-0.03 + 0.02 * shift**2 + random.normal(0, noise)
            rows.append(
                {"variant": "a", "params": c / 6 / tokens, "tokens": tokens, "seed": 0, "loss": loss, "flops": c}
            )
    return rows


def test_isoflops_recover_the_power_law(tmp_path):
    held = 0
    for rng in range(20):
        path = write_csv(tmp_path / "cells.csv", isoflop_rows(rng), ALL[:6])
        curves = isoflops(read_cells(path)[0])
        assert len(curves) == 5 and all(curve.inside for curve in curves)
        law = optimal_tokens(curves, replicates=200, seed=rng)
        assert law.alpha == pytest.approx(0.54, abs=0.02)
        low, high = law.interval(3.8e25)
        held += low <= 0.3 * 3.8e25**0.54 <= high
    assert held >= 16


def test_a_plan_from_own_cells(tmp_path, capsys):
    path = write_csv(tmp_path / "cells.csv", isoflop_rows(), ALL[:6])
    out = tmp_path / "plan.json"
    assert main(["scaling", "plan", "--flops", "1e23", "--cells", str(path), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (
        found["tokens"] == pytest.approx(0.3 * 1e23**0.54, rel=0.1) and "IsoFLOP minima of 5 budgets" in found["source"]
    )
    assert found["tokens_ci"][0] < found["tokens"] < found["tokens_ci"][1]
    assert main(["scaling", "fit", str(path), "--json", str(tmp_path / "fit.json"), "--replicates", "50"]) == 0
    assert json.loads((tmp_path / "fit.json").read_text())["a"]["isoflop"]["alpha"] == pytest.approx(0.54, abs=0.03)
    assert "IsoFLOP" in (tmp_path / "cells-fit.html").read_text()


def test_no_minimum_is_said(tmp_path):
    rows = [row | {"loss": 5 - row["loss"]} for row in isoflop_rows()]
    cells = read_cells(write_csv(tmp_path / "cells.csv", rows, ALL[:6]))[0]
    with pytest.raises(SidError, match="5 FLOP budgets have runs at 3 or more token counts, none of"):
        isoflops(cells)


def test_the_laws_optimum_is_where_its_loss_is_least(tmp_path):
    path = write_csv(tmp_path / "cells.csv", runs(noise=0, seeds=1))
    fit = fit_all(read_cells(path), replicates=20)["a"]
    law = law_optimum(fit)
    tokens = np.geomspace(1e8, 1e13, 200_001)
    for c in (1e19, 1e22):
        best = tokens[np.argmin(fit.loss(c / (6 * tokens), tokens))]
        assert law.tokens(c) == pytest.approx(best, rel=1e-3)


def test_efficiency_of_a_variant_that_needs_half_the_tokens(tmp_path):
    e, a, b, alpha, beta = TRUTH
    half = runs("half", (e, a, b * 0.5**beta, alpha, beta), rng=1, noise=0.002, cost=1.25)
    path = write_csv(tmp_path / "cells.csv", [*runs("a", noise=0.002), *half], ALL)
    fits = fit_all(read_cells(path))
    found = efficiency(fits["a"], fits["half"])
    held = {"tokens": 0, "flops": 0, "seconds": 0}
    for point in found["points"]:
        for kind, truth in (("tokens", 0.5), ("flops", 0.625), ("seconds", 0.625)):
            low, high = point[kind]["ci"]
            assert point[kind]["ratio"] == pytest.approx(truth, rel=0.12)
            held[kind] += low <= truth <= high
        # at equal FLOPs it sees 1 / 1.25 of the tokens, each worth two
        gain = b * point["tokens_of_base"] ** -beta * ((2 / 1.25) ** -beta - 1)
        low, high = point["loss_at_equal_flops"]["ci"]
        assert low - 0.01 <= gain <= high + 0.01
    assert min(held.values()) >= 4
    pooled = found["paired"]["all"]
    truth = np.mean([b * (0.5**beta - 1) / d**beta for d in np.geomspace(2e8, 2e10, 5)])
    assert pooled["seeds"] == 3 and pooled["ci"][0] <= truth <= pooled["ci"][1]


def test_the_frontier_is_that_of_the_best_sizes(tmp_path):
    e, a, b, alpha, beta = TRUTH
    half = runs("half", (e, a, b * 0.5**beta, alpha, beta), noise=0, seeds=1, cost=1.25)
    path = write_csv(tmp_path / "cells.csv", [*runs("a", noise=0, seeds=1), *half], ALL)
    fits = fit_all(read_cells(path), replicates=20)
    optimum = law_optimum(fits["a"])
    found = efficiency(fits["a"], fits["half"])["frontier"]
    assert [point["inside"] for point in found].count(True) >= 3
    for point in found:
        tokens = optimum.tokens(point["budget"])
        if point["inside"]:  # sizes are tried in steps of a few percent
            assert point["tokens_of_base"] == pytest.approx(tokens, rel=0.06)
        best = fits["a"].loss(point["budget"] / (6 * tokens), tokens)
        assert point["loss_of_base"] == pytest.approx(float(best), abs=1e-3)
        assert point["flops"]["ratio"] == pytest.approx(0.625, rel=0.02)
        gain = fits["a"].loss(point["budget"] / (6 * tokens), tokens) - optimum_loss(fits["a"], point["budget"] / 0.625)
        assert point["loss_at_equal_flops"]["difference"] == pytest.approx(-float(gain), abs=1e-3)


def optimum_loss(fit, flops):
    tokens = law_optimum(fit).tokens(flops)
    return fit.loss(flops / (6 * tokens), tokens)


def test_a_loss_that_is_never_reached(tmp_path, capsys):
    e, a, b, alpha, beta = TRUTH
    path = write_csv(tmp_path / "cells.csv", [*runs("a"), *runs("worse", (e + 1, a, b, alpha, beta), rng=1)])
    out = tmp_path / "out.json"
    assert main(["scaling", "efficiency", str(path), "--json", str(out), "--replicates", "50"]) == 0
    found = json.loads(out.read_text())["worse"]
    assert found["points"][0]["tokens"] == {"ratio": None, "ci": [None, None]}
    assert "seconds" not in found["points"][0]
    assert "never x (never to never) tokens" in capsys.readouterr().out
    assert "never" in (tmp_path / "cells-efficiency.html").read_text()


def test_pairs_are_of_one_place_and_seed(tmp_path):
    rows = [*runs("a", noise=0), *runs("b", noise=0)]
    for row in rows:
        row["loss"] += 0.1 * row["seed"] - (0.05 if row["variant"] == "b" else 0)
    one, other = read_cells(write_csv(tmp_path / "cells.csv", rows))
    found = paired(one, other)
    assert found["all"]["difference"] == pytest.approx(-0.05) and len(found["places"]) == 25
    assert np.ptp(found["all"]["ci"]) < 1e-9


def models(rng, count=12):
    """Compute, NLL and accuracy of models on a line and a sigmoid over a chance of 1/4."""
    random = np.random.default_rng(rng)
    flops = np.geomspace(1e19, 1e22, count)
    nll = 4 - 0.15 * np.log10(flops) + random.normal(0, 0.01, count)
    wide = np.concatenate([nll, [0.85, 0.7, 0.55, 0.4]])  # larger models of unknown compute
    accuracy = 0.25 + 0.75 / (1 + np.exp((wide - 0.75) / 0.1)) + random.normal(0, 0.01, len(wide))
    return np.concatenate([flops, np.full(4, np.nan)]), wide, accuracy.clip(0, 1)


def test_forecasts_hold_the_truth():
    held_nll = held_accuracy = 0
    nll = 4 - 0.15 * np.log10(1e24)
    accuracy = 0.25 + 0.75 / (1 + np.exp((nll - 0.75) / 0.1))
    for rng in range(20):
        found = fit_forecast(*models(rng), chance=0.25, max_flops=1e22, replicates=300)
        held_nll += found.nll(1e24)[1] <= nll <= found.nll(1e24)[2]
        middle, low, high = found.accuracy(1e24)
        held_accuracy += low <= accuracy <= high
        assert low <= middle <= high and abs(middle - accuracy) < 0.1
    assert held_nll >= 17 and held_accuracy >= 17


def test_forecast_command(tmp_path, capsys):
    columns = ["flops,nll,accuracy"]
    columns += [f"{'' if np.isnan(c) else c},{y},{p}" for c, y, p in zip(*models(0), strict=True)]
    path = tmp_path / "models.csv"
    path.write_text("\n".join(columns) + "\n")
    out = tmp_path / "out.json"
    words = ["scaling", "forecast", str(path), "--flops", "1e24", "3.8e25", "--json", str(out)]
    assert main([*words, "--chance", "0.25", "--max-flops", "1e22"]) == 0
    found = json.loads(out.read_text())["forecasts"]
    assert len(found) == 2 and found[0]["accuracy_ci"][0] < found[0]["accuracy"] < found[0]["accuracy_ci"][1]
    assert "<svg" in (tmp_path / "models-forecast.html").read_text()
    assert "1e+24 FLOPs: NLL" in capsys.readouterr().out
    assert main([*words, "--max-flops", "1e19"]) == 2
    assert "needs models at 3 or more FLOP counts up to 1e+19, got 1" in capsys.readouterr().err
    assert main([*words, "--nll", "nl"]) == 2 and "did you mean 'nll'" in capsys.readouterr().err
