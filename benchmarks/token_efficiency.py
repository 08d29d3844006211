"""The study of token efficiency: many small training runs at once on one or more GPUs, or on a CPU.

    python benchmarks/token_efficiency.py --data FOLDER --out FOLDER [--seconds 520] [--done cells.jsonl ...]
        [--workers 8] [--million 1048576] [--groups core noise ...] [--only NAME] [--list] [--toy]

--data is what `python benchmarks/token_data.py` makes. Every cell (`_token_cells.py`) trains all of its seeds as one
batched model in one of --workers processes for each GPU. OUT/cells.jsonl gets a row as soon as a seed has reached a
length: variant, params, tokens, seed, loss, flops, seconds, losses by domain, the command that trains it again; and a
line for every cell with its curve and how it ended. After --seconds nothing goes on, and cells that were cut off are in
the file as such. --done names results of earlier calls, whose finished cells are not run again. --list prints the plan;
--only NAME runs the cells of that name, to be compared with a stored curve.

On one H200 beside nothing else, the folder of data made by token_data.py:

    export OMP_NUM_THREADS=1 PYTHONPATH=src
    python benchmarks/token_efficiency.py --data FOLDER --out OUT --seconds 550 --workers 4
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import _token_cells as cells
from _token_cells import Cell
from _token_worker import ATTEMPTS, serve, settings_of

OVERHEAD = 4.0
"""Seconds of a cell that do not depend on its length: building, first kernels, scoring."""
SILENCE = 90.0
"""Seconds after which a process that says nothing is taken for stuck."""


class Results:
    """cells.jsonl, a line for each row and for each cell that ended, whatever its end; and the log."""

    def __init__(self, out: Path, done: list[Path]):
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "cells.jsonl").open("a", encoding="utf-8")
        self.log = (out / "log.txt").open("a", encoding="utf-8")
        self.started = time.monotonic()
        lines = [
            line for path in (*done, out / "cells.jsonl") for line in path.read_text(encoding="utf-8").splitlines()
        ]
        self.rows = [row for row in map(json.loads, lines) if row["status"] == "done" and "loss" in row]
        self.finished = {row["name"] for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def say(self, line: str) -> None:
        line = f"{time.monotonic() - self.started:6.1f} {line}"
        print(line, flush=True)
        self.log.write(line + "\n")
        self.log.flush()


@dataclasses.dataclass
class Worker:
    """One process and what it is at."""

    process: Any
    connection: Connection
    gpu: int
    cell: Cell | None = None
    attempt: int = 0
    since: float = 0.0
    heard: float = 0.0
    curve: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class Pool:
    """Hands cells to the workers in order until the time is up."""

    def __init__(self, args: argparse.Namespace, queue: list[Cell], results: Results, gpus: int, workers: int):
        self.args, self.queue, self.results = args, queue, results
        self.context = multiprocessing.get_context("spawn")
        self.factors: dict[str, list[float]] = defaultdict(list)
        self.retries: list[tuple[Cell, int]] = []
        self.workers = [self.start(i % max(1, gpus)) for i in range(workers * max(1, gpus))]
        self.end = 0.0
        self.found: str | None = None

    def start(self, gpu: int) -> Worker:
        ours, theirs = self.context.Pipe()
        settings = settings_of(self.args)
        process = self.context.Process(target=serve, args=(theirs, gpu, settings), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours, gpu)

    def estimate(self, cell: Cell) -> float:
        """Seconds that a cell takes among the others, but for its last length: cut off there, it was worth it.

        Learned from those of its size that ended, else from all.
        """
        known = self.factors[cell.size] or [f for found in self.factors.values() for f in found]
        factor = statistics.median(known) if known else self.args.workers
        shorter = dataclasses.replace(cell, lengths=cell.lengths[: max(1, len(cell.lengths) - 1)])
        return OVERHEAD + factor * cells.cost(shorter)

    def next(self) -> tuple[Cell, int] | None:
        """The next cell that fits in the time left, and which attempt it is."""
        left = self.end - time.monotonic()
        for cell, attempt in [*self.retries, *((cell, 0) for cell in self.queue)]:
            chosen = self.resolved(cell)
            if chosen is not None and self.estimate(chosen) < left:
                if attempt:
                    self.retries.remove((cell, attempt))
                else:
                    self.queue.remove(cell)
                return chosen, attempt
        return None

    def resolved(self, cell: Cell) -> Cell | None:
        """The cell, with the variant that the search has found; None as long as it is at work."""
        if cell.variant != cells.BEST:
            return cell
        others = [*self.queue, *(w.cell for w in self.workers if w.cell)]
        searched = [c for c in others if c.group == "search" and c.variant in cells.SEARCH]
        if self.found is None and not searched:
            self.found = cells.best(self.results.rows, "toy" if cell.size == "toy" else "s", cell.batch)
            if self.found:
                self.results.say(f"the search has found {self.found}")
        return dataclasses.replace(cell, variant=self.found) if self.found else None

    def assign(self, worker: Worker) -> bool:
        found = self.next()
        if found is None:
            return False
        worker.cell, worker.attempt = found
        worker.since, worker.heard, worker.curve = time.monotonic(), time.monotonic(), []
        worker.connection.send(found)
        return True

    def run(self, end: float) -> None:
        """Until nothing is left to do, or no time is left to do it in before `end`."""
        self.end = end
        for worker in self.workers:
            self.assign(worker)
        while any(w.cell for w in self.workers) and time.monotonic() < self.end:
            busy = {w.connection: w for w in self.workers if w.cell}
            for connection in wait(list(busy), timeout=max(0.0, min(5.0, self.end - time.monotonic()))):
                self.listen(busy[connection])  # type: ignore[index]
            for worker in [w for w in self.workers if not w.cell]:
                self.assign(worker)  # the search may have ended
            for worker in [w for w in busy.values() if w.cell and time.monotonic() - w.heard > SILENCE]:
                self.failed(worker, f"nothing heard for {SILENCE:.0f} s")
        for worker in self.workers:
            if worker.cell is not None:
                self.end_cell(worker, {"status": "cut off by the time"})
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
        self.results.say(f"{len(self.queue) + len(self.retries)} cells were not started")

    def listen(self, worker: Worker) -> None:
        assert worker.cell is not None
        worker.heard = time.monotonic()
        value: Any
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            kind, value = "failed", f"the process ended with {worker.process.exitcode}"
        if kind == "curve":
            worker.curve.append(value)
        elif kind == "row":
            self.add_row(worker, value)
        elif kind == "say":
            self.results.say(f"{worker.cell.name}: {value}")
        elif kind == "done":
            wall = time.monotonic() - worker.since
            self.factors[worker.cell.size].append(max(0.0, wall - OVERHEAD) / cells.cost(worker.cell))
            self.end_cell(worker, {"status": "done"})
        else:
            self.failed(worker, value)
        if worker.cell is None and worker in self.workers:
            self.assign(worker)

    def failed(self, worker: Worker, why: str) -> None:
        """A new process in place of the worker's; its cell is tried again, or has failed."""
        assert worker.cell is not None
        if worker.attempt + 1 < len(ATTEMPTS):
            self.results.say(f"again with {ATTEMPTS[worker.attempt + 1]}: {worker.cell.name}: {why[-1500:]}")
            self.retries.append((worker.cell, worker.attempt + 1))
        else:
            self.end_cell(worker, {"status": "failed", "error": why[-1500:]})
        worker.process.kill()
        self.workers.remove(worker)
        self.workers.append(self.start(worker.gpu))
        self.assign(self.workers[-1])

    def add_row(self, worker: Worker, row: dict[str, Any]) -> None:
        cell = worker.cell
        assert cell is not None
        self.results.add(self.facts(worker) | row | {"status": "done"})
        self.results.say(f"{row['seconds']:6.1f} s {row['name']}: {row['loss']:.4f}")

    def end_cell(self, worker: Worker, row: dict[str, Any]) -> None:
        assert worker.cell is not None
        wall = time.monotonic() - worker.since
        name = f"cell {worker.cell.name}"
        self.results.add(self.facts(worker) | {"name": name, "wall": wall, "curve": worker.curve} | row)
        self.results.say(f"{wall:6.1f} s {row['status']}: {name}, {worker.curve[-1:]}")
        worker.cell = None

    def facts(self, worker: Worker) -> dict[str, Any]:
        assert worker.cell is not None
        return dataclasses.asdict(worker.cell) | {"attempt": ATTEMPTS[worker.attempt], "gpu": worker.gpu}


def plan_of(args: argparse.Namespace) -> list[Cell]:
    chosen = cells.toy() if args.toy else cells.plan(million=args.million)
    if args.only:  # by what it found
        found = [dataclasses.replace(c, variant=v) for c in chosen if c.variant == cells.BEST for v in cells.SEARCH]
        chosen += [c for c in found if c not in chosen]
    chosen = [cell for cell in chosen if not args.groups or cell.group in args.groups]
    return [
        cell
        for cell in chosen
        if (not args.sizes or cell.size in args.sizes) and (not args.only or cell.name in args.only)
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, help="folder for the runs, which are deleted as they end")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--workers", type=int, default=8, help="processes for each GPU")
    parser.add_argument("--million", type=int, default=cells.MILLION, help="tokens that count as a million")
    parser.add_argument("--groups", nargs="+", default=[])
    parser.add_argument("--sizes", nargs="+", default=[])
    parser.add_argument("--only", nargs="+", default=[], help="names of cells, as --list shows them")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="cells.jsonl of earlier calls")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=10_000, help="held-out rows and questions that are scored, at most")
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if not args.list and not (args.data and args.out):
        parser.error("--data and --out are needed")
    return args


def main() -> None:
    args = arguments()
    queue = plan_of(args)
    if args.list:
        for cell in queue:
            print(f"{cells.cost(cell):6.1f} s  {cell.group:12}{cell.name}")
        print(f"{len(queue)} cells, {sum(map(cells.cost, queue)):.0f} s of one H200 by a rough guess")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "cells.jsonl").touch()
    results = Results(args.out, [path for path in args.done if path.is_file()])
    queue = [cell for cell in queue if not results.finished.issuperset(cell.row_names)]
    with tempfile.TemporaryDirectory(dir=args.work, prefix="sid-study-") as work:
        args.work = Path(work)
        import torch

        from sidlm.train import hardware

        gpus = torch.cuda.device_count() if args.device != "cpu" else 0
        results.say(f"{len(queue)} cells, {len(results.finished)} rows before, {gpus} GPUs")
        facts = hardware.environment(hardware.resolve_device(args.device))
        facts |= {
            "gpus": gpus,
            "workers_per_gpu": args.workers,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        facts["command"] = " ".join(["python", "benchmarks/token_efficiency.py", *sys.argv[1:]])
        (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
        pool = Pool(args, queue, results, gpus, args.workers)
        pool.run(results.started + args.seconds)
        for log in sorted(Path(work).glob("*.log")):
            shutil.copyfileobj(log.open(encoding="utf-8", errors="replace"), results.log)
    os._exit(0)


if __name__ == "__main__":
    main()
