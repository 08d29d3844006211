"""A grid of real cells under SIGKILL: does every cell finish once, with the losses of an undisturbed grid?

    python benchmarks/kill_grid.py --kills 6 --json benchmarks/results/kill_grid.json

`sid scaling run` of four tiny cells is killed at random moments, half of the time together with the training processes
that it has started, and started again. At the end the losses must be those of a grid that ran undisturbed, to the last
bit; no cell's result may have been written twice, and no optimizer step be missing or recorded twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sidlm.train.hardware import git_revision, processor

GRID = """
settings:
  model.overrides: {num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16,
                    hidden_size: 32, intermediate_size: 64}
  data: {train: [text.jsonl], vocab_size: 520, seq_len: 32, valid_fraction: 0.1, cache_dir: cache}
  train: {batch_size: 4, device: cpu, precision: fp32}
  checkpoint.every: 5
  samples.prompts: []
variants:
  sid: {model.overrides: {layer_types: [full_attention, simplicial_attention], simplicial_window: [8, 4]}}
  llama: {model.arch: llama}
sizes: {s: {}}
tokens: [STEPS]
seeds: [0, 1]
"""


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    """`sid scaling run` with one thread for each of two cells at once."""
    command = [sys.executable, "-m", "sidlm.cli.main", "scaling", "run", "grid.yaml", "--out", out, "--workers", "2"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def training(out: Path) -> list[int]:
    """Processes that say in their run folder that they train there."""
    found = []
    for lock in out.glob("*/*/*/.lock"):
        pid = lock.read_text().strip()
        if pid and b"scaling" in _command_line(int(pid)):
            found.append(int(pid))
    return found


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def results(out: Path) -> dict[str, Path]:
    return {str(file.parent.relative_to(out)): file for file in sorted(out.glob("*/*/*/result.json"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--steps", type=int, default=60, help="of each cell")
    parser.add_argument("--longest", type=float, default=60, help="seconds before a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["the", "cat", "dog", "bird", "sees", "a", "small", "red", "house", "tree", "and", "then", "says"]
        texts = (" ".join(rng.choices(words, k=rng.randint(20, 60))) for _ in range(200))
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (folder / "grid.yaml").write_text(GRID.replace("STEPS", str(args.steps * 4 * 32)))
        undisturbed = start(folder, "undisturbed").wait()
        kills = with_cells = 0
        written: dict[str, int] = {}
        problems = [] if undisturbed == 0 else [f"the undisturbed grid ended with {undisturbed}"]
        while True:
            runner = start(folder, "killed")
            with contextlib.suppress(subprocess.TimeoutExpired):
                runner.wait(rng.uniform(2, args.longest) if kills < args.kills else None)
            if runner.returncode is not None:
                break
            both = rng.random() < 0.5
            for pid in training(folder / "killed") if both else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            runner.kill()
            runner.wait()
            kills, with_cells = kills + 1, with_cells + both
            for cell, file in results(folder / "killed").items():
                when = file.stat().st_mtime_ns
                if written.setdefault(cell, when) != when:
                    problems.append(f"{cell} was finished again")
            time.sleep(rng.uniform(0, 2))
        if runner.returncode:
            problems.append(
                f"the last runner ended with {runner.returncode}: {(folder / 'log.txt').read_text()[-500:]}"
            )
        for cell, file in results(folder / "undisturbed").items():
            other = folder / "killed" / cell
            if not (other / "result.json").exists():
                problems.append(f"{cell} is not finished")
                continue
            one, two = (json.loads((f / "result.json").read_text()) for f in (file.parent, other))
            if (one["loss"], one["domains"]) != (two["loss"], two["domains"]):
                problems.append(f"{cell}: loss {one['loss']!r} undisturbed, {two['loss']!r} killed")
            if written.get(cell) not in (None, (other / "result.json").stat().st_mtime_ns):
                problems.append(f"{cell} was finished again")
            steps = [json.loads(line)["step"] for line in (other / "metrics.jsonl").read_text().splitlines()]
            if steps != list(range(1, args.steps + 1)):
                problems.append(f"{cell}: steps {steps}")
        cells = len(results(folder / "killed"))
    report = {
        "command": shlex.join(["python", *sys.argv]), "commit": git_revision(Path(__file__).parent),
        "machine": processor(), "seed": args.seed, "cells": cells, "steps": args.steps, "kills": kills,
        "kills_with_cells": with_cells, "finished_before_a_kill": len(written), "problems": problems,
    }  # fmt: skip
    Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 1 if problems or cells != 4 else 0


if __name__ == "__main__":
    sys.exit(main())
