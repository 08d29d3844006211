"""The processes of a run that torchrun started, seen from one of them; a single process is the simple case.

All of them compute; the first one writes: the log, the run folder, and what needs the whole model in one place.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sidlm.errors import SidError
from sidlm.parallel.config import launched
from sidlm.train import hardware
from sidlm.train.config import RunConfig
from sidlm.train.recipe import micro_batch_rows, phases

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
PATIENCE = datetime.timedelta(minutes=30)
"""How long a process waits for the others, who may wait for the first one to validate or to export"""

HEAD_START, LAST_WORDS = 1.0, 5.0
"""Seconds that the first process has to speak before others do, and for which it stays before it does (five times that
for a mistake, which all of them find), and a speaker before torchrun, which ends all processes when one ends, is shown
another one's end"""


class Processes:
    """The processes on a mesh, or None for a single one."""

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.patience = PATIENCE
        self.count = 1 if mesh is None else dist.get_world_size()
        self.rank = 0 if mesh is None else dist.get_rank()
        self.first = self.rank == 0
        self.share = (0, 1)
        """(index, count): which part of the rows of a batch this process reads"""
        self.tokens: dist.ProcessGroup | None = None
        """the processes that see other tokens in the same layers"""
        if mesh is not None:
            from sidlm.parallel.mesh import batch_share, tokens_mesh

            self.share, self.tokens = batch_share(mesh), tokens_mesh(mesh).get_group()

    def sum_rows(self, number: int) -> int | Tensor:
        """The sum over the processes that read other rows, at least 1; of several, a tensor () not yet waited for."""
        if self.mesh is None:
            return max(1, number)
        from sidlm.parallel.mesh import sum_over_rows

        return sum_over_rows(torch.tensor(number, device=self.mesh.device_type), self.mesh).clamp_min(1)

    def describe(self, device: torch.device) -> str:
        """In a few words: the device, or how many of them in which mesh."""
        if self.mesh is None:
            return str(device)
        sizes = dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))
        split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return f"{self.count} processes ({split or 'dp_shard 1'}) on {device.type}"

    def facts(self, precision: str) -> dict[str, Any]:
        """For environment.json."""
        return {"precision": precision, "processes": self.count} | (
            {}
            if self.mesh is None
            else {"mesh": dict(zip(self.mesh.mesh_dim_names or (), self.mesh.shape, strict=True))}
        )

    def sum_tokens(self, x: Tensor) -> Tensor:
        """x summed over the processes that see other tokens."""
        if self.mesh is None:
            return x
        from sidlm.parallel.mesh import sum_over_tokens

        return sum_over_tokens(x, self.mesh)

    def largest(self, number: int) -> int:
        """The largest that any process gives, on all of them."""
        return self.largest_of([number])[0]

    def largest_of(self, numbers: list[int]) -> list[int]:
        """Of each number the largest that any process gives, on all of them."""
        if self.mesh is None:
            return numbers
        found = torch.tensor(numbers, device=self.mesh.device_type)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def told(self, value: T) -> T:
        """The first process's value, on all of them."""
        values = [value]
        if self.mesh is not None:
            dist.broadcast_object_list(values)
        return values[0]

    def everyone(self, value: T) -> list[T]:
        """The values of all processes, by rank, on all of them."""
        values = [value] * self.count
        if self.mesh is not None:
            dist.all_gather_object(values, value)
        return values

    def numbers(self, values: list[float]) -> list[list[float]]:
        """As many numbers of each process, by rank, on all of them."""
        if self.mesh is None:
            return [values]
        own = torch.tensor(values, dtype=torch.float64, device=self.mesh.device_type)
        found = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(found, own)
        return torch.stack(found).tolist()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process runs the body, then the others do: they find what it made."""
        if self.mesh is not None and not self.first:
            dist.barrier()
        yield
        if self.mesh is not None and self.first:
            dist.barrier()


def local_device(cfg: RunConfig) -> torch.device:
    """train.device; of several processes on a machine with GPUs each has its own."""
    device = hardware.resolve_device(cfg.train.device)
    if launched() and device.type == "cuda" and device.index is None:
        return hardware.resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
    return device


@contextlib.contextmanager
def started(cfg: RunConfig) -> Iterator[Processes]:
    """The processes of a run while it lasts. Raises SidError for a mesh of another size than there are processes.

    Of an error only the process that meets it first speaks: the others fail of the same or because of it.
    """
    if not launched():
        try:
            cfg.parallel.sizes(1)
        except SidError as error:
            raise SidError(f"{error}; start them with torchrun") from error
        yield Processes()
        return
    from torch.distributed.distributed_c10d import _get_default_store

    from sidlm.parallel.mesh import BACKENDS, build_mesh

    device = local_device(cfg)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the last collectives, for a dump when nothing moves: recording one takes microseconds
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    dist.init_process_group(BACKENDS.get(device.type, "gloo"), timeout=PATIENCE)
    # it warns every process once that what is split twice is gathered in two messages, as it is for an export
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    store, rank = _get_default_store(), dist.get_rank()
    try:
        check_rows(cfg)
        yield Processes(build_mesh(cfg.parallel, device.type))
    except Exception as error:
        patience = HEAD_START * (5 if isinstance(error, SidError) else 1)
        if rank:  # until somebody speaks, which is the first process of what all have found
            _wait_until(lambda: store.check(["sid/failed"]), patience)
        if _spoken(store, error):
            time.sleep(LAST_WORDS)
            raise SystemExit(1) from error
        if isinstance(error, SidError) and not rank:  # the store may end with this process, and others still be joining
            _wait_until(lambda: store.add("sid/failed", 0) == dist.get_world_size(), patience)
        if isinstance(error, SidError) and rank:
            raise SidError(f"process {rank}: {error}") from error
        raise
    # not after an error: NCCL would wait for what the others have not begun
    gc.collect()  # what FSDP made holds on to the group, whose threads must end before the process does
    dist.destroy_process_group()


def _wait_until(ready: Callable[[], bool], seconds: float) -> None:
    """No longer than that."""
    end = time.monotonic() + seconds
    with contextlib.suppress(dist.DistError):  # the first process kept the store and has ended
        while time.monotonic() < end and not ready():
            time.sleep(0.05)


def _spoken(store: dist.Store, error: Exception) -> bool:
    """Whether another process says what went wrong."""
    try:
        return store.add("sid/failed", 1) > 1
    except dist.DistError:  # the first process kept the store and has ended: a mistake is one that it found too
        return isinstance(error, SidError)


def check_rows(cfg: RunConfig) -> None:
    """Raise SidError, naming the numbers, for a batch that cannot be spread over the processes."""
    sizes = cfg.parallel.sizes(dist.get_world_size())
    parts = sizes["dp_replicate"] * sizes["dp_shard"]
    pieces = sizes["tp"] * (2 * sizes["cp"] if sizes["cp"] > 1 else 1)
    for number, phase in enumerate(phases(cfg)):
        rows, length = ("recipe.batch rows", "recipe.batch length") if number else ("train.batch_size", "data.seq_len")
        if phase.batch_size % parts:
            raise SidError(
                f"{rows}={phase.batch_size} does not divide by the {parts} groups of processes that read "
                f"rows (dp_replicate {sizes['dp_replicate']} x dp_shard {sizes['dp_shard']})"
            )
        own, micro = phase.batch_size // parts, micro_batch_rows(cfg, phase.seq_len) or 1
        if sizes["pp"] > 1 and own % micro:
            raise SidError(
                f"train.micro_batch_size={micro} does not divide the {own} rows of a process "
                f"({rows} {phase.batch_size} / {parts}), whose micro-batches in a pipeline must be alike"
            )
        if sizes["tp"] > 1 and phase.seq_len % pieces:
            of = f"tp {sizes['tp']}" if sizes["cp"] == 1 else f"2 x cp {sizes['cp']} x tp {sizes['tp']}"
            raise SidError(f"{length}={phase.seq_len} does not divide by {pieces} ({of})")
