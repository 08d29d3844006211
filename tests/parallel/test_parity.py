"""Every kind of parallelism and their mixes over two, four and eight gloo processes, against one process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("parity.py")
TOLERANCE = 1e-12
"""of float64, relative to each tensor's norm: sums over processes are taken in another order"""


def results_of(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, PROGRAM, folder, *arguments], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    # a message of every process for something that happens in each step would drown a log
    assert "sequential all_reduce" not in done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("ranks"))


def test_loss_gradients_norm_and_weights_after_two_steps_are_those_of_one_process(results):
    assert len(results["errors"]) == 21
    for case, errors in results["errors"].items():
        for name, error in errors.items():
            assert error <= TOLERANCE, f"{case}: {name}"


def test_half_precision_is_as_good_as_torch_alone(results):
    """bf16 weights and activations, summed over processes in float32, beside a model in bf16 in one process."""
    for errors in results["half"]:
        for name, (error, own) in errors.items():
            # the loss and the norm are single numbers, whose own error may be small by chance
            assert error <= (2 * own if ": grad" in name else 2**-7), name


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["two", "more", "eight"])
def test_two_and_eight_processes_and_other_mixes(tmp_path, cases):
    for case, errors in results_of(tmp_path, cases)["errors"].items():
        for name, error in errors.items():
            assert error <= TOLERANCE, f"{case}: {name}"
