"""Fits find the truth, their intervals hold it, and tests say what differs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.optimize import check_grad

from scaling.tables import TRUTH, runs, write_csv
from sidlm.cli.main import main
from sidlm.scaling.cells import read_cells
from sidlm.scaling.fit import compare, fit_all, interval, verdict
from sidlm.scaling.law import NAMES, STARTS, Problem, best_of_many, descend, huber, polish


def table(tmp_path, *variants, columns=("variant", "params", "tokens", "seed", "loss")):
    return write_csv(tmp_path / "cells.csv", [row for rows in variants for row in rows], columns)


def fitted(tmp_path, *variants, **options):
    return fit_all(read_cells(table(tmp_path, *variants)), **options)


def test_exact_losses_give_the_law_back(tmp_path):
    one = fitted(tmp_path, runs(noise=0.0, seeds=1), replicates=20)["a"]
    np.testing.assert_allclose(one.estimate, TRUTH, rtol=2e-3)
    assert abs(one.residual).max() < 1e-6


def test_gradient_of_the_objective():
    rng = np.random.default_rng(0)
    which = np.repeat([0, 1], 20)
    problem = Problem.of(rng.uniform(1e6, 1e8, 40), rng.uniform(1e8, 1e9, 40), rng.uniform(2, 4, 40), which)
    problem = problem.sharing(("alpha", "E"))
    assert problem.size == 8
    phi = problem.merged(np.array([[0.1, -0.5, -0.2, 0.3, 0.4], [0.3, -1.0, -0.4, 0.2, 0.6]]))
    for delta in (1e-2, 10.0):

        def value(x, delta=delta):
            return float(huber(problem.residuals(x, problem.log_loss)[0], delta))

        def slope(x, delta=delta):
            r, jacobian = problem.residuals(x, problem.log_loss)
            return np.clip(r, -delta, delta) @ jacobian

        assert check_grad(value, slope, phi) < 1e-5 * max(1.0, np.abs(slope(phi)).max())


def test_shared_coordinates_are_one():
    which = np.repeat([0, 1], 3)
    problem = Problem.of(np.arange(1.0, 7), np.arange(2.0, 8), np.full(6, 2.0), which).sharing(("alpha", "beta"))
    laws = problem.public(np.arange(problem.size) / 10)
    np.testing.assert_array_equal(laws[0, 3:], laws[1, 3:])
    assert (laws[0, :3] != laws[1, :3]).all()


@pytest.mark.parametrize("delta", [1e-3, 4e-3, 1.0])
def test_lbfgs_agrees_with_the_batch(tmp_path, delta):
    cells = read_cells(table(tmp_path, runs(noise=0.004, rng=5)))[0]
    problem = Problem.of(cells.params, cells.tokens, cells.loss)
    batch, value = descend(problem, STARTS[::50], problem.log_loss, delta)
    found = [polish(problem, start, delta)[1] for start in batch[np.argsort(value)[:3]]]
    assert value.min() <= min(found) * (1 + 1e-4)
    best = best_of_many(problem, delta)
    assert float(huber(problem.residuals(best, problem.log_loss)[0], delta)) <= min(found) * (1 + 1e-4)


def test_intervals_hold_the_truth(tmp_path):
    """A small version of benchmarks/scaling_recovery.py: 60 grids, so 95% is 57 give or take 3."""
    rows = [row for i in range(60) for row in runs(f"v{i}", sizes=4, budgets=4, noise=0.005, rng=i)]
    fits = fitted(tmp_path, rows, replicates=200)
    for place in (3, 4):
        spans = [interval(one.estimate[place], one.samples[:, place], one.df) for one in fits.values()]
        assert 52 <= sum(low <= TRUTH[place] <= high for low, high in spans) <= 60
        # neither because they are empty nor because they are endless
        widths = np.array([high - low for low, high in spans])
        spread = np.std([one.estimate[place] for one in fits.values()])
        assert 3 < np.median(widths) / spread < 8
        assert abs(np.mean([one.estimate[place] for one in fits.values()]) - TRUTH[place]) < 4 * spread / np.sqrt(60)


def test_one_bad_run_does_not_move_the_law(tmp_path):
    rows = runs(noise=0.003)
    before = fitted(tmp_path, rows, replicates=20)["a"].estimate
    rows[37]["loss"] *= 1.3
    after = fitted(tmp_path, rows, replicates=20)["a"].estimate
    np.testing.assert_allclose(after[3:], before[3:], rtol=0.03)


def test_tests_tell_exponents_from_levels(tmp_path):
    e, a, b, alpha, beta = TRUTH
    same = runs("same", rng=1)
    lower = runs("lower", (e * 0.97, a, b, alpha, beta), rng=2)
    steeper = runs("steeper", (e, a, b * (2e9**0.05), alpha, beta + 0.05), rng=3)
    fits = fitted(tmp_path, runs("a"), same, lower, steeper, replicates=100)
    found = {name: compare(fits["a"], fits[name], replicates=199) for name in ("same", "lower", "steeper")}
    p = {name: {key: test.p_bootstrap for key, test in tests.items()} for name, tests in found.items()}
    assert p["same"]["anything"] > 0.05 and "no difference is seen" in verdict(found["same"])
    assert p["lower"]["anything"] < 0.02 and p["lower"]["exponents"] > 0.05
    assert "they differ in E, A or B" in verdict(found["lower"])
    assert p["steeper"]["beta"] < 0.02 and p["steeper"]["exponents"] < 0.02
    assert "the exponents differ" in verdict(found["steeper"]) and "beta" in verdict(found["steeper"])
    assert found["steeper"]["exponents"].df == 2 and found["steeper"]["anything"].df == 5
    assert all(test.likelihood_ratio >= -1e-6 for tests in found.values() for test in tests.values())


def test_the_command_writes_json_by_variant_and_a_report(tmp_path, capsys):
    path = table(tmp_path, runs("<a>"), runs("b", rng=9))
    out = tmp_path / "out.json"
    assert main(["scaling", "fit", str(path), "--json", str(out), "--replicates", "100"]) == 0
    found = json.loads(out.read_text())
    assert list(found) == ["<a>", "b"]
    for one in found.values():
        for name, truth in zip(NAMES, TRUTH, strict=True):
            low, high = one[f"{name}_ci"]
            assert low <= one[name] <= high
            assert name not in ("alpha", "beta") or abs(one[name] - truth) < 0.03
    assert set(found["b"]["against"]["tests"]) >= {"alpha", "beta", "exponents"}
    page = (tmp_path / "cells-fit.html").read_text()
    assert page.count("<svg") >= 3 and "&lt;a&gt;" in page and "<a>" not in page
    assert "no difference" in capsys.readouterr().out


def test_other_columns_of_json_lines(tmp_path):
    rows = [
        row | {"loss": 1.0, "domains": {"code": row["loss"]}, "params_non_embedding": row["params"]}
        for row in runs(noise=0, seeds=1)
    ]
    path = tmp_path / "cells.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (cells,) = read_cells(path, params="params_non_embedding", loss="domains.code")
    assert fit_all([cells], replicates=20)["a"].estimate[3] == pytest.approx(0.34, rel=0.01)
