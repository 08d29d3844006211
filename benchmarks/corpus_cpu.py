"""A plain Llama against a Sid model on real text, on a CPU: equal parameters, equal tokens, the same data per seed.

    python benchmarks/corpus_cpu.py --config configs/nano.yaml --train DATA... --valid FILE --tokenizer FOLDER \
        --seeds 0 1 2 --jobs 2 --json benchmarks/results/corpus_cpu_nano.json

Every run is the real command, `sid train CONFIG --model.arch ARCH --train.seed SEED ...`, in a process of its own with
one thread, --jobs at a time; then `sid evaluate` gives bits per byte per domain of the held-out file. Speed is
the median over steps, memory the peak resident size of the training process.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from _corpus import COMMAND, measured, trained

from sidlm.train import hardware


def run(args: argparse.Namespace, arch: str, seed: int, out: Path) -> dict:
    sources = ["--data.train", *args.train, "--data.valid", args.valid, "--data.tokenizer", args.tokenizer]
    train = [args.config, "--model.arch", arch, "--train.seed", str(seed), "--train.out", str(out)]
    train += [*sources, "--train.device", "cpu", "--checkpoint.every", "0", "--samples.prompts"]
    # the comparison evaluates at the end, by the command; the loop need not
    train += ["--validation.every", "0", *args.settings]
    headline, _ = trained(train, out)
    evaluation = out / "evaluation.json"
    measured([*COMMAND, "evaluate", str(out), "--data", args.valid, "--device", "cpu", "--json", str(evaluation)])
    speed, memory = headline["tokens_per_second"], headline["peak_memory_mb"]
    print(f"{arch} seed {seed}: {speed:.0f} tok/s, {memory:.0f} MB", flush=True)
    config = json.loads((out / "model" / "config.json").read_text())
    domains = json.loads(evaluation.read_text())
    row = {"arch": arch, "seed": seed} | headline
    return row | {"evaluation": {"seq_len": domains["seq_len"], "data": domains["data"]}, "config": config}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--train", nargs="+", required=True)
    parser.add_argument("--valid", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", default="runs/corpus_cpu", help="where the run folders go")
    parser.add_argument("--json", required=True)
    parser.add_argument("--settings", nargs=argparse.REMAINDER, default=[], help="more settings of sid train, last")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(run, args, arch, seed, Path(args.out) / f"{Path(args.config).stem}-{arch}-{seed}")
            for seed in args.seeds
            for arch in ("llama", "sid")
        ]
        rows = [future.result() for future in futures]
    facts = hardware.environment(torch.device("cpu")) | {"threads_per_run": 1, "jobs": args.jobs}
    Path(args.json).write_text(json.dumps({"facts": facts, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
