"""A process of the study of token efficiency: trains the cells it is sent, one after the other."""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from _token_cells import DECAY, Cell, recipe

WARMUP = 32
RECIPE = {"name": "muon", "embedding_lr_scale": 10.0}
ATTEMPTS = ("a graph", "no graph")
"""Whether a cell's first and second attempt make a step one CUDA graph."""


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker must know; plain values, for another process."""
    return {"data": str(args.data), "work": str(args.work), "device": args.device, "rows": args.rows}


def config_of(cell: Cell) -> Any:
    """Optimizer, schedule and precision of a cell, as `sid train` takes them."""
    from sidlm.train.config import OptimConfig, RunConfig, SparsityConfig
    from sidlm.train.schedule import ScheduleConfig

    made = recipe(cell)
    return RunConfig(
        optim=OptimConfig(lr=made.lr, down_proj_lr_scale=made.down_lr, **RECIPE),
        schedule=ScheduleConfig(warmup_steps=min(WARMUP, cell.lengths[0] // 4), floor=1.0),
        sparsity=SparsityConfig(warmup_steps=100),
    )


def models_of(cell: Cell, device: Any) -> list[Any]:
    """A freshly drawn model for each seed."""
    import torch

    from sidlm.models import SidForCausalLM

    config, models = recipe(cell).config, []
    for seed in cell.seeds:
        torch.manual_seed(seed)
        with torch.device(device):
            models.append(SidForCausalLM(config).float().train())
    return models


def run_cell(cell: Cell, settings: dict[str, Any], tell: Any, *, graph: bool) -> bool:
    """Train one cell; tells ("curve", point) and ("say", words) now and then, ("row", fields) for a seed's length.

    Returns whether the next cell may try to make a graph of a step.
    """
    import torch
    from _token_seeds import SeedRun, TextRows

    from sidlm.train import hardware

    began = time.perf_counter()
    device, folder = hardware.resolve_device(settings["device"]), Path(settings["data"])
    text = torch.from_numpy(np.load(folder / "tokens.npy").astype(np.int16)).to(device)
    rows = TextRows(text, cell.seeds, cell.batch, cell.seq_len)
    run = SeedRun(models_of(cell, device), config_of(cell), rows, graph=graph and device.type == "cuda")
    tell(("say", f"built in {time.perf_counter() - began:.1f} s"))
    started, looking, said = time.perf_counter(), 0.0, (0, time.perf_counter())
    for step, decayed in run.lengths(cell.lengths, DECAY):
        count, losses = len(run.losses), torch.stack(run.losses).mean(0).tolist()  # the one wait for the device
        run.losses.clear()
        now = time.perf_counter()
        tell(("curve", {"step": step, "decayed": decayed, "train": losses, "seconds": now - started - looking}))
        if not all(math.isfinite(loss) for loss in losses):
            raise FloatingPointError(f"the loss is {losses} before step {step}")
        if said[0] == 0 or now - said[1] > 30:
            speed = f"{count} steps at {count / (now - said[1]):.1f} a second"
            tell(("say", f"step {step}, {speed}, {run.how()}, loss {losses[0]:.3f}"))
        said = step, now
        if decayed:
            for row in rows_of(cell, run, step, settings):
                tell(("row", row | {"seconds": now - started - looking}))
            said = step, time.perf_counter()
            looking += said[1] - now
    if device.type == "cuda":
        tell(("say", f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"))
    return run.captured is None or not run.captured.problem


def scored(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """token_data.py's rows of that name; evenly spaced ones if fewer are asked for."""
    rows = dict(np.load(Path(settings["data"]) / f"{name}.npz"))
    step = max(1, len(rows["tokens"]) // settings["rows"])
    return {key: value if key == "groups" else value[::step] for key, value in rows.items()}


def rows_of(cell: Cell, run: Any, steps: int, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """What is known of the cell's models after so many steps, a row for each seed."""
    from sidlm.models.flops import num_parameters, train_flops_per_token

    config, tokens = recipe(cell).config, steps * cell.batch * cell.seq_len
    common = {
        "steps": steps, "tokens": tokens, "params": num_parameters(config),
        "params_non_embedding": num_parameters(config, non_embedding=True),
        "flops": train_flops_per_token(config, cell.seq_len) * tokens, "peak_lr": recipe(cell).lr,
        "command": f'python benchmarks/token_efficiency.py --data DATA --out OUT --only "{cell.name}"',
    }  # fmt: skip
    valid = run.score(scored("valid", settings), batch=16)
    asked = run.score(scored("tasks", settings), batch=32) if cell.tasks and steps in cell.lengths[-2:] else None
    found = []
    for i, seed in enumerate(cell.seeds):
        total = {key: sum(group[key] for group in valid[i].values()) for key in ("nll", "tokens", "bytes")}
        row = common | {"name": cell.row_name(seed, steps), "seed": seed, "loss": total["nll"] / total["tokens"]}
        row |= {"bpb": total["nll"] / math.log(2) / total["bytes"], "valid_tokens": total["tokens"]}
        row["domains"] = {name: {"loss": g["nll"] / g["tokens"]} for name, g in valid[i].items()}
        if asked is not None:
            row["answers"] = {
                name: {"nll": g["nll"] / g["rows"], "nll_per_token": g["nll"] / g["tokens"], "questions": g["rows"]}
                for name, g in asked[i].items()
            }
        found.append(row)
    return found


def serve(connection: Any, gpu: int, settings: dict[str, Any]) -> None:
    """The process: receives (cell, number of the attempt), tells what `run_cell` does, then "done" or "failed"."""
    began = time.perf_counter()
    log = open(f"{settings['work']}/worker-{os.getpid()}.log", "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    import torch

    torch.set_num_threads(1)
    import transformers.generation  # noqa: F401  what a model imports when it is first built

    from sidlm.models import SidForCausalLM  # noqa: F401

    connection.send(("say", f"imported after {time.perf_counter() - began:.1f} s"))
    # the portable kernels start sooner than those for Hopper
    os.environ["SID_IMPL"] = "simplicial=triton" if torch.cuda.is_available() else ""
    graphs = True
    while True:
        cell, attempt = connection.recv()
        try:
            graphs = run_cell(cell, settings, connection.send, graph=graphs and attempt == 0)
        except BaseException:
            traceback.print_exc()
            connection.send(("failed", traceback.format_exc()))
            sys.exit(1)  # what an error left of the device's context would fail every other cell, too
        connection.send(("done", None))
        if torch.cuda.is_available():
            gc.collect()  # a run and its graph hold each other
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
