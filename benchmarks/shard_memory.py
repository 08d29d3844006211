"""Peak memory of each process while a model that is spread over processes is validated, asked for needles and exported.

python benchmarks/shard_memory.py --json benchmarks/results/shard_memory.json

Four gloo processes, the model of build_memory.py (about 1 GB of float32 weights) on several meshes. "gathered": what
loops commonly do, the first process collects the whole model, from which it would validate and export.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from build_memory import CPU, PROCESSES, SIZES, peak_of
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
from sidlm.train.checkpoint import write_json
from sidlm.train.export import describe_model, export_model
from sidlm.train.hardware import environment

MESHES = {"fsdp4": {}, "hsdp 2x2": {"dp_replicate": 2}, "tp2 x fsdp2": {"tp": 2}, "pp2 x fsdp2": {"pp": 2}}
TOKENS = 64
"""Of a row: weights are what takes memory"""


def built(sizes: dict[str, int], changes: dict[str, int]) -> tuple[Any, Any, Any]:
    """Model, mesh, pipeline."""
    mesh = build_mesh(ParallelConfig(**sizes), "cpu")
    with torch.device("meta"):
        model = SidForCausalLM(preset("nano", arch="llama", **SIZES | changes)).train()
    fresh = distributions(model, model.config)
    pipeline = parallelize(model, mesh, ShardConfig(precision="fp32"))
    allocate([model] if pipeline is None else pipeline.stages, CPU)
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


def worker(name: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    # what is imported and made only once
    small = built(MESHES[name], {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 101})
    for look in looks(*small).values():
        look()
    model, mesh, pipeline = built(MESHES[name], {})
    found: dict[str, Any] = {"held": sum(local_part(p)[0].numel() * 4 for p in model.parameters())}
    for what, look in looks(model, mesh, pipeline).items():
        dist.barrier()
        found[what], _ = peak_of(look)
    source = folder / name / "step-00000001"
    dcp.save({f"model.{key}": x for key, x in model.state_dict().items()}, checkpoint_id=source / "tensors")
    if dist.get_rank() == 0:
        write_json(source / "state.json", {"step": 1, "model": describe_model(model.config)})
        (folder / name / "model").mkdir()
    dist.barrier()
    tokenizer: Any = SimpleNamespace(save=lambda folder: None)
    write = partial(export_model, generation=model.generation_config, tokenizer=tokenizer)
    found["export"], _ = peak_of(lambda: write(source, folder / name / "model", (dist.get_rank(), PROCESSES)))
    dist.barrier()
    if name == "fsdp4":
        found["gathered"], _ = peak_of(lambda: gathered(model))
    everyone: list[Any] = [None] * PROCESSES
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        (folder / f"{name}.json").write_text(json.dumps(everyone))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        return worker(arguments.worker[0], Path(arguments.worker[1]))
    model = preset("nano", arch="llama", **SIZES)
    with torch.device("meta"):
        sizes = [p.numel() * 4 for p in SidForCausalLM(model).parameters()]
    results: dict[str, Any] = {
        "environment": environment(CPU), "processes": PROCESSES, "weights": sum(sizes), "largest_parameter": max(sizes),
        "command": "python benchmarks/shard_memory.py", "meshes": {},
    }  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
    for name in MESHES:
        with tempfile.TemporaryDirectory() as folder:
            settings = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *launch, "--worker", name, folder], check=True, env=settings)
            rows = json.loads((Path(folder) / f"{name}.json").read_text())
        results["meshes"][name] = rows
        for what in ("validation", "needles", "export", "gathered"):
            if what in rows[0]:
                peak = max(row[what]["peak"] for row in rows)
                print(
                    f"{name}, {what}: at most {peak / 1e6:,.0f} MB, {peak / sum(sizes):.2f} of the weights", flush=True
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
