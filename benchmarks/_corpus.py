"""One training run by the real command, in a process of its own with one thread, and what it came to."""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SID = shutil.which("sid", path=str(Path(sys.executable).parent)) or shutil.which("sid") or "sid"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def measured(command: list[str]) -> int:
    """Run a command and return its peak resident size in bytes."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{shlex.join(command)} ended with {process.returncode}:\n{log.read().decode()[-3000:]}")
    return usage.ru_maxrss * 1024


def trained(words: list[str], out: Path) -> tuple[dict, list[dict]]:
    """Run `sid train WORDS`; the headline of the run in `out`, and its records. Speed is the median over steps, memory
    the peak resident size of the process."""
    memory = measured([SID, "train", *words])
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    headline = {
        "steps": records[-1]["step"],
        "tokens": records[-1]["tokens"],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records[1:]),
        "mfu": statistics.median(r["mfu"] for r in records[1:]),
        "peak_memory_mb": memory / 1e6,
        "command": shlex.join(["sid", "train", *words]),
        "loss": [r["loss"] and round(r["loss"], 4) for r in records],
    }
    return headline, records
