"""The study's cells are pairs of equal parameters, and its statistics are right on numbers with known answers."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _token_cells as cells
import _token_statistics as statistics

from sidlm.models.flops import num_parameters, train_flops_per_token


def test_variants_of_a_size_have_equal_parameters():
    for size in ("xs", "s", "m", "l"):
        made = {
            v: cells.recipe(cells.Cell(group="", size=size, variant=v, seed=0, steps=9)).config for v in cells.VARIANTS
        }
        base = num_parameters(made["full"], non_embedding=True)
        for name, config in made.items():
            if name != "deeper":
                assert abs(num_parameters(config, non_embedding=True) / base - 1) < 0.01, (size, name)
        ratio = train_flops_per_token(made["deeper"], 1024) / train_flops_per_token(made["trilinear"], 1024)
        assert 0.9 < ratio < 1.1


def test_the_plan_has_each_cell_once_and_whole_seeds():
    plan = cells.plan()
    names = [cell.name for cell in plan]
    assert len(set(names)) == len(names)
    core = {(c.size, c.variant, c.seed) for c in plan if c.group == "core"}
    assert core == {(s, v, n) for s in ("xs", "s", "m", "l") for v in cells.CORE for n in range(3)}


def rows(values):
    base = {"size": "s", "steps": 1, "batch": 16, "lr": 1.0, "repeat": 0}
    return [base | {"variant": v, "seed": s, "loss": x, "tokens": 1} for (v, s), x in values.items()]


def test_pairs_and_intervals():
    found = statistics.differences(
        rows({("full", 0): 3.0, ("full", 1): 4.0, ("full", 2): 9.0, ("a", 0): 2.9, ("a", 1): 3.7}), "a", "full"
    )
    assert found == pytest.approx([-0.1, -0.3])
    mean = statistics.mean(found)
    assert mean.value == pytest.approx(-0.2) and mean.half == pytest.approx(12.7062 * 0.1, rel=1e-4)
    groups = [[1.0, 3.0], [0.0, 2.0]]
    assert statistics.common_spread(groups) == (pytest.approx(math.sqrt(2)), 2)
    pooled = statistics.pooled(groups, math.sqrt(2), 2)
    assert pooled.value == 1.5 and pooled.half == pytest.approx(4.3027 * math.sqrt(2) / 2, rel=1e-4)


def test_tokens_saved_is_the_inverse_of_a_power_law():
    slope = statistics.Mean(-0.25, 0.0, 3)
    share, low, high = statistics.tokens_saved(statistics.Mean(0.25 * math.log(0.8), 0.01, 3), slope)
    assert share == pytest.approx(0.2) and low < share < high


def test_seeds_needed():
    assert statistics.seeds_needed(0.02, 0.02) == 7  # t(6) 2.447 / sqrt(7) is the first below 1


def test_the_next_cell_is_the_first_that_fits_in_the_time():
    import time
    from argparse import Namespace
    from collections import defaultdict

    import token_efficiency

    large, small = (cells.Cell(group="core", size=s, variant="full", seed=0, steps=1000) for s in ("l", "xs"))
    pool = token_efficiency.Pool.__new__(token_efficiency.Pool)
    pool.args, pool.queue, pool.retries = Namespace(workers=1), [large, small], []
    pool.factors = defaultdict(list)
    pool.factors["l"] += [1000.0, 1000.0]
    pool.factors["xs"].append(1.0)
    pool.end = time.monotonic() + token_efficiency.OVERHEAD + 2 * cells.cost(small)
    assert pool.next() == (small, True) and pool.next() is None and pool.queue == [large]
    pool.factors["l"] = [0.0]
    pool.retries, pool.queue = [large], []
    assert pool.next() == (large, False)
