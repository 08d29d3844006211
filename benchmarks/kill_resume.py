"""Claim: a run that is killed (SIGKILL) at any moment goes on as if nothing had happened.

    python benchmarks/kill_resume.py --runs 50 --out benchmarks/results/kill_resume.json

A tiny run is trained once without interruption. Then, --runs times, the same run is started in a process of its own,
killed after a random time, started again, and so on; the last start is left alone. In the end the final checkpoint
(model and optimizer) and the exported weights must equal the reference bit for bit, and metrics.jsonl must have each
step exactly once with the same numbers. After every kill, each checkpoint under a final name must be complete.

Each start is `sid train` in a new process, forked from a server that has imported torch and transformers already: the
import takes seconds and nobody learns from killing it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shlex
import signal
import sys
import tempfile
import time
from pathlib import Path

TINY = shlex.split(
    "--model.set hidden_size=32 num_attention_heads=2 num_key_value_heads=1 head_dim=16 intermediate_size=48 "
    "simplicial_window=[8,4] --data.vocab_size 520 --data.seq_len 32 --data.valid_fraction 0.1 --train.batch_size 8 "
    "--train.steps 30 --train.device cpu --train.precision fp32 --checkpoint.every 3 --checkpoint.export_every 10 "
    "--validation.every 10 --samples.max_new_tokens 4 --samples.prompts sid"
)
NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "valid")


def train_quietly(argv: list[str], log: str) -> None:
    """The process that gets killed: `sid train argv`, with its output in a file. Exits with the command's status."""
    from sidlm.cli.main import main

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    status = main(["train", *argv])
    sys.stdout.flush()
    os._exit(status)


def start(context: multiprocessing.context.BaseContext, argv: list[str], log: Path) -> multiprocessing.Process:
    process = context.Process(target=train_quietly, args=(argv, str(log)))
    process.start()
    return process


def write_corpus(path: Path) -> None:
    rng = random.Random(0)
    words = ["sid", "trains", "small", "models", "on", "a", "cpu", "with", "pairs", "of", "keys", "and", "windows"]
    with path.open("w") as file:
        for _ in range(300):
            file.write(json.dumps({"text": " ".join(rng.choice(words) for _ in range(rng.randint(3, 60)))}) + "\n")


def outcome(out: Path) -> dict[str, object]:
    """What must be equal: checksums of the final tensors and of the exported weights, and the numbers of every step."""
    import hashlib

    from sidlm.train import checkpoint

    found = checkpoint.newest_good(out / "checkpoints")
    files = [f for f in found.state["files"] if f["path"].endswith(".distcp")] if found else []
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "step": found.step if found else None,
        "tensors": files,
        "weights": hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{key: record.get(key) for key in NUMBERS} for record in records],
        "samples": (out / "samples.jsonl").read_text(),
        "leftovers": sorted(str(p.relative_to(out)) for p in out.rglob(".tmp-*")),
    }


def check_checkpoints(out: Path) -> list[str]:
    """Complaints about checkpoints of a final name that are not complete."""
    from sidlm.errors import SidError
    from sidlm.train import checkpoint

    complaints = []
    for path in (out / "checkpoints").glob("step-*"):
        try:
            checkpoint.open_checkpoint(path)
        except SidError as error:
            complaints.append(str(error))
    return complaints


def one_run(
    context: multiprocessing.context.BaseContext,
    out: Path,
    argv: list[str],
    kills: int,
    seconds: float,
    rng: random.Random,
) -> dict[str, object]:
    """Start, kill, ..., start and wait. seconds: how long an uninterrupted run takes."""
    log, delays, complaints, late = out.with_suffix(".log"), [], [], 0
    for _ in range(kills):
        process = start(context, argv, log)
        delays.append(round(rng.uniform(0.0, seconds), 3))
        process.join(delays[-1])
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        else:
            late += 1
        complaints += check_checkpoints(out)
    process = start(context, argv, log)
    process.join()
    return {"killed_after": delays, "too_late": late, "status": process.exitcode, "complaints": complaints}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=4, help="in each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sidlm.train.loop", "sidlm.models", "sidlm.data.loader", "sidlm.evaluate"])
    rng, failures, runs, kills = random.Random(options.seed), [], [], 0
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_corpus(base / "text.jsonl")
        argv = [*TINY, "--data.train", str(base / "text.jsonl"), "--data.cache_dir", str(base / "cache"), "--train.out"]
        for name in ("warm", "reference"):  # the first one fills the caches, the second one is timed
            began = time.perf_counter()
            process = start(context, [*argv, str(base / name)], base / f"{name}.log")
            process.join()
            seconds = time.perf_counter() - began
            if process.exitcode:
                print((base / f"{name}.log").read_text(), file=sys.stderr)
                return 1
        reference = outcome(base / "reference")
        for index in range(options.runs):
            out = base / f"run{index}"
            run = one_run(context, out, [*argv, str(out)], options.kills, seconds, rng)
            kills += options.kills - run["too_late"]
            differing = ["status"] if run["status"] else [k for k, v in outcome(out).items() if v != reference[k]]
            if differing or run["complaints"]:
                failures.append({"run": index, "differing": differing, **run})
                print(f"run {index}: {differing} {run['complaints']}\n{out.with_suffix('.log').read_text()[-2000:]}")
            runs.append(run)
            verdict = "FAILED" if differing or run["complaints"] else "equal"
            print(f"run {index + 1}/{options.runs}: {verdict}", flush=True)
    import torch

    from sidlm.train.hardware import environment

    result = {
        "command": shlex.join(["python", "benchmarks/kill_resume.py", *sys.argv[1:]]),
        "runs": options.runs, "kills": kills, "steps": len(reference["metrics"]), "failed": len(failures),
        "failures": failures, "seconds_uninterrupted": round(seconds, 2),
        "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("runs", "kills", "failed")}))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
