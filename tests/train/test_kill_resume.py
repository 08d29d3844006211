import json
import subprocess
import sys
from pathlib import Path


def test_killed_three_times_equals_uninterrupted(tmp_path):
    """benchmarks/kill_resume.py with one run: SIGKILL at three random moments, then bit for bit the same result."""
    script = Path(__file__).parents[2] / "benchmarks/kill_resume.py"
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, script, "--runs", "1", "--kills", "3", "--seed", "5", "--out", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["failed"] == 0 and result["kills"] >= 1
