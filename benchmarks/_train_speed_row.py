"""One row of benchmarks/train_speed.py in a process of its own, told as JSON on standard input.

It imports everything first and then waits for the line, so that its start hides behind the row before it.
"""

import contextlib
import importlib
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from _train_speed_baseline import steps
from _train_speed_profile import shares, start
from _train_speed_rows import SIZES, Row, Size, row

from sidlm.models import num_parameters, preset
from sidlm.models.flops import train_flops_per_token
from sidlm.train import hardware
from sidlm.train.config import load_config
from sidlm.train.loop import train
from sidlm.train.settings import format_overrides


class Enough(Exception):
    """Ends a run."""


def fields(this: Row) -> dict[str, Any]:
    """What the model's config has other than its preset."""
    size = SIZES[this.size]
    found = {"vocab_size": size.vocab, "num_hidden_layers": size.layers, "intermediate_size": size.ffn}
    return found | {"max_position_embeddings": size.seq_len} | this.overrides


def command(this: Row, told: dict[str, Any]) -> list[str]:
    """What follows `sid train`; of a warming run, a model of the fewest layers and one micro-batch."""
    size, place, config, rows = SIZES[this.size], Path(told["place"]), fields(this), SIZES[this.size].batch_size
    if told["warm"]:
        config |= {"num_hidden_layers": len(this.kinds), "layer_types": list(this.kinds)}
        # the loss compiles one chunk, which is that of all rows
        config |= {"vocab_size": size.vocab if (this.size, this.name) == ("1b", "bf16") else 512}
        rows = size.micro_batch_size
    text = place / ("documents.jsonl" if this.packed else "long.jsonl")
    words = ["--model.preset", size.preset, "--model.arch", "llama", "--model.set", *format_overrides(config)]
    words += ["--data.train", str(text), "--data.vocab_size", "512", "--data.valid_fraction", "0"]
    words += ["--data.seq_len", str(size.seq_len), "--data.cache_dir", str(place / "cache")]
    words += ["--train.batch_size", str(rows), "--train.micro_batch_size", str(size.micro_batch_size)]
    words += ["--train.steps", "1000", "--train.device", told["device"], "--train.out", told["out"]]
    words += ["--train.log_every", "1000", "--validation.every", "0", "--checkpoint.every", "0", "--samples.prompts"]
    return [*words, *this.settings]


class Watch:
    """Counts steps, keeps their seconds and profiles the last one."""

    def __init__(self, warmup: int, timed: int, cuda: bool) -> None:
        self.warmup, self.timed, self.cuda = warmup, timed, cuda
        self.seconds: list[float] = []
        self.profile: Any = None

    def step(self, seconds: float) -> None:
        """After a step; raises Enough after the last one."""
        self.seconds.append(seconds)
        done = len(self.seconds) - self.warmup - self.timed
        if done == 0 and not self.timed:
            raise Enough
        if done == 0:
            self.profile = start(self.cuda)
        if done == 1:
            if self.cuda:
                torch.cuda.synchronize()
            self.profile.__exit__(None, None, None)
            raise Enough

    def result(self, tokens: int, flops_per_token: float, peak: float) -> dict[str, Any]:
        timed = self.seconds[self.warmup : self.warmup + self.timed]
        speed = tokens / statistics.median(timed)
        return {
            "tokens_per_second": round(speed), "mfu": round(speed * flops_per_token / peak, 4),
            "tflops": round(speed * flops_per_token / 1e12, 1), "step_seconds": [round(s, 4) for s in timed],
        }  # fmt: skip


def run_baseline(this: Row, device: torch.device, watch: Watch, warm: bool) -> int:
    """Runs the transformers loop with the largest micro-batch that fits, and gives its rows."""
    size = SIZES[this.size]
    if warm:
        size = Size(**vars(size) | {"layers": 1, "batch_size": size.micro_batch_size})
        size = size if this.size == "1b" else Size(**vars(size) | {"vocab": 512})  # memory for all at once
    micro = size.micro_batch_size
    while True:
        try:
            for seconds in steps(size, device, this.baseline, micro):
                watch.step(seconds)
        except Enough:
            return micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
        micro //= 2
        watch.seconds.clear()
        torch.cuda.empty_cache()


def measured(this: Row, told: dict[str, Any]) -> dict[str, Any]:
    """One row's numbers; of a warming run none but its time."""
    size, device = SIZES[this.size], torch.device(told["device"])
    cuda, warm = device.type == "cuda", told["warm"]
    watch = Watch(1, 0, cuda) if warm else Watch(told["warmup"], told["steps"], cuda)
    found: dict[str, Any] = {}
    micro = size.micro_batch_size
    if this.baseline:
        micro = run_baseline(this, device, watch, warm)
    else:
        words = command(this, told)
        found["command"] = shlex.join(["sid", "train", *words])
        started = time.perf_counter()

        def step(record: dict[str, Any]) -> None:
            found.setdefault("until_first_step_seconds", round(time.perf_counter() - started, 1))
            watch.step(record["seconds"])

        with contextlib.suppress(Enough):
            train(load_config(None, words), on_step=step)
    found["first_step_seconds"] = round(watch.seconds[0], 1)
    if warm:
        return found
    config = preset(size.preset, arch="llama", **fields(this))
    flops = train_flops_per_token(config, size.seq_len)
    peak = hardware.data_sheet_flops(torch.cuda.get_device_name(device)) if cuda else None
    found |= {"parameters": num_parameters(config), "train_flops_per_token": flops, "micro_batch_rows": micro}
    found |= watch.result(size.batch_size * size.seq_len, flops, peak or told["peak"])
    found |= shares(watch.profile, size, config.hidden_size)
    return found | {"peak_memory_gib": round(hardware.peak_memory_bytes(device) / 2**30, 2)}


def main() -> None:
    for module in ("data", "models", "parallel.shard"):  # what the loop imports when it needs it
        importlib.import_module(f"sidlm.{module}")
    line = sys.stdin.readline()
    if not line.strip():  # nobody needs this row any more
        return
    told = json.loads(line)
    began = time.perf_counter()
    try:
        found = measured(row(told["size"], told["row"]), told)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        sys.excepthook(type(error), error, error.__traceback__)
    found["seconds"] = round(time.perf_counter() - began, 1)
    Path(told["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
