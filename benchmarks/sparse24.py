"""2:4 activation sparsity on a GPU: every product, every packing and whole layers, beside the best dense ones.

    python benchmarks/sparse24.py [--suite quick|full] [--only layer,gemm,pack] [--models 7B,70B] [--precision fp8]
        [--out benchmarks/results/sparse24_<device>.json] [--plot docs/results/sparse24.png] [--markdown TABLES.md]

Prints a table, draws a plot and writes JSON (after every task), with the sizes from which on sparsity pays, as entries
of src/sidlm/ops/sparse24/crossover.py. Without a GPU, `--device cpu --suite smoke` runs tiny shapes through the same
code. `--list` shows the tasks; `--replot FILE` draws and writes the tables again.

Layers are made so that their activations have the sparsity of trained ones (_sparse24_data.py), and dense variants run
on the same data: zeros make a dense product faster too. A row of a layer has everything in it: quantising x and the
weights, packing, unpacking what stays dense, scales. FLOPs are those of the dense function for every variant. Times
are of CUDA graphs, medians, with the L2 cache overwritten before each; the variants of a task take turns. `host_ms` is
what the host needs to queue the same without a graph.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from _simplicial_timing import Clock, describe, is_usable
from _sparse24_report import HEADER, crossovers, draw, entries, line, tables
from _sparse24_rows import GROUPS, PRECISIONS, SUITES, Task
from _sparse24_timing import copy_bandwidth, prepare, run_task

from sidlm.train import hardware

ROOT = Path(__file__).resolve().parents[1]


def query(words: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={words}", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return None


def facts_of(device: torch.device, args: argparse.Namespace) -> dict:
    known = hardware.environment(device)
    facts = {name: known[name] for name in ("device", "python", "torch", "triton", "sidlm", "cpu_count")}
    facts |= {"git_revision": args.commit or known["git_revision"], "seed": args.seed}
    facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    given = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    facts["command"] = " ".join(["python", "benchmarks/sparse24.py", *given])
    facts |= {"suite": args.suite, "cuda": torch.version.cuda, "driver": None, "cusparselt": None}
    if device.type == "cuda":
        facts |= {"driver": query("driver_version"), "power_limit": query("power.limit")}
        facts["cusparselt"] = torch.backends.cusparselt.version()
    return facts


def write(results: dict, path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--only", help=f"groups of rows, comma-separated: {', '.join(GROUPS)}")
    parser.add_argument("--models", help="names of shapes, comma-separated")
    parser.add_argument("--precision", choices=PRECISIONS, help="rows of this one alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON; benchmarks/results/sparse24_<device>.json on CUDA")
    parser.add_argument("--plot", type=Path, help="PNG; docs/results/sparse24.png on CUDA")
    parser.add_argument("--markdown", type=Path, help="the tables in Markdown")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="leave out what has not begun by then")
    parser.add_argument("--milliseconds", type=float, default=60.0, help="measuring time for a row (5 calls at least)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="revision to record where the script runs outside a checkout")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has, and skip their tasks")
    parser.add_argument("--list", action="store_true", help="print the tasks, and stop")
    parser.add_argument("--replot", type=Path, metavar="JSON", help="plot and tables of a results file, and stop")
    args = parser.parse_args()
    wrong = set(args.only.split(",") if args.only else ()) - set(GROUPS)
    if wrong:
        parser.error(f"--only has {', '.join(sorted(wrong))}, but the groups are {', '.join(GROUPS)}")
    if args.list or args.replot:
        return args
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device here, and this benchmark times GPU kernels. To try the script itself: "
            "python benchmarks/sparse24.py --device cpu --suite smoke"
        )
    if (args.device == "cpu") != (args.suite == "smoke"):
        parser.error("--device cpu goes with --suite smoke (and only that): the other suites would take days")
    return args


def select(args: argparse.Namespace) -> list[Task]:
    tasks = SUITES[args.suite]()
    if args.only:
        tasks = [t for t in tasks if t.group in args.only.split(",")]
    if args.models:
        tasks = [t for t in tasks if t.shape.model in args.models.split(",")]
    if args.precision:
        tasks = [t for t in tasks if t.precision == args.precision]
    return tasks


def identity(row: dict) -> str:
    """What makes a row of a task the same measurement in a later run."""
    return json.dumps([row[name] for name in ("kind", "what", "precision", "model", "T", "d", "F", "density")])


def described(task: Task) -> dict:
    return {"kind": task.kind, "what": task.what, "precision": task.precision, **asdict(task.shape)}


def publish(results: dict, args: argparse.Namespace) -> None:
    """The plot and the tables."""
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(tables(results))
    if args.plot is not None:
        try:
            draw(results, args.plot)
        except ImportError as error:
            print(f"no plot: {error}; draw it elsewhere with --replot")


def main() -> None:
    args = parse()
    if args.replot:
        args.plot = args.plot or ROOT / "docs/results/sparse24.png"
        results = json.loads(args.replot.read_text())
        results["crossovers"] = crossovers(results)
        publish(results, args)
        print(*entries(results), sep="\n")
        return
    tasks = select(args)
    if args.list:
        print(*(line(described(t) | {"variant": "", "status": ""}) for t in tasks), f"{len(tasks)} tasks", sep="\n")
        return
    started, device = time.time(), torch.device(args.device)
    facts = facts_of(device, args)
    if device.type == "cuda":
        name = facts["device"].removeprefix("NVIDIA").strip().lower().replace(" ", "_")
        args.out = args.out or ROOT / f"benchmarks/results/sparse24_{name}.json"
        args.plot = args.plot or ROOT / "docs/results/sparse24.png"
    results = {"runs": [], "rows": [], "crossovers": []}
    if args.resume and args.out is not None and args.out.exists():
        results = json.loads(args.out.read_text())
        failed = {identity(row) for row in results["rows"] if row["status"] != "ok"}
        results["rows"] = [row for row in results["rows"] if identity(row) not in failed]
    clock = Clock(device)
    facts["copy_gb_s"] = copy_bandwidth(clock)
    results["runs"].append(facts)
    print("  ".join(f"{key}: {facts[key]}" for key in ("device", "torch", "triton", "driver", "git_revision")))
    print(f"copy: {facts['copy_gb_s']:.0f} GB/s", HEADER, sep="\n")
    done = {identity(row) for row in results["rows"]}
    layer, made = None, None
    for task in tasks:
        if identity(described(task)) in done:
            continue
        if time.time() - started > args.budget_seconds:
            print(f"the {args.budget_seconds:.0f} s of --budget-seconds are over; --resume goes on")
            break
        try:
            if made != task.shape:
                layer = None
                layer, made = prepare(task, device, args.seed), task.shape
            rows = run_task(task, layer[0], clock, args.seed, args.milliseconds)  # pyright: ignore
            rows = [row | layer[1] for row in rows]  # pyright: ignore
        except Exception as error:  # the layer itself did not fit, say
            rows = [described(task) | {"variant": "", "status": "error", "error": describe(error)}]
        power = {"clock_and_power": query("clocks.sm,power.draw")} if device.type == "cuda" else {}
        results["rows"] += [row | power | {"run": len(results["runs"]) - 1} for row in rows]
        results["crossovers"] = crossovers(results)
        write(results, args.out)
        for row in rows:
            print(line(row), flush=True)
        if not is_usable(device):
            print("the device is in an error state: run again with --resume")
            break
        if device.type == "cuda":
            torch.cuda.empty_cache()
    counts = {status: sum(row["status"] == status for row in results["rows"]) for status in ("ok", "error")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    print(*entries(results), sep="\n")
    publish(results, args)


if __name__ == "__main__":
    main()
