"""A process of the study of token efficiency: trains the cells it is sent, one after the other."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Any, ClassVar

from _token_cells import DECAY, Cell, recipe
from _token_seeds import SeedRun

WARMUP = 100
DOCUMENTS = 240
TOKENIZER = "tokenizer-4k"
RECIPE = ["--optim.name", "muon", "--optim.embedding_lr_scale", "10"]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What a worker must know; plain values, for another process."""
    return {
        "data": str(args.data), "work": str(args.work), "device": args.device, "shards": args.shards,
        "characters": args.characters,
    }  # fmt: skip


def words_of(cell: Cell, seed: int, steps: int, data: Path, shards: int, characters: int) -> list[str]:
    """What follows `sid train` to train one seed of the cell for so many steps, but for where it goes."""
    from sidlm.train.settings import format_overrides

    made = recipe(cell)
    words = ["--model.preset", "nano", "--model.arch", "sid", "--model.set", *format_overrides(made.fields)]
    words += ["--data.train", *(str(data / f"train-{i:02}.jsonl.zst") for i in range(shards))]
    words += ["--data.valid", str(data / "valid.jsonl.zst"), "--data.tokenizer", str(data / TOKENIZER)]
    words += ["--data.seq_len", str(cell.seq_len), "--train.steps", str(steps)]
    words += ["--train.batch_size", str(cell.batch), "--train.seed", str(seed), *RECIPE]
    words += ["--optim.lr", f"{made.lr:g}", "--optim.down_proj_lr_scale", f"{made.down_lr:g}"]
    decay = round(DECAY * steps) * cell.batch * cell.seq_len
    words += ["--schedule.floor", "1", "--schedule.anneal_tokens", str(decay)]
    words += ["--schedule.warmup_steps", str(min(WARMUP, cell.lengths[0] // 4)), "--sparsity.warmup_steps", "100"]
    words += ["--validation.every", "0", "--validation.documents", str(DOCUMENTS)]
    words += ["--validation.characters", str(characters), "--validation.batch_size", "32"]
    return [*words, "--samples.prompts", "--checkpoint.every", "0", "--checkpoint.keep", "1"]


def config_of(cell: Cell, seed: int, settings: dict[str, Any]) -> Any:
    from sidlm.train.config import load_config

    words = words_of(cell, seed, cell.lengths[-1], Path(settings["data"]), settings["shards"], settings["characters"])
    words += ["--data.cache_dir", f"{settings['work']}/cache", "--train.out", f"{settings['work']}/run-{os.getpid()}"]
    return load_config(None, [*words, "--train.device", settings["device"]])


class Once:
    """A tokenizer that remembers what it encoded: every model of a process is validated on the same texts."""

    KNOWN: ClassVar[dict[tuple[str, ...], list[list[int]]]] = {}

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self.KNOWN.get(tuple(texts))
        if found is None:
            found = self.KNOWN[tuple(texts)] = self.tokenizer.encode_batch(texts)
        return found


def run_cell(cell: Cell, compiled: bool, settings: dict[str, Any], tell: Any) -> None:
    """Train one cell; tells ("curve", point) now and then and ("row", fields) for each seed and length."""
    import torch

    from sidlm.train import hardware
    from sidlm.train.build import build_model, open_text

    cfgs = [config_of(cell, seed, settings) for seed in cell.seeds]
    texts = [open_text(cfg, resumed=False, log=None) for cfg in cfgs]
    texts = [dataclasses.replace(text, tokenizer=Once(text.tokenizer)) for text in texts]
    device, models = hardware.resolve_device(settings["device"]), []
    for cfg, text in zip(cfgs, texts, strict=True):
        torch.manual_seed(cfg.train.seed)
        models.append(build_model(cfg, text.tokenizer, device=device).to(device).train())
    run = SeedRun(cfgs, [text.loader for text in texts], models, device)
    if compiled and device.type == "cuda":
        run.compile()
    started, looking = time.perf_counter(), 0.0
    for step, decayed in run.lengths(cell.lengths, DECAY):
        losses = torch.stack(run.losses).mean(0).tolist()  # the one wait for the device
        run.losses.clear()
        tell(("curve", {"step": step, "decayed": decayed, "train": losses, "seconds": time.perf_counter() - started}))
        if not all(math.isfinite(loss) for loss in losses):
            raise FloatingPointError(f"the loss is {losses} before step {step}")
        if decayed:
            now = time.perf_counter()
            for i, (seed, text) in enumerate(zip(cell.seeds, texts, strict=True)):
                facts = {"train_loss": losses[i], "seconds": now - started - looking}
                tell(("row", facts | row_of(cell, seed, step, run.of(i), text, cfgs[i], settings)))
            looking += time.perf_counter() - now


def row_of(
    cell: Cell, seed: int, steps: int, model: Any, text: Any, cfg: Any, settings: dict[str, Any]
) -> dict[str, Any]:
    """What is known of one trained model."""
    from sidlm.models.flops import num_parameters, train_flops_per_token
    from sidlm.train import hardware
    from sidlm.train.observe import observing, validate

    made, device = recipe(cell), hardware.resolve_device(settings["device"])
    precision = hardware.resolve_precision("auto", device)
    valid = validate(model, text, cfg, device, precision)
    tokens = steps * cell.batch * cell.seq_len
    words = words_of(cell, seed, steps, Path(), settings["shards"], settings["characters"])
    row = {
        "name": cell.row_name(seed, steps), "seed": seed, "steps": steps, "tokens": tokens,
        "params": num_parameters(made.config), "params_non_embedding": num_parameters(made.config, non_embedding=True),
        "loss": valid["all"]["loss"], "bpb": valid["all"]["bits_per_byte"], "valid_tokens": valid["all"]["tokens"],
        "domains": {k: {"loss": v["loss"], "bpb": v["bits_per_byte"]} for k, v in valid.items() if k != "all"},
        "flops": train_flops_per_token(made.config, cell.seq_len) * tokens, "peak_lr": made.lr,
        "command": shlex.join(["sid", "train", *words]),
    }  # fmt: skip
    if cell.tasks and steps == cell.lengths[-1]:
        with observing(model, device, precision):
            row["answers"] = answers(model, text.tokenizer, Path(settings["data"]) / "tasks", device)
    return row


def answers(model: Any, tokenizer: Any, tasks: Path, device: Any) -> dict[str, dict[str, float]]:
    """NLL of the right answers of each question file, nats per question and per token."""
    from sidlm.evaluate.tasks import read_task, score_task

    scores = {}
    for path in sorted(tasks.glob("*.jsonl")):
        found = score_task(model, tokenizer, read_task(path), batch_size=128, max_len=1024, device=device)
        scores[path.stem] = {"nll": found.nll, "nll_per_token": found.nll_per_token, "questions": found.questions}
    return scores


def serve(connection: Any, gpu: int, settings: dict[str, Any]) -> None:
    """The process: receives (cell, whether to compile), tells "curve"s and "row"s, then "done" or "failed"."""
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
            run_cell(cell, compiled, settings, connection.send)
        except BaseException:
            traceback.print_exc()
            connection.send(("failed", traceback.format_exc()))
            sys.exit(1)  # what an error left of the device's context would fail every other cell, too
        connection.send(("done", None))
        # the next cell has other shapes: graphs of this one would make their dimensions dynamic
        torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
