"""One cell of a grid: a training run of `sid train`, and its result in one JSON file.

Its folder is the run's, with cell.json and cell.yaml, which say what to do, and in the end result.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from sidlm.errors import SidError
from sidlm.scaling.files import read_json, write_whole
from sidlm.scaling.grid import Cell
from sidlm.train.config import RunConfig, flatten, load_config, to_yaml

# settings that change how a cell is run, not what it computes
FREE = ("train.out", "train.device", "train.resume", "train.log_every", "data.cache_dir", "checkpoint.", "samples.")


def prepare(cell: Cell, folder: Path, extra: dict[str, Any]) -> None:
    """Write what the cell's process reads, with `extra` facts for its result; a finished cell is left as it is.

    Raises SidError if the folder already holds work with other settings.
    """
    config = folder / "cell.yaml"
    finished = (folder / "result.json").exists()
    begun = finished or any((folder / "checkpoints").glob("step-*"))
    if config.exists() and begun:
        differing = differences(load_config(config), cell.cfg)
        if differing:
            raise SidError(
                f"cell {cell.name} was trained with other settings in {folder}: {'; '.join(differing)}: "
                "choose another --out, or delete that folder"
            )
    if finished:
        return
    folder.mkdir(parents=True, exist_ok=True)
    facts = {f.name: getattr(cell, f.name) for f in dataclasses.fields(cell) if f.name != "cfg"}
    facts |= {"flops": cell.flops} | extra
    write_whole(config, to_yaml(cell.cfg))
    write_whole(folder / "cell.json", json.dumps(facts, indent=1) + "\n")


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What makes two configs two cells, in words."""
    before, now = flatten(old), flatten(new)
    return [
        f"{key} is {before.get(key, 'not set')} there and {now.get(key, 'not set')} here"
        for key in sorted(before.keys() | now.keys())
        if not key.startswith(FREE) and before.get(key) != now.get(key)
    ]


def run_cell(folder: Path) -> int:
    """Train the cell in the folder, or go on, and write result.json; 0, or 128 + the signal that stopped it.

    Raises SidError for what a run cannot do, and at once if there is no held-out text to measure a loss on.
    """
    from sidlm.train.build import open_text
    from sidlm.train.loop import train

    facts = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    cfg = load_config(folder / "cell.yaml")
    cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, out=str(folder)))
    begun = any((folder / "checkpoints").glob("step-*"))
    if not open_text(cfg, resumed=begun, log=None).valid:
        raise SidError("there is no held-out text: set data.valid, or data.valid_fraction above 0")
    done = train(cfg)
    if done.signal:
        return 128 + done.signal
    result = facts | _losses(done.valid) | _provenance(cfg, folder) | _speed(folder)
    result["tasks"] = _task_scores(facts["tasks"], folder)
    write_whole(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    if not facts["keep_models"]:
        for name in ("checkpoints", "model", "tensorboard"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return 0


def _losses(valid: dict[str, dict[str, float]]) -> dict[str, Any]:
    domains = {domain: numbers["loss"] for domain, numbers in valid.items() if domain != "all"}
    return {"loss": valid["all"]["loss"], "bits_per_byte": valid["all"]["bits_per_byte"], "domains": domains}


def _speed(folder: Path) -> dict[str, Any]:
    """wall_seconds: of all steps, compilation included; tokens_per_second: the median step's."""
    from sidlm.train.metrics import read_json_lines

    records = read_json_lines(folder / "metrics.jsonl")
    speed = statistics.median(record["tokens_per_second"] for record in records)
    skipped = sum("skipped" in record for record in records)
    return {
        "wall_seconds": sum(record["seconds"] for record in records),
        "tokens_per_second": speed,
        "skipped_steps": skipped,
    }


def _provenance(cfg: RunConfig, folder: Path) -> dict[str, Any]:
    """What a reader needs to know that two cells may be compared, and to run one again."""
    from sidlm.train.build import open_text

    text = open_text(cfg, resumed=True, log=None)
    held_out = hashlib.sha256(json.dumps([[d.domain, d.text] for d in text.valid]).encode())
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in sorted(flatten(cfg).items()) if not key.startswith(FREE)}
    return {
        "lr": cfg.optim.lr,
        "batch_size": cfg.train.batch_size,
        "seq_len": cfg.data.seq_len,
        "steps": cfg.train.steps,
        "tokenizer": text.tokenizer.fingerprint,
        "data": text.fingerprint,
        "held_out": held_out.hexdigest()[:32],
        "config": hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:32],
        "commit": environment["git_revision"],
        "hardware": environment["device"],
        "precision": environment.get("precision"),
        "torch": environment["torch"],
    }


def _task_scores(tasks: dict[str, str], folder: Path) -> dict[str, Any]:
    """Likelihood of the answers on question files, by the exported model."""
    if not tasks:
        return {}
    import torch

    from sidlm.data.tokenizer import Tokenizer
    from sidlm.evaluate import read_task, score_task
    from sidlm.models import SidForCausalLM
    from sidlm.train import hardware

    cfg = load_config(folder / "config.yaml")
    device = hardware.resolve_device(cfg.train.device)
    loaded: Any = SidForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model, tokenizer = loaded.to(device).eval(), Tokenizer.load(folder / "model")
    precision = hardware.resolve_precision(cfg.train.precision, device)
    with torch.no_grad(), hardware.autocast(device, precision):
        scores = {name: score_task(model, tokenizer, read_task(file)) for name, file in tasks.items()}
    return {name: dataclasses.asdict(score) for name, score in scores.items()}


def result_of(folder: Path) -> dict[str, Any] | None:
    """The finished cell's result, or None."""
    return read_json(folder / "result.json")


def stop_with_parent(parent: int) -> None:
    """Ask this process to save and stop once the one that started it is gone, so that nothing trains unsupervised."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
