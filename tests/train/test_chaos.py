import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/chaos.py"


@pytest.mark.slow
def test_processes_that_die_hang_or_turn_slow_are_named_and_nothing_is_lost(tmp_path):
    """benchmarks/chaos.py with two processes: what it asks of itself, for one fault of three kinds."""
    out = tmp_path / "result.json"
    options = [
        "--processes",
        "2",
        "--counts",
        "kill=1",
        "hang=1",
        "slow=1",
        "--watchdog",
        "4",
        "--gap",
        "4",
        "--out",
        out,
    ]
    done = subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["equal"] == {"tensors": True, "weights": True, "metrics": True}
    for row in result["rows"]:
        assert row["kind_right"] and row["rank_right"]
        assert (row["restarts"] > 0) is (row["fault"]["kind"] != "slow")
