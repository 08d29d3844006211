"""The kernels around the 2:4 sparse products compile for every target, and read and write wide; no device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = {"cusparselt_16bit", "cusparselt_8bit", "place", "place turned", "rescaled", "unpack"}
QUANTIZE = {"quantize", "quantize wide"}
BOTH_WAYS = {"cusparselt_16bit back", "cusparselt_8bit back"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    program = [sys.executable, str(Path(__file__).with_name("compile_sparse24_products.py")), "sm_90", "sm_80"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_all_of_them_for_every_target(rows):
    found = {arch: {row["kernel"] for row in rows if row["arch"] == arch} for arch in ("sm_90", "sm_80")}
    assert found == {"sm_90": KERNELS | BOTH_WAYS | QUANTIZE, "sm_80": KERNELS | BOTH_WAYS}


def test_they_fit_and_move_sixteen_bytes_at_a_time(rows):
    for row in rows:
        assert row["spills"] == 0 and row["registers"] <= 128 and row["shared"] <= 32 << 10, row
        assert row.get("ld_128", 0) > 0, row
        narrow = {key: n for key, n in row.items() if key in ("st_8", "st_16", "st_32", "st_64")}
        if row["kernel"] in QUANTIZE:  # eight bytes of what was read at once; and the scale
            assert narrow == {"st_32": 1, "st_64": row["ld_128"]}, row
        else:
            assert row["st_128"] > 0 and not narrow, row
