"""2-simplicial attention on a GPU: speed at the published shapes and beyond, beside what else there is.

    python benchmarks/simplicial.py [--suite quick|full] [--only forward,backward,decode,baselines]
        [--out benchmarks/results/simplicial_<device>.json] [--plot docs/results/simplicial.png]

Prints a table, draws a plot and writes JSON (after every row). Without a GPU, `--device cpu --suite smoke` runs tiny
shapes through the same code. `--list` shows the rows and what they cost; `--replot FILE` draws again.

Convention: 4 D FLOPs forward and 12 D backward for each visible (query head, pair of keys), counted exactly; a causal
dot product counts 2 N^2 D a head forward and 2.5 times that backward; a matrix product 2 n^3. What a kernel computes
beyond that (masked pairs, recomputation) is its own affair. Times are CUDA events around one call, medians, with
the L2 cache overwritten before each; inputs are normal, bf16. The variants of one task take turns: their ratio is fair.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from _simplicial_baselines import PUBLISHED
from _simplicial_report import HEADER, draw, line
from _simplicial_rows import GROUPS, SUITES, Shape, Task, Variant, document_lengths, flops_of
from _simplicial_timing import Clock, describe, is_usable, run_task

from sidlm.train import hardware

ROOT = Path(__file__).resolve().parents[1]


def facts_of(device: torch.device, args: argparse.Namespace) -> dict:
    known = hardware.environment(device)
    facts = {name: known[name] for name in ("device", "python", "torch", "triton", "sidlm", "cpu_count")}
    facts |= {"git_revision": args.commit or known["git_revision"], "seed": args.seed}
    facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    given = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    facts["command"] = " ".join(["python", "benchmarks/simplicial.py", *given])
    facts |= {"suite": args.suite, "cuda": torch.version.cuda, "driver": None}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return facts


def write(results: dict, path: Path | None) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".tmp")
    new.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(new, path)


def skipped(task: Task, reason: str) -> list[dict]:
    row = {"section": task.section, "kind": task.kind, **asdict(task.shape), "status": "skipped", "error": reason}
    return [
        row | {"variant": v.name, "form": v.form, "impl": v.impl, "compensate": v.compensate} for v in task.variants
    ]


def show_list(tasks: list[Task], seed: int) -> None:
    total = 0.0
    print(f"{HEADER}{'s at 500 TFLOP/s':>20}")
    for task in tasks:
        for variant in task.variants:
            lengths = document_lengths(task.shape.N, seed) if task.shape.docs else None
            once = flops_of(task, variant, lengths) / 500e12
            seconds = once * (3 + max(5, min(100, 0.2 / once)))
            total += seconds
            row = {"section": task.section, "kind": task.kind, "variant": variant.name, **asdict(task.shape)}
            print(line(row | {"form": variant.form, "status": ""}) + f"{seconds:>20.2f}")
    count = sum(len(task.variants) for task in tasks)
    print(f"{count} rows, {total:.0f} s of measuring at 500 TFLOP/s, without compilation and slower baselines")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="quick")
    parser.add_argument("--only", help=f"groups of rows, comma-separated: {', '.join(GROUPS)}")
    parser.add_argument("--sections", help="parts of section names, comma-separated: only those rows")
    parser.add_argument("--impl", help="run these implementations, comma-separated, in place of the default one")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="JSON; benchmarks/results/simplicial_<device>.json on CUDA")
    parser.add_argument("--plot", type=Path, help="PNG; docs/results/simplicial.png on CUDA")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="skip what has not begun by then")
    parser.add_argument("--milliseconds", type=float, default=200.0, help="measuring time for a row (5 calls at least)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="revision to record where the script runs outside a checkout")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out has, and skip their tasks")
    parser.add_argument("--list", action="store_true", help="print the rows and what they cost, and stop")
    parser.add_argument("--replot", type=Path, metavar="JSON", help="draw --plot from a results file, and stop")
    args = parser.parse_args()
    wrong = set(args.only.split(",") if args.only else ()) - set(GROUPS)
    if wrong:
        parser.error(f"--only has {', '.join(sorted(wrong))}, but the groups are {', '.join(GROUPS)}")
    if args.list or args.replot:
        return args
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "no CUDA device here, and this benchmark times GPU kernels. To try the script itself: "
            "python benchmarks/simplicial.py --device cpu --suite smoke"
        )
    if (args.device == "cpu") != (args.suite == "smoke"):
        parser.error("--device cpu goes with --suite smoke (and only that): the other suites would take days")
    return args


def select(args: argparse.Namespace) -> list[Task]:
    tasks = [task for task in SUITES[args.suite]() if args.only is None or task.selected(args.only.split(","))]
    if args.sections:
        tasks = [t for t in tasks if any(part.lower() in t.section.lower() for part in args.sections.split(","))]
    if args.impl:

        def named(variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
            chosen = []
            for v in variants:
                mine = v.baseline is None and v.impl is None
                names = args.impl.split(",") if mine else []
                chosen += [replace(v, name=f"{v.name} impl={n}", impl=n) for n in names] if mine else [v]
            return tuple(chosen)

        tasks = [t for t in tasks if t.section != "implementations"]
        tasks = [t if t.kind == "decode" else replace(t, variants=named(t.variants)) for t in tasks]
    return tasks


def identity(row: dict) -> str:
    """What makes a row the same measurement in a later run."""
    fields = ("section", "kind", "variant", "form", *Shape.__dataclass_fields__)
    return json.dumps([row.get(name) for name in fields])


def main() -> None:
    args = parse()
    if args.replot:
        draw(json.loads(args.replot.read_text()), args.plot or ROOT / "docs/results/simplicial.png")
        return
    tasks = select(args)
    if args.list:
        show_list(tasks, args.seed)
        return
    # an earlier process of this same run, which a broken device ended, hands over its start and the tasks it began
    started, begun = json.loads(os.environ.pop("SIMPLICIAL_BENCHMARK_CONTINUE", "[null, 0]"))
    started = started or time.time()
    device = torch.device(args.device)
    facts = facts_of(device, args)
    if device.type == "cuda":
        name = facts["device"].removeprefix("NVIDIA").strip().lower().replace(" ", "_")
        args.out = args.out or ROOT / f"benchmarks/results/simplicial_{name}.json"
        args.plot = args.plot or ROOT / "docs/results/simplicial.png"
    results = {"runs": [], "published": PUBLISHED, "rows": []}
    if (args.resume or begun) and args.out is not None and args.out.exists():
        results = json.loads(args.out.read_text())
        results["rows"] = [row for row in results["rows"] if begun or row["status"] == "ok"]
    if not begun:
        results["runs"].append(facts)
        print("  ".join(f"{key}: {facts[key]}" for key in ("device", "torch", "triton", "driver", "git_revision")))
        print(HEADER)
    run = len(results["runs"]) - 1
    done = {identity(row) for row in results["rows"]}
    clock = Clock(device)
    for number, task in enumerate(tasks[begun:], start=begun):
        expected = skipped(task, f"the {args.budget_seconds:.0f} s of --budget-seconds were over")
        if args.resume and all(identity(row) in done for row in expected):
            continue
        if time.time() - started > args.budget_seconds:
            rows = expected
        else:
            try:
                rows = run_task(task, clock, args.seed + number, args.milliseconds)
            except Exception as error:  # the inputs themselves did not fit, say
                rows = [row | {"status": "error", "error": describe(error)} for row in expected]
        again = {identity(row) for row in rows}
        results["rows"] = [row for row in results["rows"] if identity(row) not in again]
        results["rows"] += [row | {"run": run} for row in rows]
        write(results, args.out)
        for row in rows:
            print(line(row), flush=True)
        if args.out is not None and not is_usable(device):
            print("the device is in an error state: going on in a new process", flush=True)
            os.environ["SIMPLICIAL_BENCHMARK_CONTINUE"] = json.dumps([started, number + 1])
            os.execv(sys.executable, [sys.executable, *sys.argv])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    summarise(results)
    if args.plot is not None:
        try:
            draw(results, args.plot)
        except ImportError as error:
            print(f"no plot: {error}; draw it elsewhere with --replot")


def summarise(results: dict) -> None:
    counts = {status: sum(row["status"] == status for row in results["rows"]) for status in ("ok", "error", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    step = [r for r in results["rows"] if r["section"] == "published step" and r["kind"] == "step" and "ms" in r]
    at_2048 = next((r for r in step if r["N"] == 2048), None)
    if at_2048 is not None:
        published = PUBLISHED[0]
        ratio = published["ms"] / at_2048["ms"]
        print(
            f"published complete step ({published['device']}, {published['source']}): {published['ms']} ms; "
            f"here {at_2048['ms']:.2f} ms, {ratio:.2f} times as fast (not the same device)"
        )
    ratios = [r["time_ratio"] for r in results["rows"] if r["form"] == "determinant" and "time_ratio" in r]
    if ratios:
        print(f"determinant / trilinear, time: {statistics.median(ratios):.3f} (median of {len(ratios)} shapes)")


if __name__ == "__main__":
    main()
