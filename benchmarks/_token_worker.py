"""A process of the study of token efficiency: trains the cells it is sent, one after the other."""

from __future__ import annotations

import argparse
import gc
import os
import shlex
import shutil
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from _token_cells import Cell, recipe

WARMUP = 60
DOCUMENTS = 240


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker must know; plain values, for another process."""
    return {
        "data": str(args.data), "work": str(args.work), "device": args.device, "shards": args.shards,
        "characters": args.characters,
    }  # fmt: skip


def words_of(cell: Cell, data: Path, shards: int, characters: int) -> list[str]:
    """What follows `sid train` to train the cell's model, but for where it goes."""
    from sidlm.train.settings import format_overrides

    made = recipe(cell)
    words = ["--model.preset", "nano", "--model.arch", "sid", "--model.set", *format_overrides(made.fields)]
    words += ["--data.train", *(str(data / f"train-{i:02}.jsonl.zst") for i in range(shards))]
    words += ["--data.valid", str(data / "valid.jsonl.zst"), "--data.tokenizer", str(data / "tokenizer-16k.json")]
    words += ["--data.seq_len", str(cell.seq_len), "--train.steps", str(cell.steps)]
    words += ["--train.batch_size", str(cell.batch), "--train.seed", str(cell.seed)]
    words += ["--optim.lr", f"{made.lr:g}", "--optim.down_proj_lr_scale", f"{made.down_lr:g}"]
    words += [
        "--schedule.warmup_steps",
        str(min(WARMUP, cell.steps // 2)),
        "--sparsity.warmup_steps",
        str(cell.steps // 10),
    ]
    checks = 1 if cell.group == "speed" else 4
    words += ["--validation.every", str(max(1, cell.steps // checks)), "--validation.documents", str(DOCUMENTS)]
    words += ["--validation.characters", str(characters), "--validation.batch_size", "16"]
    return [
        *words,
        "--train.log_every",
        "250",
        "--samples.prompts",
        "--checkpoint.every",
        "0",
        "--checkpoint.keep",
        "1",
    ]


def config_of(cell: Cell, settings: dict[str, Any], compiled: bool) -> Any:
    from sidlm.train.config import load_config

    words = words_of(cell, Path(settings["data"]), settings["shards"], settings["characters"])
    words += ["--data.cache_dir", f"{settings['work']}/cache", "--train.out", f"{settings['work']}/run-{os.getpid()}"]
    words += ["--train.device", settings["device"], "--train.compile", "auto" if compiled else "off"]
    return load_config(None, words)


def run_cell(cell: Cell, compiled: bool, settings: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Train one cell and score its answers; the row without the cell's own fields."""
    from sidlm.models.flops import num_parameters, train_flops_per_token
    from sidlm.train.loop import train

    cfg, made = config_of(cell, settings, compiled), recipe(cell)
    out = Path(cfg.train.out)
    shutil.rmtree(out, ignore_errors=True)
    losses: list[float] = []
    speeds: list[float] = []

    def on_step(record: dict[str, Any]) -> None:
        losses.append(record["loss"])
        speeds.append(record["tokens_per_second"])
        if "valid" in record or record["step"] % 100 == 0:
            recent = [x for x in losses[-20:] if x is not None]
            point = {"step": record["step"], "tokens": record["tokens"], "train": sum(recent) / max(1, len(recent))}
            tell(("curve", point | ({"valid": record["valid"]["all"]["loss"]} if "valid" in record else {})))

    started = time.perf_counter()
    result = train(cfg, on_step=on_step)
    seconds = time.perf_counter() - started
    domains = {
        name: {"loss": v["loss"], "bpb": v["bits_per_byte"]} for name, v in result.valid.items() if name != "all"
    }
    words = words_of(cell, Path(), settings["shards"], settings["characters"])
    row = {
        "params": num_parameters(made.config), "params_non_embedding": num_parameters(made.config, non_embedding=True),
        "tokens": result.tokens, "loss": result.valid["all"]["loss"], "bpb": result.valid["all"]["bits_per_byte"],
        "valid_tokens": result.valid["all"]["tokens"], "domains": domains,
        "flops": train_flops_per_token(made.config, cell.seq_len) * result.tokens, "seconds": seconds,
        "peak_lr": made.lr, "tokens_per_second": statistics.median(speeds), "peak_memory": result.peak_memory,
        "command": shlex.join(["sid", "train", *words]),
    }  # fmt: skip
    if cell.tasks:
        row["answers"] = answers(out / "model", Path(settings["data"]) / "tasks", cfg)
    shutil.rmtree(out, ignore_errors=True)
    return row


def answers(model_folder: Path, tasks: Path, cfg: Any) -> dict[str, dict[str, float]]:
    """NLL of the right answers of each question file, nats per question and per token."""
    import torch

    from sidlm.data import Tokenizer
    from sidlm.evaluate.tasks import read_task, score_task
    from sidlm.models import SidForCausalLM
    from sidlm.train import hardware

    device = hardware.resolve_device(cfg.train.device)
    model: Any = SidForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device).eval()
    tokenizer = Tokenizer.load(model_folder)
    scores = {}
    with torch.no_grad(), hardware.autocast(device, hardware.resolve_precision("auto", device)):
        for path in sorted(tasks.glob("*.jsonl")):
            found = score_task(model, tokenizer, read_task(path), batch_size=64, max_len=1024, device=device)
            scores[path.stem] = {"nll": found.nll, "nll_per_token": found.nll_per_token, "questions": found.questions}
    return scores


def serve(connection: Any, gpu: int, settings: dict[str, Any]) -> None:
    """The process: receives (cell, whether to compile), answers with "curve" messages and then "done" or "failed"."""
    log = open(f"{settings['work']}/worker-{os.getpid()}.log", "w", encoding="utf-8")  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[gpu] if visible else str(gpu)
    import torch

    torch.set_num_threads(1)
    while True:
        cell, compiled = connection.recv()
        try:
            row = run_cell(cell, compiled, settings, connection.send)
        except BaseException:
            traceback.print_exc()
            connection.send(("failed", traceback.format_exc()))
            sys.exit(1)  # what an error left of the device's context would fail every other cell, too
        connection.send(("done", row))
        # the next cell has other shapes: graphs of this one would make their dimensions dynamic
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
