"""Runs one function in several gloo processes, forked from one that has imported everything: RANKS share its start."""

import datetime
import gc
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed


def run(function: Callable[[int, Path], None], ranks: int, folder: Path, seconds: float = 150.0) -> int:
    """Call function(rank, folder) in `ranks` processes; exit status 0, or 1 if any fails or the time is over."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_one, args=(function, rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    # the first to fail ends all: the others would wait for it
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes) and time.monotonic() < end:
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.is_alive():
            process.kill()
            print(f"rank {rank} of {ranks} was still running after {seconds:.0f} s or a failure", file=sys.stderr)
        process.join()
    return int(any(process.exitcode for process in processes))


def _one(function: Callable[[int, Path], None], rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks, timeout=wait)
    try:
        function(rank, folder)
        gc.collect()  # what FSDP made holds on to the group, whose threads must end before the process does
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)
