"""Peak memory of each process while a model that is spread over processes is validated, asked for needles and exported.

python benchmarks/shard_memory.py --json benchmarks/results/shard_memory.json
python benchmarks/shard_memory.py --device cuda --json gpu.json

Four processes, by gloo on a CPU or by NCCL on as many GPUs, whose own memory is measured then; 1.1 GB of float32
weights, of which a block has 67 MB, and embedding, norm and head 66 MB together. A pass gathers those and one block at
a time, of which gloo and FSDP hold up to three copies. "gathered": what loops commonly do, the first process collects
the whole model, from which it would validate and export. The allocator is told to return what is freed: else a process
keeps it, and its size is not that of what is alive.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from build_memory import PROCESSES, SIZES, peak_of
from torch.distributed.tensor import DTensor

from sidlm.evaluate import span_nll
from sidlm.evaluate.needle import Needle, reader_of
from sidlm.evaluate.nll import Span
from sidlm.models import SidForCausalLM, preset
from sidlm.models.initial import distributions
from sidlm.parallel.config import ParallelConfig
from sidlm.parallel.materialize import allocate, draw_weights, local_part
from sidlm.parallel.mesh import build_mesh
from sidlm.parallel.reading import Reader
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.train import checkpoint
from sidlm.train.export import describe_model, export_model
from sidlm.train.hardware import environment

OF_THIS = SIZES | {"num_hidden_layers": 16, "vocab_size": 8000}
MESHES: dict[str, dict[str, int]] = {
    "fsdp4": {},
    "hsdp 2x2": {"dp_replicate": 2},
    "tp2 x fsdp2": {"tp": 2},
    "pp2 x fsdp2": {"pp": 2},
}
TOKENS = 64
"""Of a row: weights are what takes memory"""


def peak(work: Any, device: torch.device) -> tuple[dict[str, Any], Any]:
    """Bytes above the start at the peak, of the GPU or of the process; and what the work gave."""
    if device.type == "cpu":
        return peak_of(work)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    given = work()
    return {"peak": torch.cuda.max_memory_allocated() - before, "after": torch.cuda.memory_allocated() - before}, given


def built(sizes: dict[str, Any], changes: dict[str, int], device: torch.device) -> tuple[Any, Any, Any]:
    """Model, mesh, pipeline."""
    mesh = build_mesh(ParallelConfig(**sizes), device.type)
    with torch.device("meta"):
        model = SidForCausalLM(preset("nano", arch="llama", **OF_THIS | changes)).train()
    fresh = distributions(model, model.config)
    pipeline = parallelize(model, mesh, ShardConfig(precision="fp32"))
    allocate([model] if pipeline is None else pipeline.stages, device)
    draw_weights(model, fresh, 0)
    return model, mesh, pipeline


def gathered(model: Any) -> list[torch.Tensor]:
    """Every weight on the first process, one after the other."""
    kept = []
    for parameter in model.parameters():
        whole = parameter.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if dist.get_rank() == 0:
            kept.append(whole)
    return kept


def looks(model: Any, mesh: Any, pipeline: Any) -> dict[str, Any]:
    """What a validation and a gate call, on rows that are short."""
    reader = Reader(model.eval(), mesh, pipeline)
    spans = [Span([(7 * i + j) % 100 for j in range(TOKENS + 1)], 1) for i in range(5)]
    ids = torch.arange(TOKENS + 1)
    return {
        "validation": lambda: span_nll(reader, spans, batch_size=1),
        "needles": lambda: reader_of(reader)([Needle(ids, TOKENS - 5, 0.0)] * 3),
    }


def worker(name: str, folder: Path, device: torch.device) -> None:
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    warnings.filterwarnings("ignore", message=checkpoint.ONE_PROCESS)
    # what is imported and made only once
    small = built(MESHES[name], {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 101}, device)
    for look in looks(*small).values():
        look()
    model, mesh, pipeline = built(MESHES[name], {}, device)
    found: dict[str, Any] = {"held": sum(local_part(p)[0].numel() * 4 for p in model.parameters())}
    for what, look in looks(model, mesh, pipeline).items():
        dist.barrier()
        found[what], said = peak(look, device)
        found[what]["said"] = [float(number) for number in said]
    source = folder / name / "step-00000001"
    dcp.save({f"model.{key}": x for key, x in model.state_dict().items()}, checkpoint_id=source / "tensors")
    if dist.get_rank() == 0:
        checkpoint.write_json(source / "state.json", {"step": 1, "model": describe_model(model.config)})
        (folder / name / "model").mkdir()
    dist.barrier()
    tokenizer: Any = SimpleNamespace(save=lambda folder: None)
    write = partial(export_model, generation=model.generation_config, tokenizer=tokenizer)
    found["export"], _ = peak(lambda: write(source, folder / name / "model", (dist.get_rank(), PROCESSES)), device)
    dist.barrier()
    if name == "fsdp4":
        found["gathered"], _ = peak(lambda: gathered(model), device)
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        return worker(arguments.worker[0], Path(arguments.worker[1]), torch.device(arguments.device))
    model = preset("nano", arch="llama", **OF_THIS)
    with torch.device("meta"):
        sizes = [p.numel() * 4 for p in SidForCausalLM(model).parameters()]
    results: dict[str, Any] = {
        "environment": environment(torch.device(arguments.device)),
        "command": f"python benchmarks/shard_memory.py --device {arguments.device}",
        "processes": PROCESSES,
        "weights": sum(sizes),
        "largest_parameter": max(sizes),
        "meshes": {},
    }
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
    for name in MESHES:
        with tempfile.TemporaryDirectory() as folder:
            settings = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
            command = [sys.executable, *launch, "--device", arguments.device, "--worker", name, folder]
            subprocess.run(command, check=True, env=settings)
            rows = json.loads((Path(folder) / f"{name}.json").read_text())
        results["meshes"][name] = rows
        print(f"{name}: {max(row['held'] for row in rows) / 1e6:,.0f} MB of weights held", flush=True)
        for what in ("validation", "needles", "export", "gathered"):
            if what in rows[0]:
                most = max(row[what]["peak"] for row in rows)
                share = most / sum(sizes)
                print(f"{name}, {what}: at most {most / 1e6:,.0f} MB, {share:.2f} of the weights", flush=True)
    for what in ("validation", "needles"):
        said = [row[what]["said"] for rows in results["meshes"].values() for row in rows]
        apart = max(abs(a - b) / max(abs(b), 1) for one in said for a, b in zip(one, said[0], strict=True))
        results[f"{what} apart"] = apart
        print(f"{what}: processes and meshes differ by {apart:.1e} at most")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
