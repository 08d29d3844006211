"""Printed fits: the 2-simplicial paper's slopes and Llama 3's compute-optimal tokens, with their rounding."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sidlm.cli.main import main
from sidlm.scaling.forms import LLAMA3, LLAMA3_ROUNDED, slope_without_e, two_point

# arXiv 2507.02754, table 2 and the tables of fits: losses at about 1, 2 and 3.5 billion active parameters; alpha, b
TABLE = {
    ("transformer", "GSM8K"): ((0.3277, 0.2987, 0.2781), (0.1420, -1.8280)),
    ("transformer", "MMLU"): ((0.6411, 0.5932, 0.5543), (0.1256, -2.1606)),
    ("transformer", "MMLU-pro"): ((0.8718, 0.8193, 0.7858), (0.0901, -1.7289)),
    ("transformer", "MBPP"): ((0.2690, 0.2435, 0.2203), (0.1720, -2.2569)),
    ("2-simplicial", "GSM8K"): ((0.3302, 0.2942, 0.2718), (0.1683, -2.3939)),
    ("2-simplicial", "MMLU"): ((0.6423, 0.5862, 0.5484), (0.1364, -2.3960)),
    ("2-simplicial", "MMLU-pro"): ((0.8718, 0.8135, 0.7689), (0.1083, -2.1181)),
    ("2-simplicial", "MBPP"): ((0.2714, 0.2411, 0.2193), (0.1837, -2.5201)),
}
R2 = {
    ("transformer", "GSM8K"): 0.9998, ("transformer", "MMLU"): 0.9995, ("transformer", "MMLU-pro"): 0.9972,
    ("transformer", "MBPP"): 0.9962, ("2-simplicial", "GSM8K"): 0.9974, ("2-simplicial", "MMLU"): 0.9989,
    ("2-simplicial", "MMLU-pro"): 0.9999, ("2-simplicial", "MBPP"): 0.9999,
}  # fmt: skip


def sizes_behind_the_fits(model: str) -> np.ndarray:
    """The paper rounds its sizes; each printed line gives them back as N = exp((-log L - b) / alpha)."""
    implied = [np.exp((-np.log(loss) - b) / alpha) for (name, _), (loss, (alpha, b)) in TABLE.items() if name == model]
    return np.exp(np.mean(np.log(implied), 0))


def test_the_papers_exponents_come_out():
    """At the sizes that its lines imply: 8% to 9% more active parameters in the 2-simplicial models."""
    sizes = {model: sizes_behind_the_fits(model) for model in ("transformer", "2-simplicial")}
    assert sizes["transformer"] == pytest.approx([1.01e9, 1.91e9, 3.22e9], rel=0.01)
    assert sizes["2-simplicial"] / sizes["transformer"] == pytest.approx([1.085, 1.11, 1.086], rel=0.01)
    for key, (loss, (alpha, b)) in TABLE.items():
        found = slope_without_e(sizes[key[0]], loss)
        assert found["alpha"] == pytest.approx(alpha, rel=0.004), key
        assert found["b"] == pytest.approx(b, rel=0.005), key
        assert found["r2"] == pytest.approx(R2[key], abs=2e-3), key


def test_nominal_sizes_shift_them_all_alike():
    nominal = {key: slope_without_e([1e9, 2e9, 3.5e9], loss)["alpha"] for key, (loss, _) in TABLE.items()}
    for task, full, simplicial, gain in (
        ("GSM8K", 0.1311, 0.1558, 0.188), ("MMLU", 0.1160, 0.1264, 0.090), ("MMLU-pro", 0.0832, 0.1002, 0.204),
        ("MBPP", 0.1588, 0.1702, 0.072),
    ):  # fmt: skip
        one, other = nominal["transformer", task], nominal["2-simplicial", task]
        assert (one, other) == (pytest.approx(full, abs=6e-5), pytest.approx(simplicial, abs=6e-5))
        assert other / one - 1 == pytest.approx(gain, abs=1.5e-3)


def test_one_degree_of_freedom_is_not_much():
    """What the paper does not say: with three points the interval of most of its slopes holds the other model's."""
    found = slope_without_e([1e9, 2e9, 3.5e9], TABLE["transformer", "MBPP"][0])
    assert found["alpha_low"] < 0.1702 < found["alpha_high"]


def test_two_points():
    assert two_point((1e9, 2.0), (4e9, 1.0)) == pytest.approx(0.5)


def test_llama_3s_fit_and_its_rounding(tmp_path, capsys):
    assert LLAMA3.tokens(3.8e25) == pytest.approx(16.3e12, rel=0.005)
    assert LLAMA3.tokens(3.8e25) == pytest.approx(16.55e12, rel=0.02)
    assert LLAMA3_ROUNDED.tokens(3.8e25) == pytest.approx(10.5e12, rel=0.01)
    assert pytest.approx(383e9, rel=0.001) == 3.8e25 / (6 * 16.55e12)
    assert pytest.approx(3.79e25, rel=0.001) == 6 * 405e9 * 15.6e12
    out = tmp_path / "plan.json"
    words = ["scaling", "plan", "--flops", "3.8e25", "--json", str(out), "--html", str(tmp_path / "plan.html")]
    assert main(words) == 0
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    assert found["tokens"] == pytest.approx(16.3e12, rel=0.005) and found["params"] == pytest.approx(389e9, rel=0.005)
    assert "Llama 3, figure 3" in said and "10.5T" in said and "16.55T" in said
    assert "<svg" in (tmp_path / "plan.html").read_text()
