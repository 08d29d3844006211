"""Peak memory of each process while a model is built, filled and spread over processes, before the first step.

python benchmarks/build_memory.py --json benchmarks/results/build_memory.json

Four gloo processes, FSDP, a model of about 1 GB of float32 weights; and one process of the 16,384 of the 405B. "whole":
what loops commonly do, every process builds the model and then keeps its part.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from sidlm.models import SidForCausalLM, preset
from sidlm.models.initial import distributions
from sidlm.parallel.config import ParallelConfig, PipelineConfig
from sidlm.parallel.dry_run import fake_processes
from sidlm.parallel.materialize import allocate, draw_weights, local_part
from sidlm.parallel.mesh import build_mesh
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.train import checkpoint
from sidlm.train.build import build_model
from sidlm.train.config import load_config
from sidlm.train.hardware import environment

PROCESSES = 4
SIZES = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 64, "vocab_size": 32000,
}  # fmt: skip
WAYS = ("whole", "drawn", "init_from", "resumed")
CPU = torch.device("cpu")


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_of(work: Any) -> tuple[dict[str, Any], Any]:
    """Bytes above the start at the peak and at the end, seconds; and what the work gave."""
    before, started = resident("VmRSS"), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    given = work()
    seconds = time.perf_counter() - started
    return {
        "peak": resident("VmHWM") - before,
        "after": resident("VmRSS") - before,
        "seconds": round(seconds, 2),
    }, given


def build(way: str, folder: Path, mesh: Any) -> SidForCausalLM:
    if way == "whole":
        torch.manual_seed(0)
        model = SidForCausalLM(preset("nano", arch="llama", **SIZES))
        parallelize(model, mesh, ShardConfig(precision="fp32"))
        return model
    sizes = [f"{name}={value}" for name, value in SIZES.items()]
    start = ["--model.init_from", str(folder / "model")] if way == "init_from" else ["--model.set", *sizes]
    cfg = load_config(None, ["--data.train", "-", "--model.arch", "llama", *start])
    tokenizer: Any = SimpleNamespace(bos_id=0, eos_id=1, pad_id=2, vocab_size=SIZES["vocab_size"])
    model, _ = build_model(cfg, tokenizer, mesh, CPU, "fp32", resumed=way == "resumed")
    if way == "resumed":
        found = checkpoint.Checkpoint(folder / "step-00000001", {})
        checkpoint.load(found, {f"model.{name}": x for name, x in model.state_dict().items()})
    return model


def worker(way: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = build_mesh(ParallelConfig(), "cpu")
    small = SidForCausalLM(preset("nano", arch="llama", num_hidden_layers=1))  # what is imported and made only once
    parallelize(small, mesh, ShardConfig(precision="fp32"))
    dist.barrier()
    found, model = peak_of(lambda: build(way, folder, mesh))
    found |= {"held": sum(local_part(p)[0].numel() * 4 for p in model.parameters()), "squares": float(
        model.model.layers[3].mlp.down_proj.weight.detach().to_local().double().square().sum()
    )}  # fmt: skip
    if way == "drawn":
        dcp.save(
            {f"model.{k}": x for k, x in model.state_dict().items()}, checkpoint_id=folder / "step-00000001/tensors"
        )
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / f"{way}.json").write_text(json.dumps(everyone))
    dist.destroy_process_group()


def one_of_the_405b(gpus: int, rank: int) -> dict[str, Any]:
    """configs/405b.yaml's mesh in a process group of which only this process is there."""
    cfg = load_config("configs/405b.yaml", ["--data.train", "-"])
    with fake_processes(gpus, rank):
        with torch.device("meta"):
            small = SidForCausalLM(preset("405b", arch="llama", num_hidden_layers=16))
        mesh = build_mesh(cfg.parallel, "cpu")
        parallelize(small, mesh, ShardConfig(pipeline=PipelineConfig()))

        def start() -> tuple[SidForCausalLM, list[Any]]:
            with torch.device("meta"):
                model = SidForCausalLM(preset("405b", arch="llama"))
            fresh = distributions(model, model.config)
            pipeline = parallelize(model, mesh, ShardConfig(pipeline=cfg.parallel.pipeline))
            assert pipeline is not None
            allocate(pipeline.stages, CPU)
            draw_weights(model, fresh, 0)
            return model, pipeline.stages

        found, (model, _) = peak_of(start)
        held = sum(local_part(p)[0].numel() * 4 for p in model.parameters())
        largest = max(p.numel() * 4 for p in model.parameters())
    return {"gpus": gpus, "rank": rank, "held": held, "largest_parameter": largest} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        return worker(arguments.worker[0], Path(arguments.worker[1]))
    if arguments.one:
        print(json.dumps(one_of_the_405b(*arguments.one)))
        return None
    results: dict[str, Any] = {"environment": environment(CPU), "processes": PROCESSES}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(PROCESSES),
        __file__,
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        model = SidForCausalLM(preset("nano", arch="llama", **SIZES))
        model.save_pretrained(folder / "model")
        results["weights"] = sum(p.numel() * 4 for p in model.parameters())
        results["largest_parameter"] = max(p.numel() * 4 for p in model.parameters())
        del model
        for way in WAYS:
            subprocess.run([*launch, "--worker", way, name], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            results[way] = json.loads((folder / f"{way}.json").read_text())
            peak = max(row["peak"] for row in results[way])
            print(f"{way}: at most {peak / 1e6:,.0f} MB, {peak / results['weights']:.2f} of the weights", flush=True)
    results["405b"] = []
    for rank in (0, 5000, 16383):
        done = subprocess.run(
            [sys.executable, __file__, "--one", "16384", str(rank)], check=True, stdout=subprocess.PIPE
        )
        results["405b"].append(json.loads(done.stdout.splitlines()[-1]))
        print(results["405b"][-1], flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
