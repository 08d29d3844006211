"""The kernels that pack for 2:4 products compile for every target, fit it and read and write wide; no device.

`compile_sparse24.py` does the work in a process of its own: this one has Triton's interpreter, which cannot compile.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PORTABLE = ("pack", "gradient", "transpose_value", "dense", "rows")  # 16 bits: sm_80 has no e4m3, gfx942 another one
MASKED = ("mask", "mask_gradient", "thin", "split")
FP8 = tuple(f"{name}_fp8" for name in (*PORTABLE, *MASKED[:-1], "features", "features_whole", "columns"))
FP8 += ("turn_pack_value_fp8", "turn_pack_magnitude_fp8", "turn_thin_fp8", "turned_whole_fp8")
FEATURES = 21504
# for two programs of 8 warps on a multiprocessor; float32 tiles to be turned form one, packing three of 8 or five of 4
REGISTERS = {"sm_90": 128, "sm_100": 128, "sm_80": 255, "gfx942": 128}
PACKING_REGISTERS = {("pack", 4): 64, ("pack_fp8", 8): 80, ("pack_fp8", 4): 96}
SHARED = 32 << 10  # of what is turned around; packing has a few hundred bytes, to compare warps


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The reports, by target and kernel."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    words = [
        *("sm_90", "--features", str(FEATURES), "--kernel", *PORTABLE, *MASKED, *FP8, "--"),
        *("sm_90", "--features", "9216", "--dtype", "float16", "--kernel", "pack_fp8", "transpose_magnitude", "--"),
        *("sm_90", "--features", "2304", "--layout", "cusparselt_8bit", "--kernel", "pack_fp8", "--"),
        *("sm_100", "--features", "2304", "--kernel", "pack_fp8", "transpose_value_fp8", "--"),
        *("sm_80", "gfx942", "--features", "2304", "--kernel", *PORTABLE[:3], *MASKED),
    ]
    program = [sys.executable, str(Path(__file__).with_name("compile_sparse24.py")), *words]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def of(rows, arch, features):
    """Rows of one report by kernel."""
    return {row["kernel"]: row for row in rows if (row["arch"], row["features"]) == (arch, features)}


def test_they_fit(rows):
    for row in rows:
        assert row["spills"] == 0 and row.get("stack", 0) == 0, row
        assert row["registers"] <= PACKING_REGISTERS.get((row["kernel"], row["warps"]), REGISTERS[row["arch"]]), row
        assert row["shared"] <= SHARED, row


def test_targets_and_kernels(rows):
    assert set(of(rows, "sm_90", FEATURES)) == {*PORTABLE, *MASKED, *FP8}
    assert set(of(rows, "sm_80", 2304)) == set(of(rows, "gfx942", 2304)) == {*PORTABLE[:3], *MASKED}
    assert len(of(rows, "sm_100", 2304)) == 2 and len(rows) == len({*PORTABLE, *MASKED, *FP8}) + 3 + 2 + 2 * 7


@pytest.mark.parametrize(
    ("arch", "features"), [("sm_90", FEATURES), ("sm_90", 9216), ("sm_90", 2304), ("sm_100", 2304), ("sm_80", 2304)]
)
def test_loads_and_stores_are_wide(rows, arch, features):
    """Dense matrices are read 16 bytes at a time; values of 8 columns are written at once, turned tiles 16 bytes."""
    for kernel, row in of(rows, arch, features).items():
        if kernel.startswith(("pack", "gradient", "rows", "columns")):
            assert row["ld_128"] >= 2, row
            assert row.get("ld_32", 0) + row.get("ld_64", 0) <= row["ld_128"] + 1, row
        if kernel.startswith(("transpose", "rows", "dense", "turned")):
            assert row["st_128"] >= 1 and row.get("st_64", 0) == row.get("st_8", 0) == 0, row
        if kernel in ("pack", "gradient"):
            assert row["st_64"] == row["ld_128"] and "st_32" not in row, row
        if kernel in ("pack_fp8", "gradient_fp8"):  # and the scale
            assert row["st_32"] == row["ld_128"] + 1, row


def test_nothing_is_read_twice(rows):
    """A chunk of eight elements for each of so many threads is one load, the last in part."""
    found = of(rows, "sm_90", FEATURES)
    for kernel in ("pack_fp8", "gradient", "gradient_fp8"):
        assert found[kernel]["ld_128"] == -(-FEATURES // (8 * 32 * found[kernel]["warps"])), found[kernel]


def test_packing_leaves_shared_memory_alone(rows):
    """But for the largest element of a row, and the sums at the end of a tile."""
    for row in rows:
        if row["kernel"] in ("pack_fp8", "gradient_fp8") and row["arch"].startswith("sm_"):
            assert row["shared"] <= 64, row
        if row["kernel"] == "gradient" and row["arch"].startswith("sm_"):
            assert row["shared"] == 0, row
