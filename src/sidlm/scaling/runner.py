"""Runs the cells of a grid, each in a process of its own, beside other runners of the same folder.

A cell is done when it has result.json. Who works on it holds the lock on its file `claim`, which the operating system
takes back however the process ends; so a killed runner leaves nothing to clean up, and a cell that was cut short goes
on from its newest checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sidlm.scaling.cell import prepare, result_of
from sidlm.scaling.files import claim, read_json, write_whole
from sidlm.scaling.grid import Cell

POLL = 0.2
RETRY = 2.0  # seconds between looks at the cells of other runners


@dataclass(kw_only=True)
class Running:
    """A cell's process, the lock that says so, its slot among the workers, and where its words begin in its log."""

    cell: Cell
    process: subprocess.Popen[bytes]
    lock: IO[str]
    slot: int
    log_start: int
    started: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Names of the cells that are finished, failed (with the reason), and left over when the runner was stopped."""

    finished: list[str]
    failed: dict[str, str]
    unfinished: list[str]
    signal: int


class Runner:
    """Runs what is not done yet, `workers` cells at a time.

    command: what runs one cell when its folder and the id of this process follow. facts: go into every result.
    """

    def __init__(
        self, cells: Sequence[Cell], out: Path, *, command: Sequence[str], workers: int, facts: dict[str, Any],
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.cells, self.out, self.command, self.workers, self.log = cells, out, command, workers, log
        self.facts = facts | {"workers": workers}
        self.waiting: list[Cell] = []
        self.running: list[Running] = []
        self.failed: dict[str, str] = {}
        self.began = time.time()
        self.next_look = 0.0

    def run(self) -> Outcome:
        """Run all cells. A failed one does not stop the others; those of other runners are waited for, and taken over
        if the other one dies. Ctrl-C and SIGTERM let running cells save a checkpoint and stop.

        Raises SidError if a cell's folder holds work with other settings.
        """
        for cell in self.cells:
            prepare(cell, self.out / cell.name, self.facts)
        self.waiting = [cell for cell in self.cells if not self._done(cell)]
        if len(self.waiting) < len(self.cells):
            self.log(f"{len(self.cells) - len(self.waiting)} of {len(self.cells)} cells were done before")
        with _stop_signals() as stop:
            while self.waiting or self.running:
                for ended in [r for r in self.running if r.process.poll() is not None]:
                    self._reap(ended, stopping=bool(stop))
                if stop:
                    self.waiting = []
                    self._interrupt()
                self._start_what_is_free()
                time.sleep(POLL)
        finished = [cell.name for cell in self.cells if self._done(cell)]
        left = [cell.name for cell in self.cells if cell.name not in finished and cell.name not in self.failed]
        return Outcome(finished=finished, failed=self.failed, unfinished=left, signal=stop[0] if stop else 0)

    def _done(self, cell: Cell) -> bool:
        return result_of(self.out / cell.name) is not None

    def _start_what_is_free(self) -> None:
        if time.monotonic() < self.next_look:
            return
        for cell in list(self.waiting):
            if len(self.running) == self.workers:
                return
            lock = claim(self.out / cell.name / "claim")
            if lock is None:
                continue
            failure = read_json(self.out / cell.name / "failed.json")
            if self._done(cell):  # by another runner
                lock.close()
            elif failure is not None and failure["time"] > self.began:
                lock.close()
                self.failed[cell.name] = failure["reason"]
            else:
                self.running.append(self._start(cell, lock))
            self.waiting.remove(cell)
        self.next_look = time.monotonic() + RETRY

    def _start(self, cell: Cell, lock: IO[str]) -> Running:
        folder = self.out / cell.name
        (folder / "failed.json").unlink(missing_ok=True)
        slot = min(set(range(self.workers)) - {r.slot for r in self.running})
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(
                [*self.command, str(folder), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | _environment(slot, self.workers),
                pass_fds=[lock.fileno()],  # the claim lasts as long as the process does, whatever becomes of this one
                start_new_session=True,  # Ctrl-C is passed on once, by `_interrupt`
            )
            return Running(cell=cell, process=process, lock=lock, slot=slot, log_start=log.tell(), started=time.time())

    def _reap(self, ended: Running, *, stopping: bool) -> None:
        """Note how a cell's process ended."""
        self.running.remove(ended)
        self.next_look = 0.0
        cell, folder, status = ended.cell, self.out / ended.cell.name, ended.process.returncode
        if self._done(cell):
            result = read_json(folder / "result.json") or {}
            count = sum(map(self._done, self.cells))
            seconds = time.time() - ended.started
            self.log(f"[{count}/{len(self.cells)}] {cell.name}: loss {result['loss']:.4f}, {seconds:.0f} s")
        elif not stopping:
            reason = _reason(folder / "log.txt", ended.log_start, status)
            write_whole(folder / "failed.json", json.dumps({"reason": reason, "time": time.time()}) + "\n")
            self.failed[cell.name] = reason
            self.log(f"{cell.name} FAILED: {reason}")
        ended.lock.close()

    def _interrupt(self) -> None:
        """Ask every running cell, once, to save and stop."""
        for running in self.running:
            if running.slot >= 0:
                running.process.terminate()
                running.slot = -1


def _environment(slot: int, workers: int) -> dict[str, str]:
    """A share of the cores, and one of the visible GPUs in turn."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    return threads | ({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else {})


def _reason(log: Path, start: int, status: int) -> str:
    """One line on why a cell's process ended: its last words, and the signal that killed it."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("sid: error: ")), lines[-1] if lines else "")
    number = -status if status < 0 else status - 128 if status > 128 else 0
    if number:
        with contextlib.suppress(ValueError):
            killed = f"killed by {signal.Signals(number).name}"
            return f"{killed}; last words: {said[:500]}" if said else killed
    return said.removeprefix("sid: error: ")[:500] or f"ended with status {status} and no word"


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that the number of the first SIGINT or SIGTERM is put into; the second one acts as usual."""
    caught: list[int] = []

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        restore()

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in former.items():
            signal.signal(number, handler)

    try:
        yield caught
    finally:
        restore()


def collect(out: Path) -> list[dict[str, Any]]:
    """What is known of every cell in a grid's folder, by name: its result, or {"variant", ..., "loss": None, "error"}
    of one that failed or is not finished."""
    rows = []
    for file in sorted(out.glob("*/*/*/cell.json")):
        result = result_of(file.parent)
        if result is None:
            failure = read_json(file.parent / "failed.json")
            error = failure["reason"] if failure else "not finished"
            result = (read_json(file) or {}) | {"loss": None, "error": error}
        rows.append(result)
    return rows


def write_cells(out: Path) -> Path:
    """Write OUT/cells.jsonl, a line for each cell of the folder."""
    path = out / "cells.jsonl"
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in collect(out)))
    return path
