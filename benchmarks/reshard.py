"""What parallel.reshard_after_forward costs and saves: peak memory and gathered bytes of a step, over two processes.

python benchmarks/reshard.py --json benchmarks/results/reshard.json

FSDP over two gloo processes, 1.07 GB of float32 weights, one row of 64 tokens, so that weights are what takes memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from build_memory import CPU, SIZES, peak_of
from torch.utils._python_dispatch import TorchDispatchMode

from sidlm.models import SidForCausalLM, preset
from sidlm.models.initial import distributions
from sidlm.parallel.config import ParallelConfig
from sidlm.parallel.materialize import allocate, draw_weights
from sidlm.parallel.mesh import build_mesh
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.train.hardware import environment

PROCESSES = 2


class Gathered(TorchDispatchMode):
    """Bytes and number of all-gathers."""

    bytes = messages = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_allgather_base_" in str(function):
            self.bytes += args[0].nbytes - args[1].nbytes
            self.messages += 1
        return function(*args, **(kwargs or {}))


def worker(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = build_mesh(ParallelConfig(), "cpu")
    found: dict[str, Any] = {}
    for reshard in (False, True):
        with torch.device("meta"):
            model = SidForCausalLM(preset("nano", arch="llama", **SIZES)).train()
        fresh = distributions(model, model.config)
        parallelize(model, mesh, ShardConfig(precision="fp32", reshard_after_forward=reshard))
        allocate([model], CPU)
        draw_weights(model, fresh, 0)
        ids = torch.arange(65)[None]

        def step(model: Any = model, ids: torch.Tensor = ids) -> float:
            loss = model(input_ids=ids[:, :-1], shift_labels=ids[:, 1:], num_items_in_batch=128).loss
            loss.backward()
            return loss.item()

        with Gathered() as gathered:
            memory, loss = peak_of(step)
        found[str(reshard)] = memory | {"loss": loss, "gathered": gathered.bytes, "messages": gathered.messages}
        del model, step
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        return worker(arguments.worker)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
    with tempfile.TemporaryDirectory() as name:
        settings = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launch, "--worker", name], check=True, env=settings)
        found = json.loads((Path(name) / "found.json").read_text())
    for key, row in found.items():
        print(f"reshard_after_forward {key}: {row}")
    if arguments.json:
        result = {"environment": environment(CPU), "processes": PROCESSES, "rows": found}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
