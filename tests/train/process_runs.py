"""Processes that each run the same command lines, as torchrun would start them: FOLDER [COUNT], commands on stdin.

Commands are [[name, argv], ...] in JSON. FOLDER gets NAME.RANK.out and .err, and statuses.json: {name: [of each rank]}.
"""

import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from sidlm.cli.main import main
from sidlm.train import hardware, processes

RANKS = int(sys.argv[2]) if len(sys.argv) > 2 else 4
LATE = "ep"
"""The run of which one process is slow to join"""
# what the runs import only when they need it: before the fork, so that it is done once
BEFORE = ("models", "data", "evaluate", "train.loop", "parallel.shard")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def one(rank: int, port: int, argv: list[str], prefix: Path) -> None:
    for descriptor, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{prefix}.{rank}.{end}", os.O_CREAT | os.O_WRONLY), descriptor)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in told.items()}
    torch.set_num_threads(1)
    hardware.peak_flops = lambda device, precision: hardware.Peak(1e11, "for the tests")
    processes.HEAD_START, processes.LAST_WORDS = 0.3, 0.6
    if prefix.name == LATE and rank == 3:  # reads from the store when the others have found the mistake
        join = distributed_c10d._new_process_group_helper

        def joined(*args: Any, **kwargs: Any) -> Any:
            found = join(*args, **kwargs)
            time.sleep(1.0)
            args[4].add("late", 1)
            return found

        distributed_c10d._new_process_group_helper = joined
    sys.exit(main(argv))


def run(name: str, argv: list[str], folder: Path) -> list[int | None]:
    """Exit statuses; a process that hangs is killed."""
    fork, port = multiprocessing.get_context("fork"), free_port()
    started = [fork.Process(target=one, args=(rank, port, argv, folder / name)) for rank in range(RANKS)]
    for process in started:
        process.start()
    for process in started:
        process.join(90)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


if __name__ == "__main__":
    for module in BEFORE:
        importlib.import_module(f"sidlm.{module}")
    place = Path(sys.argv[1])
    statuses = {name: run(name, argv, place) for name, argv in json.load(sys.stdin)}
    (place / "statuses.json").write_text(json.dumps(statuses))
