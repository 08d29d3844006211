"""The folder that benchmarks/token_efficiency.py reads: shards of text, held-out text, tokenizer and questions.

    python benchmarks/token_data.py --corpus FOLDER --eval FOLDER --out FOLDER [--shards 14] [--questions 400]

Of each set of questions some are taken, evenly spaced, and of their choices the right answer alone: as prompt and
completion, whose likelihood is scored.
"""

import argparse
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from sidlm.cli.main import main as sid


def lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), encoding="utf-8"):
            yield json.loads(line)


def choice(item: dict[str, Any]) -> dict[str, str]:
    """A question with choices: the text of the right one is scored."""
    question = item.get("question") or item["query"].removeprefix("Question: ")
    right = item["choices"][item["answer"] if "answer" in item else item["gold"]]
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {right}"}


def gsm8k(item: dict[str, Any]) -> dict[str, str]:
    return {"prompt": f"Question: {item['question']}\nAnswer:", "completion": f" {item['answer']}"}


def mbpp(item: dict[str, Any]) -> dict[str, str]:
    return {"prompt": f'"""\n{item["text"]}\n"""\n', "completion": item["code"].replace("\r\n", "\n")}


TASKS = {
    "gsm8k": ("gsm8k_test", gsm8k), "mbpp": ("mbpp", mbpp), "mmlu": ("mmlu_test", choice),
    "mmlu_pro": ("mmlu_pro_test", choice), "arc_challenge": ("arc_challenge_test", choice),
    "arc_easy": ("arc_easy", choice),
}  # fmt: skip


def wanted(name: str, item: dict[str, Any]) -> bool:
    """MBPP's test split is its tasks 11 to 510."""
    return name != "mbpp" or 11 <= item["task_id"] <= 510


def every(items: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` of them, evenly spaced: some sets are sorted by subject."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--questions", type=int, default=400)
    args = parser.parse_args()
    (args.out / "tasks").mkdir(parents=True, exist_ok=True)
    names = [f"train-{i:02}.jsonl.zst" for i in range(args.shards)] + ["valid.jsonl.zst"]
    for name in names:
        shutil.copyfile(args.corpus / name, args.out / name)
    text = [str(args.out / f"train-{i:02}.jsonl.zst") for i in range(min(3, args.shards))]
    make = ["tokenizer", "train", *text, "--out", str(args.out / "tokenizer-4k"), "--vocab-size", "4096"]
    if not (args.out / "tokenizer-4k").exists() and sid(make):
        raise SystemExit("the tokenizer was not made")
    for name, (file, convert) in TASKS.items():
        items = [item for item in lines(args.eval / f"{file}.jsonl.zst") if wanted(name, item)]
        rows = [convert(item) for item in every(items, args.questions)]
        rows = [row for row in rows if len(row["completion"]) < 2000]
        (args.out / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)} questions")


if __name__ == "__main__":
    main()
