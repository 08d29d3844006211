"""Likelihoods, greedy choices, needles and draws of a model that no process holds are those of one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("reading_ranks.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([sys.executable, PROGRAM, folder], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


def test_every_mesh_says_what_one_process_says(results):
    assert results.pop("ties") == {"131": 0, "3": 0}
    assert len(results) == 13
    for case, found in results.items():
        assert found["nll"] < 1e-9, case  # of sums of up to 30 tokens, about 100 nats, in float64
        assert found["choices"] == found["needles"] == found["drawn"] == 0, case


def test_a_step_after_a_look_is_that_of_one_process(results):
    steps = [found["step"] for found in results.values() if "step" in found]
    assert len(steps) == 4 and max(steps) < 1e-12
