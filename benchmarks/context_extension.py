"""Question: does a small model's context grow sixteenfold in six stages, each of which passes its gate?

    python benchmarks/context_extension.py --out benchmarks/results/context_extension.json

What Llama 3 does from 8K to 128K tokens, from 64 to 1,024 on two CPU cores: a model of half a million parameters is
trained in rows of 64 tokens, then `sid extend` lengthens its context, wanting every needle at each new length and the
loss of held-out short texts back. Such a model learns to read a needle from nothing but needles, so the text is
made for that: sentences of a small grammar, or the filler of the test repeated, with one number planted somewhere and
asked for at the end. Numbers are drawn at random, those of the test are others. Half of the extension's rows are the
short texts of before, half are texts of up to the longest row.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _corpus import COMMAND, measured

from sidlm.evaluate.needle import FILLER, KEYS

LENGTHS = (64, 96, 160, 256, 416, 640, 1024)
STAGES = [f"150K:{4096 // length}x{length}" for length in LENGTHS[1:]]
WHO = [
    "The cat", "A dog", "My friend", "The old man", "The teacher", "A bird", "The river", "Her sister", "The captain",
    "Our neighbour",
]  # fmt: skip
DOES = ["sees", "likes", "follows", "finds", "remembers", "leaves", "paints", "hears", "visits", "carries"]
WHAT = [
    "the house", "a red boat", "the small garden", "an open door", "the long road", "a quiet song", "some bread",
    "a letter",
]  # fmt: skip
WHEN = ["in the morning", "at night", "every day", "near the sea", "with a smile", "after lunch", "without a word",
        "again"]  # fmt: skip


def text(rng: random.Random, words: int) -> str:
    """About so many words of hay, a needle before all of it or after any of them, and its question at the end."""
    if rng.random() < 0.5:
        hay = FILLER.split() * (words // len(FILLER.split()) + 2)
        first = rng.randrange(len(FILLER.split()))
        hay = hay[first : first + words]
    else:
        hay = []
        while len(hay) < words:
            hay += " ".join(rng.choice(part) for part in (WHO, DOES, WHAT, WHEN)).split()
            hay[-1] += "."
    needle = f"The secret number of {rng.choice(KEYS)} is {rng.randrange(10**4, 10**5)}."
    at = rng.choice((0, rng.randrange(len(hay) + 1)))
    return " " + " ".join([*hay[:at], needle, *hay[at:], needle])  # a context of the test begins with a space, too


def write(path: Path, seed: int, count: int, fewest: int, most: int) -> None:
    """Texts whose lengths in words are spread evenly on a logarithmic scale."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            words = round(fewest * (most / fewest) ** rng.random())
            file.write(json.dumps({"text": text(rng, words)}) + "\n")


def needles(model: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Recall by length and depth."""
    report = folder / "needles.json"
    measured([*COMMAND, "evaluate", str(model), "--needle", *map(str, LENGTHS), "--json", str(report)])
    return json.loads(report.read_text())["needle"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write the results")
    parser.add_argument("--runs", type=Path, help="where the runs are; started again, they go on (default: temporary)")
    parser.add_argument("--steps", type=int, default=1500, help="of the model before the extension (default: 1500)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.runs or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "short.jsonl", 0, 40_000, 4, 28)
        write(folder / "long.jsonl", 1, 15_000, 12, 640)
        write(folder / "valid.jsonl", 2, 300, 8, 28)
        data = ["--data.valid", folder / "valid.jsonl", "--data.cache_dir", folder / "cache", "--data.seq_len", 64]
        common = [*data, "--samples.prompts", "The secret number of Alma is", "--train.device", "cpu"]
        base, longer = folder / "base", folder / "longer"
        train = [
            "train", "configs/nano.yaml", "--model.arch", "llama", "--data.train", folder / "short.jsonl", *common,
            "--data.vocab_size", 800, "--train.batch_size", 32, "--train.steps", args.steps, "--optim.name", "muon",
            "--optim.lr", 1e-2, "--train.out", base,
        ]  # fmt: skip
        extend = [
            "extend", "--model.init_from", base, "--data.train", f"{folder}/short.jsonl=0.5",
            f"{folder}/long.jsonl=0.5", *common, "--validation.every", 0, "--optim.name", "muon", "--optim.lr", 4e-3,
            "--schedule.warmup_steps", 5, "--extend.stages", *STAGES, "--extend.attempts", 8, "--train.out", longer,
        ]  # fmt: skip
        commands = [[*map(str, words)] for words in (train, extend)]
        measured([*COMMAND, *commands[0]])
        before = needles(base, folder)
        measured([*COMMAND, *commands[1]])
        record = json.loads((longer / "extend.json").read_text())
        after = needles(longer / f"stage-{len(STAGES)}", folder)
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    result = {
        "commit": git.stdout.strip(),
        "machine": f"{platform.machine()}, one thread, torch {torch.__version__}",
        "command": shlex.join(["python", *sys.argv[:1], "--out", str(args.out), "--steps", str(args.steps)]),
        "commands": [shlex.join(["sid", *command]).replace(str(folder), "RUNS") for command in commands],
        "seed": 0,
        "needles_before": before,
        "loss_before": record["before"],
        "stages": record["stages"],
        "needles_after": after,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
