"""The Triton kernels of 2-simplicial attention compile for every target, fit it and keep to its registers; no device.

`compile_kernels.py` does the work in a process of its own: this one has Triton's interpreter, which cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# instructions; `keys` carries four float32 tiles and stores what else it needs outside its inner loops
SPILLS = {"forward": 40, "queries": 64, "keys": 1000}
SPILLS_IN_LOOPS = 1  # an address, in the loop over blocks with masks
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Rows of the report for one architecture; each is compiled once."""
    folder = tmp_path_factory.mktemp("triton")
    reports = {}

    def report(arch: str, *options: str) -> list[dict]:
        if (arch, options) not in reports:
            environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
            program = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), arch, *options]
            done = subprocess.run(program, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-2000:]
            reports[arch, options] = [json.loads(line) for line in done.stdout.splitlines()]
        return reports[arch, options]

    return report


def check(rows, kernels=("forward", "queries", "keys")):
    assert {row["kernel"] for row in rows} == set(kernels)
    for row in rows:
        arch, kernel = row["arch"], row["kernel"]
        assert row["shared"] <= SHARED[arch], row
        assert row["spills"] <= SPILLS[kernel], row
        assert row["spills_in_loops"] <= SPILLS_IN_LOOPS, row
        assert row.get("tensor_memory", 0) <= 512, row
        assert row.get(MATRIX[arch], 0) > 0, row
        if arch.startswith("sm_"):
            assert row["cp_async"] > 0, row  # loads run ahead of the products


def test_hopper(compiled):
    check(compiled("sm_90", "--dim", "64", "128"))


def test_everything_one(compiled):
    """Arguments that are 1 become constants of the kernel."""
    assert (
        len(compiled("sm_90", "--steps", "1", "--heads", "1", "1", "--window", "1", "1", "--form", "determinant")) == 3
    )


def test_delta(compiled):
    (row,) = compiled("sm_90", "--kernel", "delta", "--form", "trilinear")
    assert row["spills"] == 0


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_targets(compiled, arch):
    check(compiled(arch, "--form", "trilinear"))


def test_documents(compiled):
    """A tile of several queries, which goes through its documents one by one."""
    check(compiled("sm_90", "--docs", "--heads", "4", "4", "--form", "determinant"))
