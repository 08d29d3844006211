"""The folder that a run of benchmarks/sparse24_quality.py reads where there is neither the corpus nor a network.

    python benchmarks/quality_data.py --corpus FOLDER --out FOLDER [--shards 6] [--vocab-size 4096]

Shards train-00.jsonl.zst and on, valid.jsonl.zst, and tok/, a tokenizer trained on the first two of the shards.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shards = [f"train-{i:02}.jsonl.zst" for i in range(args.shards)]
    for name in (*shards, "valid.jsonl.zst"):
        shutil.copyfile(args.corpus / name, args.out / name)
    text = [str(args.out / name) for name in shards[:2]]
    words = ["tokenizer", "train", *text, "--out", str(args.out / "tok"), "--vocab-size", str(args.vocab_size)]
    subprocess.run([sys.executable, "-m", "sidlm.cli.main", *words], check=True)


if __name__ == "__main__":
    main()
