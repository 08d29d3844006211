"""benchmarks/sparse24_gradients.py, small: every part of the recipe makes gradients better."""

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/sparse24_gradients.py"


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    file = tmp_path_factory.mktemp("gradients") / "x.json"
    words = ["--tokens", "256", "--width", "32", "--features", "1280", "--batches", "2", "--json", str(file)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        patch.setattr(sys, "argv", ["sparse24_gradients.py", *words])
        importlib.import_module("sparse24_gradients").main()
    results = json.loads(file.read_text())
    assert str(file.parent) not in json.dumps(results)
    return results["layers"]


def test_ablations_err_more_than_the_recipe(layers):
    arms = layers["as trained"]["arms"]
    recipe, naive, no_permutation, no_reuse = arms.values()
    for worse in (naive, no_permutation):
        assert worse["dropped_along_tokens"] > 2 * recipe["dropped_along_tokens"]
        for name in ("dw_up", "dw_down"):
            assert worse[name] > 2 * recipe[name]
            assert worse[f"{name} mean"] > 0.5 * worse[name]  # one-sided: it does not average out
    # that of another function than the forward pass computes, in what goes on to the layers before, too
    assert recipe["dx"] < 1e-5 and no_reuse["dx"] > 0.01 and no_reuse["dw_up"] > recipe["dw_up"]


def test_a_fresh_layer_loses_a_fifth(layers):
    fresh, trained = layers["fresh"], layers["as trained"]
    assert 0.17 < fresh["dropped"] < 0.2 and trained["dropped"] < 0.02  # (4 * 1/16 * 1 + 1/16 * 2) / 2 = 0.1875
    assert fresh["forward"] > 2 * trained["forward"]
