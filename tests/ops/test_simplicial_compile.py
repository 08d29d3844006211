"""The kernels of 2-simplicial attention compile for every target, fit it and keep to its registers; no device.

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
# instructions; `keys` carries four float32 tiles and stores what else it needs outside its inner loops. In the Gluon
# kernels it is mostly the warps that form and merge tiles that spill, which have few registers and time to spare
SPILLS = {
    "forward": 40, "delta": 0, "copies": 0, "queries": 64, "keys": 1000, "decode": 80, "merge": 0,
    "hopper_forward": 320, "hopper_queries": 200, "hopper_keys": 400, "hopper_keys determinant": 520,
    "hopper_narrow_queries": 760, "hopper_narrow_keys": 80,
}  # fmt: skip
# Addresses and bounds of the window that are read back, never part of a tile. The key gradients form virtual queries in
# their loop, beside four accumulators: there it is a dozen or two of some 400 instructions, of 700 for the determinant,
# which forms them in float32. What the Gluon kernels do once a tile, inside of that loop, is left out
SPILLS_IN_LOOPS = {
    "keys": 16, "hopper_forward": 0, "hopper_queries": 4, "hopper_keys": 16, "hopper_keys determinant": 24, "decode": 0,
    "hopper_narrow_queries": 16, "hopper_narrow_keys": 12,
}  # fmt: skip
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


TRAINING, DECODING = ("forward", "queries", "keys"), ("decode", "merge")
GLUON = ("hopper_forward", "hopper_queries", "hopper_keys")
NARROW = ("hopper_narrow_queries", "hopper_narrow_keys")


def check(rows, kernels=TRAINING):
    assert {row["kernel"] for row in rows} == set(kernels)
    for row in rows:
        arch, kernel = row["arch"], row["kernel"]
        assert row["shared"] <= SHARED[arch], row
        form = f"{kernel} {row['form']}"
        assert row["spills"] <= SPILLS.get(form, SPILLS[kernel]), row
        assert row["spills_in_loops"] <= SPILLS_IN_LOOPS.get(form, SPILLS_IN_LOOPS.get(kernel, 1)), row
        assert row.get("tensor_memory", 0) <= 512, row
        if kernel in ("delta", "copies", "merge"):
            continue
        assert row.get(MATRIX[arch], 0) > 0, row
        if kernel in (*GLUON, *NARROW):
            assert row["loops"] == 2, row  # one for each warpgroup
        elif arch.startswith("sm_"):
            assert row["loops"] > 0, row
            assert row["cp_async"] > 0 or row["stages"] == 1, row  # loads run ahead of the products


def test_hopper(compiled):
    """Every form at the larger size; the smaller one, which has room to spare, once."""
    kernel = ("--kernel", *TRAINING, "delta", "copies")
    check(compiled("sm_90", *kernel, "--", "sm_90", "--dim", "64", "--form", "determinant", *kernel), kernel[1:])


def test_everything_one(compiled):
    """Arguments that are 1 become constants of the kernel."""
    ones = ("--steps", "1", "--heads", "1", "1", "--window", "1", "1", "--form", "determinant")
    assert len(compiled("sm_90", *ones, "--kernel", *TRAINING, *NARROW)) == 5


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_other_targets(compiled, arch):
    check(compiled(arch, "--kernel", *TRAINING, *DECODING), (*TRAINING, *DECODING))


def test_documents(compiled):
    """A tile of several queries, which goes through its documents one by one."""
    check(compiled("sm_90", "--docs", "--heads", "4", "4", "--form", "determinant"))


def test_gluon_and_decoding(compiled):
    """One tile of one query and of several, heads in one group and in eight, both forms, with documents and without."""
    kernel = ("--kernel", *GLUON)
    narrow = ("--kernel", *NARROW)
    rows = compiled(
        *("sm_90", "--form", "trilinear", "--heads", "64", "1", "--bias", "0", "1", *kernel, "--"),
        *("sm_90", "--form", "trilinear", "--heads", "32", "8", "--docs", *kernel, "--"),
        *("sm_90", "--form", "determinant", "--heads", "64", "1", "--docs", *kernel, "--"),
        *("sm_90", "--form", "trilinear", "--heads", "32", "8", "--window", "512", "16", "--dim", "64", *kernel, "--"),
        *("sm_90", "--form", "determinant", "--heads", "32", "8", "--dim", "64", "128", *kernel, "--"),
        *("sm_90", "--form", "trilinear", "--heads", "32", "8", "--docs", *narrow, "--"),
        *("sm_90", "--form", "determinant", "--heads", "32", "8", *narrow, "--"),
        *("sm_90", "--form", "trilinear", "--heads", "5", "5", "--dim", "64", "128", *narrow, "--"),
        *("sm_90", "--form", "trilinear", "--kernel", *DECODING, "--"),
        *("sm_90", "--form", "determinant", "--docs", "--kernel", *DECODING),
    )
    assert len(rows) == 30
    check(rows, (*GLUON, *NARROW, *DECODING))
