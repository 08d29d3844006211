"""How fast `sid train` trains: MFU of a 1B Llama and of an 8B-width one in bf16, float8, with every fourth layer
2-simplicial at (512, 32) and with 2:4 sparse feed-forward layers; the share of step time of each part; and a
transformers loop tuned by hand on the same machine in the same process.

    python benchmarks/train_speed.py --json benchmarks/results/train_speed.json [--budget 150] [--sizes 1b 8b-width]
    python benchmarks/train_speed.py --sizes tiny --device cpu --json /tmp/tiny.json      # a test of the script

A row is a run of sidlm.train.loop.train, the function behind `sid train`, over documents of random words that are far
longer than a row, ended after a few steps. The vocabulary is Llama 3's; the tokenizer knows fewer tokens, which makes
no difference to the model's work. MFU counts the model's FLOPs alone (models/flops.py; rows of one document) over the
data sheet's dense bf16 peak, also in float8. Speed is the median over the steps after the warm-up; the profiled steps
come after them. Results are written after every row; rows that would start after --budget seconds are left out and said
so. One seed: the numbers of a step do not depend on it.
"""

import argparse
import contextlib
import gc
import json
import random
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from _train_speed_baseline import steps
from _train_speed_profile import shares, start
from _train_speed_rows import SIZES, Row, rows

from sidlm.models import num_parameters, preset
from sidlm.models.flops import train_flops_per_token
from sidlm.train import hardware
from sidlm.train.config import load_config
from sidlm.train.loop import train
from sidlm.train.settings import format_overrides


class Enough(Exception):
    """Ends a run."""


def text(folder: Path) -> Path:
    """One document of random words, longer than any row reads."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(5000)]
    path = folder / "words.txt"
    path.write_text(" ".join(rng.choices(words, k=400_000)))
    return path


def command(row: Row, args: argparse.Namespace, place: Path) -> list[str]:
    """What follows `sid train`."""
    out = place / f"{row.size} {row.name}".replace(":", "-").replace(" ", "-")
    size = SIZES[row.size]
    fields = {"vocab_size": size.vocab, "num_hidden_layers": size.layers, "intermediate_size": size.ffn}
    fields |= {"max_position_embeddings": size.seq_len} | row.overrides
    words = ["--model.preset", size.preset, "--model.arch", "llama", "--model.set", *format_overrides(fields)]
    words += ["--data.train", str(place / "words.txt"), "--data.vocab_size", "512", "--data.valid_fraction", "0"]
    words += ["--data.seq_len", str(size.seq_len), "--data.cache_dir", str(place / "cache")]
    words += ["--train.batch_size", str(size.batch_size), "--train.micro_batch_size", str(size.micro_batch_size)]
    words += ["--train.steps", "1000", "--train.device", args.device, "--train.out", str(out)]
    words += ["--train.log_every", "1000", "--validation.every", "0", "--checkpoint.every", "0", "--samples.prompts"]
    return [*words, *row.settings]


class Watch:
    """Counts steps, keeps their seconds and profiles the last two."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.warmup, self.timed, self.cuda = args.warmup, args.steps, args.device.startswith("cuda")
        self.seconds: list[float] = []
        self.profile: Any = None

    def step(self, seconds: float) -> None:
        """After a step; raises Enough after the last one."""
        self.seconds.append(seconds)
        done = len(self.seconds) - self.warmup - self.timed
        if done == 0:
            self.profile = start(self.cuda)
        if done == 2:
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
            "first_step_seconds": round(self.seconds[0], 1),
        }  # fmt: skip


def measured(row: Row, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """One row's numbers."""
    size, watch, device = SIZES[row.size], Watch(args), torch.device(args.device)
    fields = {"vocab_size": size.vocab, "num_hidden_layers": size.layers, "intermediate_size": size.ffn}
    config = preset(size.preset, arch="llama", **fields | row.overrides)
    found: dict[str, Any] = {"parameters": num_parameters(config)}
    micro = size.micro_batch_size
    if row.baseline:
        micro = transformers_row(row, device, watch)
    else:
        words = command(row, args, place)
        found["command"] = shlex.join(["sid", "train", *words])
        with contextlib.suppress(Enough):
            train(load_config(None, words), on_step=lambda record: watch.step(record["seconds"]))
    flops = train_flops_per_token(config, size.seq_len)
    peak = hardware.data_sheet_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    found |= {"train_flops_per_token": flops, "micro_batch_rows": micro}
    found |= watch.result(size.batch_size * size.seq_len, flops, peak or args.peak)
    found |= shares(watch.profile, size, config.hidden_size)
    found["peak_memory_gib"] = round(hardware.peak_memory_bytes(device) / 2**30, 2)
    return found


def transformers_row(row: Row, device: torch.device, watch: Watch) -> int:
    """Runs the baseline with the largest micro-batch that fits, and gives its rows."""
    micro = SIZES[row.size].micro_batch_size
    while True:
        try:
            for seconds in steps(SIZES[row.size], device, row.baseline, micro):
                watch.step(seconds)
        except Enough:
            return micro
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
            micro //= 2
        watch.seconds.clear()
        clean(device)


def clean(device: torch.device) -> None:
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", default=["1b", "8b-width"], choices=list(SIZES))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only the rows of these names")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no further row is started")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=6, help="timed steps")
    parser.add_argument("--peak", type=float, default=1e12, help="FLOP/s where the device is not in the table")
    args = parser.parse_args()
    device, began = torch.device(args.device), time.perf_counter()
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "environment": hardware.environment(device) | {"torchao": hardware.package_version("torchao")},
        "sizes": {name: vars(SIZES[name]) for name in args.sizes},
        "rows": [],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        text(Path(place))
        for row in rows(args.sizes):
            if args.only and row.name not in args.only:
                continue
            done: dict[str, Any] = {"size": row.size, "row": row.name}
            elapsed = time.perf_counter() - began
            if elapsed > args.budget:
                done["left_out"] = f"{elapsed:.0f} s had passed, --budget is {args.budget:.0f}"
            else:
                try:
                    done |= measured(row, args, Path(place))
                except Exception as error:
                    done["error"] = f"{type(error).__name__}: {error}"[:2000]
                    traceback.print_exc()
                clean(device)
            done["seconds"] = round(time.perf_counter() - began - elapsed, 1)
            report["rows"].append(done)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
            told = ("size", "row", "tokens_per_second", "mfu", "parts", "left_out", "error", "seconds")
            print(json.dumps({key: done[key] for key in told if key in done}), flush=True)


if __name__ == "__main__":
    main()
