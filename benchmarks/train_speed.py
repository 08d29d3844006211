"""How fast `sid train` trains: MFU of a 1B Llama and of an 8B-width one in bf16, float8, with every fourth layer
2-simplicial at (512, 32) and with 2:4 sparse feed-forward layers; the share of step time of each part; and a
transformers loop tuned by hand on the same machine in the same run.

    python benchmarks/train_speed.py --json benchmarks/results/train_speed.json [--seconds 240] [--sizes 1b 8b-width]
    python benchmarks/train_speed.py --sizes tiny --device cpu --json /tmp/tiny.json      # a test of the script

A row is a process of its own that runs sidlm.train.loop.train, the function behind `sid train`, over documents of
random words, ended after a few steps: documents are far longer than a row, but in the packed rows, where their lengths
are exponential with a mean near 1,000 tokens. The vocabulary is Llama 3's; the tokenizer knows fewer tokens, which
makes no difference to the model's work. MFU counts the model's FLOPs alone (models/flops.py; rows of one document, also
where rows are packed) over the data sheet's dense bf16 peak, also in float8. Speed is the median over the steps after
the warm-up; the profiled step comes after them. One seed: the numbers of a step do not depend on it.

First, --jobs rows at once compile what they need, each with the fewest layers that need it, into torch's caches on
the disk; then all run one after the other. Results are written after every row; rows that would not end within
--seconds are left out and said so.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _train_speed_rows import SIZES, Row, row, rows

from sidlm.train import hardware


def text(folder: Path) -> None:
    """long.jsonl, one document that is longer than any row reads, and documents.jsonl, the same words in short ones."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(5000)]
    words = rng.choices(vocabulary, k=110_000)  # of six bytes, which are the tokens
    cuts, documents = 0, []
    while cuts < len(words):
        count = 1 + int(rng.expovariate(1 / 170))
        documents.append(words[cuts : cuts + count])
        cuts += count
    for name, parts in (("long", [words]), ("documents", documents)):
        lines = (json.dumps({"text": " ".join(part)}) for part in parts)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


class Worker:
    """The process of one row: started, told to begin, waited for."""

    def __init__(self, this: Row, args: argparse.Namespace, place: Path, *, warm: bool) -> None:
        name = f"{this.size}-{this.name}-{'warm' if warm else 'row'}".replace(":", "-").replace(" ", "-")
        self.row, self.result, self.out, self.log = this, place / f"{name}.json", place / name, place / f"{name}.log"
        self.told = {"size": this.size, "row": this.name, "warm": warm, "warmup": args.warmup, "steps": args.steps}
        self.told |= {"device": args.device, "peak": args.peak, "place": str(place)}
        self.told |= {"out": str(self.out), "result": str(self.result)}
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4"} if warm else {}
        caches = {"TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"), "TRITON_CACHE_DIR": str(place / "triton")}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("_train_speed_row.py"))],
            stdin=subprocess.PIPE, stdout=self.log.open("w"), stderr=subprocess.STDOUT, text=True,
            env=os.environ | caches | threads,
        )  # fmt: skip

    def begin(self) -> None:
        self._say(json.dumps(self.told) + "\n")

    def dismiss(self) -> None:
        """End it without having begun."""
        self._say("")

    def _say(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stdin:
                stdin.write(line)
        except BrokenPipeError:
            pass  # it is dead: its log says why

    def end(self, until: float) -> dict[str, Any]:
        """What it found, at the latest at `until` of time.perf_counter."""
        try:
            self.process.wait(max(0.1, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.out, ignore_errors=True)
        if self.result.exists():
            found = json.loads(self.result.read_text())
        else:
            found = {"error": f"ended with {self.process.returncode} and no result"}
        if "error" in found:
            found["log"] = self.log.read_text(errors="replace")[-3000:]
        return found


def warm(wanted: list[Row], args: argparse.Namespace, place: Path, until: float) -> list[dict[str, Any]]:
    """Fills the caches of torch's compilers and of the data, several rows at once; what failed is told, and no harm."""
    with ThreadPoolExecutor(args.jobs) as pool:
        return list(pool.map(lambda this: warmed(this, args, place, until), wanted))


def warmed(this: Row, args: argparse.Namespace, place: Path, until: float) -> dict[str, Any]:
    found: dict[str, Any] = {"left_out": "no time"}
    if time.perf_counter() < until:
        worker = Worker(this, args, place, warm=True)
        worker.begin()
        found = worker.end(until)
    return {"size": this.size, "row": this.name} | {key: value for key, value in found.items() if key != "command"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", default=["1b", "8b-width"], choices=list(SIZES))
    parser.add_argument("--rows", nargs="+", default=[], metavar="SIZE/NAME", help="these rows, in this order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=240, help="of the whole run")
    parser.add_argument("--row-seconds", type=float, default=60, help="of one row")
    parser.add_argument("--warm-seconds", type=float, default=60, help="of compiling beforehand; 0: none of it")
    parser.add_argument("--jobs", type=int, default=12, help="rows that compile at once")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=3, help="timed steps")
    parser.add_argument("--peak", type=float, default=1e12, help="FLOP/s where the device is not in the table")
    parser.add_argument("--commit", help="revision to record where the history is not there")
    args = parser.parse_args()
    device, began = torch.device(args.device), time.perf_counter()
    environment = hardware.environment(device) | {"torchao": hardware.package_version("torchao")}
    report: dict[str, Any] = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "environment": environment | ({"git_revision": args.commit} if args.commit else {}),
        "sizes": {},
        "rows": [],
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    wanted = [row(*name.split("/", 1)) for name in args.rows] or rows(args.sizes)
    report["sizes"] = {this.size: vars(SIZES[this.size]) for this in wanted}
    with tempfile.TemporaryDirectory() as folder:
        place, end = Path(folder), began + args.seconds
        text(place)
        if args.warm_seconds:
            report["warming"] = warm(wanted, args, place, began + args.warm_seconds)
        report["warm_seconds"] = round(time.perf_counter() - began, 1)
        print(json.dumps({key: report.get(key) for key in ("warm_seconds", "warming")}), flush=True)
        longest, following = 0.0, None
        for index, this in enumerate(wanted):
            started = time.perf_counter()
            done: dict[str, Any] = {"size": this.size, "row": this.name}
            worker = following or Worker(this, args, place, warm=False)
            if started + 0.8 * longest > end:
                worker.dismiss()
                done["left_out"] = f"{started - began:.0f} s had passed of --seconds {args.seconds:.0f}"
                following = None
            else:
                worker.begin()
                last = index + 1 == len(wanted)
                following = None if last else Worker(wanted[index + 1], args, place, warm=False)
                done |= worker.end(min(end, started + args.row_seconds))
                longest = max(longest, time.perf_counter() - started)
            report["rows"].append(done)
            args.json.write_text(json.dumps(report, indent=1) + "\n")
            told = ("size", "row", "tokens_per_second", "mfu", "first_step_seconds", "peak_memory_gib", "parts",
                    "left_out", "error", "log", "seconds")  # fmt: skip
            print(json.dumps({key: done[key] for key in told if key in done}), flush=True)


if __name__ == "__main__":
    main()
