"""One training run by the real command, in a process of its own with one thread, and what it came to."""

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SID = shutil.which("sid", path=str(Path(sys.executable).parent)) or shutil.which("sid")
COMMAND = [sys.executable, "-m", "sidlm.cli.main"] if SID is None else [SID]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


CUT = 128 + signal.SIGTERM
"""What `sid train` ends with after it was asked to"""


def measured(command: list[str], deadline: float = threading.TIMEOUT_MAX) -> int:
    """Run a command and return its peak resident size in bytes. It is asked to end at `deadline`, of time.monotonic."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        left = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        timer = threading.Timer(left, os.kill, (process.pid, signal.SIGTERM))
        timer.daemon = True
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, CUT, -signal.SIGTERM):
            log.seek(0)
            sys.exit(f"{shlex.join(command)} ended with {process.returncode}:\n{log.read().decode()[-3000:]}")
    return usage.ru_maxrss * 1024


def trained(words: list[str], out: Path, deadline: float = threading.TIMEOUT_MAX) -> tuple[dict, list[dict]]:
    """Run `sid train WORDS`; the headline of the run in `out`, and its records. Speed is the median over steps, memory
    the peak resident size of the process. A run that `deadline` cut has fewer steps."""
    memory = measured([*COMMAND, "train", *words], deadline)
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
