"""Claim: a run of four processes survives every kind of fault that the issue of a large run is, names it, and loses
nothing: its final weights are those of an undisturbed run, bit for bit.

    python benchmarks/chaos.py --out benchmarks/results/chaos_cpu.json

torchrun's own agent (torch.distributed.launcher) starts `sid train` in four processes, and starts them again when one
of them fails. They train a tiny model on a small disk of their own (a tmpfs, so the script needs root; without it no
disk fills up). At random steps a random process kills itself, stops, hangs, becomes slow, flips a bit of its
gradients, fills the disk, or loses its connections (benchmarks/_faults.py). What Sid itself then says is compared with
what was done. Processes are forked from a server that has imported torch already: imports are nobody's recovery.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _faults import KINDS, Fault, Injector, free, schedule
from kill_resume import TINY, write_corpus

COUNTS = {"kill": 8, "stop": 3, "hang": 4, "slow": 4, "flip": 5, "disk": 3, "cut": 3, "reset": 3}
NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "valid")
SETTINGS = shlex.split(
    "--parallel.dp_replicate 2 --train.verify_every 1 --train.verify_recompute_every 1 --checkpoint.every 5 "
    "--checkpoint.max_failed 100 --checkpoint.export_every 0 --validation.every 40 --validation.documents 4 "
    "--data.valid_fraction 0.05"
)
SLOW_STEPS = 2
FREED_AFTER = 5.0
"""Seconds until a full disk has room again"""


def worker(argv: list[str], faults: list[Fault], folder: str, disk: str, slow: float) -> None:
    """`sid train` in one process, with its faults."""
    import torch

    from sidlm.cli.main import main
    from sidlm.train import hardware, processes, train_step
    from sidlm.train.health.monitor import Health

    rank = int(os.environ["RANK"])
    handle = os.open(Path(folder) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    hardware.peak_flops = lambda device, precision: hardware.Peak(1e11, "not of interest")
    injector = Injector(faults, rank, Path(folder), Path(disk), slow, SLOW_STEPS)
    begin, compute = Health.at, train_step.gradients

    def at(self: Health, phase: str, step: int | None = None) -> None:
        begin(self, phase, step)
        if step is not None:
            injector.at(step)

    def gradients(model: Any, *rest: Any) -> Any:
        with injector.flipping(model):
            return compute(model, *rest)

    Health.at, train_step.gradients = at, gradients
    processes.HEAD_START, processes.LAST_WORDS = 0.3, 0.6
    status = main(["train", *argv])
    sys.stdout.flush()
    if status:
        raise SystemExit(status)


def launch(argv: list[str], faults: list[Fault], folder: Path, disk: Path, options: argparse.Namespace) -> float:
    """Run to the end under torchrun's agent; seconds."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=options.processes, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", run_id=folder.name, max_restarts=4 * len(faults) + 1, start_method="forkserver",
    )  # fmt: skip
    began = time.time()
    elastic_launch(config, worker)(argv, faults, str(folder), str(disk), options.slow)
    return time.time() - began


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[bool]:
    """A file system of that size at `place`; whether it could be made."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=False)


def keep_freeing(faults: list[Fault], folder: Path, disk: Path, after: float, ended: threading.Event) -> None:
    """Make room on the disk some seconds after it was filled."""
    waiting = [fault for fault in faults if fault.kind == "disk"]
    while waiting and not ended.wait(0.2):
        moment = fired(folder, waiting[0])
        if moment is not None and time.time() > moment["time"] + after:
            free(disk)
            waiting.pop(0)


def fired(folder: Path, fault: Fault) -> dict[str, Any] | None:
    """When and in which step a fault struck."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / f"fired-{fault.index}").read_text())
    return None


def outcome(out: Path) -> dict[str, Any]:
    """What must be equal: checksums of the final tensors and the exported weights, the numbers of every step."""
    import hashlib

    from sidlm.train import checkpoint

    found = checkpoint.newest_good(out / "checkpoints")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "tensors": found and [file for file in found.state["files"] if file["path"].endswith(".distcp")],
        "weights": hashlib.sha256((out / "model/model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{key: record.get(key) for key in NUMBERS} for record in records],
    }


def read_steps(folder: Path) -> list[tuple[float, int]]:
    lines = (folder / "steps.log").read_text().splitlines()
    return [(float(moment), int(step)) for moment, step in (line.split() for line in lines)]


EXPECTED = {
    "kill": "killed", "stop": "hung", "hang": "hung", "cut": "network", "reset": "network", "flip": "corruption",
}  # fmt: skip
"""Kind of fault -> kind of diagnosis"""


LATER = {"disk": 5, "slow": SLOW_STEPS - 1}
"""Steps after a fault's that are right too: a disk is found full when something is written next"""


def judge(fault: Fault, struck: dict[str, Any], until: float, evidence: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether what Sid said between a fault and the next one names it. evidence: diagnoses and events with "time"."""
    said = [one for one in evidence if struck["time"] - 0.05 <= one["time"] < until]
    right = [one for one in said if one["kind"] == EXPECTED.get(fault.kind, fault.kind)]
    best = next((one for one in right if one["ranks"] == [fault.rank]), right[0] if right else None)
    return {
        "detected": bool(said),
        "kind_right": best is not None,
        "rank_right": best is not None and best["ranks"] == [fault.rank],
        "step_right": best is not None and 0 <= best["step"] - struck["step"] <= LATER.get(fault.kind, 0),
        "collective": best and best.get("collective") and collective_name(best["collective"]),
        "seconds_to_detect": round(best["time"] - struck["time"], 2) if best else None,
        "line": best["line"] if best else "; ".join(one["line"] for one in said) or None,
    }


def collective_name(collective: dict[str, Any]) -> str:
    return f"{collective['name']} #{collective['number']} ({collective['group']})"


def recovery(struck: dict[str, Any], until: float, steps: list[tuple[float, int]]) -> dict[str, Any]:
    """Of steps begun [(time, step)] in the first process, between a fault and the next one: how long until the fault's
    step was passed, how many steps were begun again, and how often the run was started again."""
    last = highest = max([step for moment, step in steps if moment <= struck["time"]], default=0)
    repeated = restarts = 0
    passed = None
    for moment, step in steps:
        if not struck["time"] < moment < until:
            continue
        if step <= last:
            restarts, passed = restarts + 1, None  # the others may begin a step more after one has failed
        repeated += step <= highest
        if passed is None and step > struck["step"]:
            passed = moment
        last, highest = step, max(highest, step)
    return {
        "seconds_to_recover": round(passed - struck["time"], 2) if passed is not None else None,
        "steps_repeated": repeated,
        "restarts": restarts,
    }


def events(folder: Path, out: Path) -> list[dict[str, Any]]:
    """All that Sid noticed, in the order of time: its diagnoses, and what it survived without a restart."""
    from sidlm.train.health import files

    found = files.history(out)
    for one in found:
        if one["kind"] == "failed" and "No space left on device" in one["error"]:
            one |= {"kind": "disk"}
    return sorted(found, key=lambda one: one["time"])


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By kind of fault."""
    table = {}
    for kind in KINDS:
        mine = [row for row in rows if row["fault"]["kind"] == kind]
        detect, recover = (
            [row[key] for row in mine if row[key] is not None] for key in ("seconds_to_detect", "seconds_to_recover")
        )
        if mine:
            table[kind] = {
                "faults": len(mine),
                **{
                    key: sum(row[key] for row in mine) for key in ("detected", "kind_right", "rank_right", "step_right")
                },
                "median_seconds_to_detect": round(statistics.median(detect), 2) if detect else None,
                "median_seconds_to_recover": round(statistics.median(recover), 2) if recover else None,
                "steps_repeated": sum(row["steps_repeated"] for row in mine),
                "restarts": sum(row["restarts"] for row in mine),
            }
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faults in a run of several processes.")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--counts", nargs="*", default=[], metavar="KIND=N", help=f"faults; all of {COUNTS}")
    parser.add_argument("--gap", type=int, default=6, help="steps between two faults, and sometimes one or two more")
    parser.add_argument("--watchdog", type=float, default=10.0, help="train.watchdog_seconds")
    parser.add_argument("--slow", type=float, default=3.0, help="seconds by which a slow process is late in a step")
    parser.add_argument("--megabytes", type=int, default=24, help="size of the disk")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def main() -> int:
    import multiprocessing

    options = parse()
    environment = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    os.environ |= environment | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3"}
    multiprocessing.set_forkserver_preload(
        ["sidlm.train.loop", "sidlm.models", "sidlm.data.loader", "sidlm.evaluate", "sidlm.parallel.shard"]
    )
    counts = {kind: int(count) for kind, _, count in (text.partition("=") for text in options.counts)} or COUNTS
    with tempfile.TemporaryDirectory() as temporary:
        base = options.folder or Path(temporary)
        base.mkdir(parents=True, exist_ok=True)
        with small_disk(base / "disk", options.megabytes) as small:
            if not small:
                print("no file system of its own without root: the disk will not be filled", file=sys.stderr)
                counts.pop("disk", None)
            return compare(base, counts, options)


def compare(base: Path, counts: dict[str, int], options: argparse.Namespace) -> int:
    """Both runs, and the table; 1 if anything differs or went unnoticed."""
    faults = schedule(options.seed, counts, first=4, gap=options.gap, ranks=options.processes)
    steps = faults[-1].step + options.gap
    write_corpus(base / "text.jsonl")
    argv = [*TINY, "--data.train", str(base / "text.jsonl"), "--data.cache_dir", str(base / "cache"), *SETTINGS]
    argv += ["--train.steps", str(steps), "--train.watchdog_seconds", str(options.watchdog)]
    disk, seconds, ended = base / "disk", {}, threading.Event()
    for name, planned in (("undisturbed", []), ("chaos", faults)):
        folder = base / name
        folder.mkdir()
        freeing = threading.Thread(target=keep_freeing, args=(planned, folder, disk, FREED_AFTER, ended), daemon=True)
        freeing.start()
        seconds[name] = launch([*argv, "--train.out", str(disk / name)], planned, folder, disk, options)
        print(f"{name}: {steps} steps in {seconds[name]:.0f} s", flush=True)
    ended.set()
    expected, found = (outcome(disk / name) for name in ("undisturbed", "chaos"))
    equal = {key: expected[key] == found[key] for key in expected}
    struck = {fault.index: fired(base / "chaos", fault) for fault in faults}
    times = sorted(one["time"] for one in struck.values() if one)
    evidence, begun = events(base / "chaos", disk / "chaos"), read_steps(base / "chaos")
    rows = []
    for fault in faults:
        hit = struck[fault.index]
        if hit is None:
            raise RuntimeError(f"{fault} did not strike")
        until = min([moment for moment in times if moment > hit["time"]], default=float("inf"))
        rows.append({"fault": asdict(fault), "struck": hit} | judge(fault, hit, until, evidence))
        rows[-1] |= recovery(hit, until, begun)
    return report(options, rows, equal, evidence, seconds, steps)


def report(
    options: argparse.Namespace, rows: list[Any], equal: dict[str, bool], evidence: list[Any], seconds: Any, steps: int
) -> int:
    import torch

    from sidlm.train.hardware import environment

    lines = {row["line"] for row in rows}
    result = {
        "command": shlex.join(["python", "benchmarks/chaos.py", *sys.argv[1:]]),
        "processes": options.processes, "seed": options.seed, "steps": steps, "faults": len(rows), "equal": equal,
        "seconds": {name: round(value, 1) for name, value in seconds.items()}, "by_kind": summary(rows), "rows": rows,
        "other_diagnoses": [one for one in evidence if one["line"] not in lines],
        "environment": environment(torch.device("cpu")),
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("faults", "equal", "by_kind")}, indent=1))
    for row in rows:
        verdict = "named" if row["rank_right"] and row["step_right"] else "NOT NAMED"
        what = f"{row['fault']['kind']} of rank {row['fault']['rank']} at step {row['struck']['step']}"
        print(f"{what}: {verdict}: {row['line']}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(equal.values()) and all(row["rank_right"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
