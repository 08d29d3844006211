"""Writing checkpoints and exports while training goes on: staged to the CPU at once, written by a thread.

A checkpoint is DCP's `async_save`. All processes write their parts into one temporary folder and tell the first one the
checksums of what they wrote; it adds state.json, flushes everything to the disk and only then gives the final name.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sidlm.errors import SidError
from sidlm.train import checkpoint
from sidlm.train.checkpoint import replacing, seal, write_json
from sidlm.train.config import CheckpointConfig
from sidlm.train.processes import Processes

WRITERS = 64
"""Most processes that share the work of an export: each of thousands would read the index of the checkpoint"""
Write = Callable[[Path, Path, tuple[int, int]], None]
"""(checkpoint folder, folder to write, (index, count) of the processes that share the work)"""


class Saver:
    """The checkpoints of a run, one at a time in the background; every process has one and calls it alike.

    A checkpoint that cannot be written (a full disk) is said by `warn` and tried again at the next one: SidError comes
    after more than cfg.max_failed in a row, or from `finish(last=True)`. Whatever fails, the checkpoints that were
    there stay, and no half one gets a final name.
    """

    def __init__(self, folder: Path, cfg: CheckpointConfig, group: Processes, warn: Callable[[str], None]) -> None:
        self.folder, self.cfg, self.group, self.warn = folder, cfg, group, warn
        self.failed = 0
        self.problem: str | None = None  # the first one since something was written
        self.jobs: list[Future[None]] = []
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="saver")
        warnings.filterwarnings("ignore", message=checkpoint.ONE_PROCESS)
        # its messages must not mix with those of training; checkpoints are written from the memory of the CPU
        self.messages: Any = None if group.mesh is None else dist.new_group(backend="gloo", timeout=group.patience)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *error: object) -> None:
        """Let a checkpoint that was begun become whole, also after an error: the folder is another run's then."""
        self.pool.shutdown()

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin checkpoint `step-<state["step"]>`: on return the tensors may change. Waits for the one before.

        tensors: any shapes and dtypes, or DTensors. state: JSON values, with "step". Afterwards the policy is applied
        to all checkpoints up to this step.
        """
        self.finish()
        target = self.folder / f"step-{state['step']:08d}"
        need = sum(t.numel() * t.element_size() for t in tensors.values())
        place = contextlib.ExitStack()
        temporary, problem = None, None
        if self.group.first:
            try:
                temporary = place.enter_context(replacing(target, need))
            except (SidError, OSError) as error:
                problem = str(error)
        temporary, problem = self.group.told((temporary, problem))
        if temporary is None:
            self._count(problem)
            return
        written: Any = dcp.async_save(
            {name: t.detach() for name, t in tensors.items()},
            storage_writer=dcp.FileSystemWriter(temporary / "tensors", single_file_per_rank=True, sync_files=True),
            process_group=self.messages,
        )
        self.jobs.append(self.pool.submit(self._complete, place, written, temporary, state))

    def export(self, step: int, out: Path, need: int, write: Write) -> None:
        """Write the folder `out` from checkpoint `step` once that is whole; it takes its place when all processes have
        written their parts. Nothing happens where there is no such checkpoint: it has failed, and that is told.

        need: bytes.
        """
        if self.problem is None:
            self.jobs.append(self.pool.submit(self._export, self.folder / f"step-{step:08d}", out, need, write))

    def finish(self, *, last: bool = False) -> None:
        """Wait for what was begun. last: raise SidError if the latest could not be written."""
        problem = None
        for job in self.jobs:
            try:
                job.result()
            except (SidError, OSError) as error:
                problem = problem or str(error)
        if self.jobs:
            self._count(self.group.told(problem))
        self.jobs = []
        if last and self.problem is not None:
            raise SidError(self.problem)

    def _count(self, problem: str | None) -> None:
        self.problem = problem and (self.problem or problem)
        self.failed = 0 if problem is None else self.failed + 1
        if self.failed > self.cfg.max_failed:
            raise SidError(f"{problem} ({self.failed} in a row failed, checkpoint.max_failed={self.cfg.max_failed})")
        if problem is not None and self.group.first:
            self.warn(f"{problem}; going on, the next one is tried again")

    def _complete(
        self, place: contextlib.ExitStack, written: Future[Any], temporary: Path, state: dict[str, Any]
    ) -> None:
        """In the thread: wait for DCP, collect checksums, and give the final name."""
        if not self.group.first:
            with contextlib.suppress(CheckpointException):  # of any process; the first one has the whole story
                written.result()
                self._sealed(temporary)
            return
        with place:
            written.result()
            write_json(
                temporary / "state.json", {"format": checkpoint.FORMAT, **state, "files": self._sealed(temporary)}
            )
        prune(self.folder, state["step"], self.cfg)

    def _export(self, source: Path, out: Path, need: int, write: Write) -> None:
        """In the thread. What goes wrong on any process is raised on the first one."""
        with contextlib.ExitStack() as place:
            temporary: Path | None = None
            problem: BaseException | None = None
            if self.group.first and source.is_dir():
                try:
                    temporary = place.enter_context(replacing(out, need))
                except (SidError, OSError) as error:
                    problem = error
            temporary = self._told(temporary)
            writers = min(self.group.count, WRITERS)
            if temporary is not None and self.group.rank < writers:
                try:
                    write(source, temporary, (self.group.rank, writers))
                except (Exception, CheckpointException) as error:  # the others are waiting, whatever it is
                    problem = error
            problems = self._gathered(None if problem is None else str(problem))
            if self.group.first and problem is not None:
                raise problem
            if any(problems):
                raise OSError(next(filter(None, problems)))

    def _told(self, value: Any) -> Any:
        """The first process's value, on all of them."""
        values = [value]
        if self.messages is not None:
            dist.broadcast_object_list(values, group=self.messages)
        return values[0]

    def _gathered(self, value: Any) -> list[Any]:
        """The values of all processes on the first one, [] on others."""
        if self.messages is None:
            return [value]
        everyone: list[Any] = [None] * self.group.count
        dist.gather_object(value, everyone if self.group.first else None, group=self.messages)
        return everyone if self.group.first else []

    def _sealed(self, temporary: Path) -> list[dict[str, Any]]:
        """Sizes and checksums of all files, on the first process; each process reads what it has written."""
        own = f"__{dist.get_rank()}_*" if self.messages is not None else "__*"
        paths = sorted((temporary / "tensors").glob(own))
        if self.group.first:
            paths.append(temporary / "tensors/.metadata")
        return [file for files in self._gathered([seal(path, temporary) for path in paths]) for file in files]


def prune(folder: Path, step: int, cfg: CheckpointConfig) -> None:
    """Delete checkpoints up to `step` that the policy does not keep."""
    found = [(number, path) for number, path in checkpoint.numbered(folder) if number <= step]
    kept = {number for number, _ in found[: cfg.keep]}
    if cfg.keep_every:
        kept |= {number for number, _ in found if number % cfg.keep_every == 0}
    if cfg.keep_best:
        losses = sorted((validation_loss(path), number) for number, path in found)
        kept |= {number for loss, number in losses[: cfg.keep_best] if loss < float("inf")}
    for number, path in found:
        if number not in kept:
            checkpoint.remove(path)


def validation_loss(path: Path) -> float:
    """Nats per token at the last validation before a checkpoint was written; infinity where there is none."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return float(state["valid"]["all"]["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return float("inf")
