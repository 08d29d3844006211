"""The folder that benchmarks/token_efficiency.py reads: tokens to train on, held-out texts and questions as rows.

    python benchmarks/token_data.py --corpus FOLDER --eval FOLDER --out FOLDER [--shards 4] [--questions 100]

tokens.npy: the documents of the shards one behind the other, uint16 by a BPE of 4,096 tokens trained on the first three
(tokenizer-4k). valid.npz, tasks.npz: rows of at most 1,024 tokens, a held-out document or a question each, its group
(the domain or the set of questions), the place from which tokens are scored, and the bytes of what is scored. Of each
set of questions some are taken, evenly spaced, and of their choices the right answer alone: its likelihood is scored.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from sidlm.cli.main import main as sid
from sidlm.data import Tokenizer
from sidlm.data.sources import Document
from sidlm.train.build import choose_documents

LENGTH = 1024


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


def rows_of(items: list[tuple[str, list[int], int, int]]) -> dict[str, Any]:
    """(group, tokens, first scored, bytes scored) of each row as arrays; rows are padded with -1."""
    groups = sorted({group for group, *_ in items})
    width = max(len(tokens) for _, tokens, *_ in items)
    tokens = np.full((len(items), width), -1, np.int16)
    for row, (_, ids, *_) in zip(tokens, items, strict=True):
        row[: len(ids)] = ids
    return {
        "tokens": tokens, "groups": np.array(groups), "group": np.array([groups.index(i[0]) for i in items]),
        "first": np.array([i[2] for i in items]), "bytes": np.array([i[3] for i in items]),
    }  # fmt: skip


def held_out(tokenizer: Tokenizer, path: Path, count: int) -> list[tuple[str, list[int], int, int]]:
    """The first tokens of `count` documents, one domain after the other in turn."""
    documents = choose_documents([Document(x["text"], x["domain"]) for x in lines(path)], count, 8 * LENGTH)
    found = []
    for document, ids in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
        ids = ids[:LENGTH]
        found.append((document.domain, [tokenizer.bos_id, *ids], 1, len(tokenizer.decode(ids).encode())))
    return found


def questions(tokenizer: Tokenizer, folder: Path, count: int) -> list[tuple[str, list[int], int, int]]:
    """Prompts with the right answers, which are scored; those that are longer than a row are left out."""
    found = []
    for name, (file, convert) in TASKS.items():
        items = [item for item in lines(folder / f"{file}.jsonl.zst") if wanted(name, item)]
        for item in map(convert, every(items, count)):
            prompt, answer = tokenizer.encode(item["prompt"]), tokenizer.encode(item["completion"])
            if len(prompt) + len(answer) < LENGTH // 2:
                row = [tokenizer.bos_id, *prompt, *answer]
                found.append((name, row, 1 + len(prompt), len(item["completion"].encode())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--documents", type=int, default=320)
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shards = [args.corpus / f"train-{i:02}.jsonl.zst" for i in range(args.shards)]
    folder = args.out / "tokenizer-4k"
    make = ["tokenizer", "train", *map(str, shards[:3]), "--out", str(folder), "--vocab-size", "4096"]
    if not folder.exists() and sid(make):
        raise SystemExit("the tokenizer was not made")
    tokenizer = Tokenizer.load(folder)
    texts = [item["text"] for shard in shards for item in lines(shard)]
    tokens = [np.array([tokenizer.bos_id, *ids], np.uint16) for ids in tokenizer.encode_batch(texts)]
    np.save(args.out / "tokens.npy", np.concatenate(tokens))
    valid = rows_of(held_out(tokenizer, args.corpus / "valid.jsonl.zst", args.documents))
    asked = rows_of(questions(tokenizer, args.eval, args.questions))
    np.savez_compressed(args.out / "valid.npz", **valid)
    np.savez_compressed(args.out / "tasks.npz", **asked)
    print(f"{sum(map(len, tokens)):,} tokens of {len(texts):,} documents")
    for rows in (valid, asked):
        print({g: int((rows["group"] == i).sum()) for i, g in enumerate(rows["groups"])})


if __name__ == "__main__":
    main()
