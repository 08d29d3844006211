"""``sid demo``: the whole life of a tiny model on this machine, with no download."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sidlm.cli import evaluate, generate
from sidlm.cli.common import Parser, add_device, number
from sidlm.errors import SidError

if TYPE_CHECKING:
    from sidlm.train.config import RunConfig

STEPS = 1500
SETTINGS = (
    *("--model.preset", "nano", "--model.arch", "sid"),
    *("--data.train", "embedded", "--data.seq_len", "256"),
    *("--optim.lr", "3e-3", "--train.batch_size", "4"),
    *("--validation.every", "250", "--checkpoint.every", "100"),
)
PROMPTS = ("def main(", "The")
PROBE_STEPS = 8


def config(out: Path, steps: int, device: str, changes: Sequence[str] = ()) -> RunConfig:
    from sidlm.train.config import load_config

    return load_config(
        None, [*SETTINGS, "--train.out", str(out), "--train.steps", str(steps), "--train.device", device, *changes]
    )


def steps_for(minutes: float, device: str) -> int:
    """How many steps take about ``minutes`` here, by the speed of a few steps of a run that is thrown away."""
    from sidlm.train.loop import train

    with tempfile.TemporaryDirectory() as folder:
        result = train(
            config(Path(folder) / "probe", PROBE_STEPS, device, ["--validation.every", "0", "--samples.prompts"])
        )
    if result.signal:
        raise KeyboardInterrupt
    per_step = result.tokens / result.step
    return max(10, round(60 * minutes * result.tokens_per_second / per_step))


def planned_steps(out: Path, minutes: float | None, device: str) -> int:
    """Steps of the run: those it was started with if there is one, else by the time allowed, else ``STEPS``."""
    from sidlm.train.config import load_config

    if (out / "config.yaml").is_file():
        return load_config(out / "config.yaml").train.steps
    return STEPS if minutes is None else steps_for(minutes, device)


def main(argv: list[str]) -> int:
    parser = Parser(
        "demo",
        "Train a tiny 2-simplicial language model on the Python standard library that is on this machine, evaluate it "
        "on held-out files, let it write, and leave a report. A few minutes on two CPU cores, nothing is downloaded. "
        "If it is interrupted, the same command goes on where it was.",
        "  sid demo\n  sid demo --out runs/longer --minutes 20",
    )
    parser.add_argument("--out", default="runs/demo", help="run folder; default: runs/demo")
    parser.add_argument(
        "--minutes",
        type=number(float, 0.01),
        help=f"train for about so long on this machine; default: {STEPS} steps, the same numbers everywhere",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise SidError(f"--out {out} is a file; it takes a folder")
    from sidlm.train.loop import train

    started = time.perf_counter()
    steps = planned_steps(out, args.minutes, args.device)
    print(f"1/3 training: {steps} steps, Ctrl-C stops it and `sid demo --out {out}` goes on", flush=True)
    result = train(config(out, steps, args.device))
    if result.signal:
        print(f"stopped after step {result.step} of {steps}; `sid demo --out {out}` goes on", file=sys.stderr)
        return 128 + result.signal
    print("2/3 evaluating on files that were held out", flush=True)
    evaluate.main([str(out), "--json", str(out / "evaluation.json"), "--device", args.device])
    print("3/3 writing", flush=True)
    for prompt in PROMPTS:
        generate.main([str(out), prompt, "--max-new-tokens", "64", "--device", args.device])
        print("-" * 20)
    print(
        f"done in {time.perf_counter() - started:.0f} s\n\n"
        f"look at   {out / 'report.html'} (curves, samples), {out / 'evaluation.json'}, {out / 'config.yaml'}\n"
        f'try       sid generate {out} "import os"\n'
        f"          sid chat {out}\n"
        "next      docs/your-own-data.md: the same on your own text"
    )
    return 0
