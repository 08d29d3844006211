"""Question files as the records of our own harness tasks (harness_tasks/*.yaml)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sidlm.data.readers import read_lines
from sidlm.errors import SidError
from sidlm.evaluate.tasks import right_choice

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _text(item: dict[str, Any], key: str) -> str:
    if not isinstance(item[key], str) or not item[key].strip():
        raise ValueError(f"{key!r} must be a text, got {json.dumps(item[key])[:40]}")
    return item[key]


def _open(item: dict[str, Any]) -> dict[str, Any]:
    return {"question": _text(item, "question"), "answer": _text(item, "answer")}


def _choice(item: dict[str, Any]) -> dict[str, Any]:
    choices = item["choices"]
    if not isinstance(choices, list) or not 1 <= len(choices) <= len(LETTERS):
        # some questions of MMLU-Pro have a single one
        raise ValueError(f"'choices' must be a list of 1 to {len(LETTERS)} texts")
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError("'choices' must be texts")
    answers = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    answer = right_choice(item["answer"], choices)
    return {"question": _text(item, "question"), "choices": choices, "answers": answers, "answer": answer}


def _program(item: dict[str, Any]) -> dict[str, Any]:
    tests = item["test_list"]
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise ValueError("'test_list' must be a list of texts")
    # MBPP's programs have Windows' line ends in places; no model writes them
    code = _text(item, "code").replace("\r\n", "\n").strip("\n")
    return {"text": _text(item, "text"), "tests": "\n".join(tests), "code": code}


RECORDS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "gsm8k": _open,
    "mmlu": _choice,
    "mmlu_pro": _choice,
    "mbpp": _program,
}
"""task -> what makes a record of a line; KeyError or ValueError if it cannot"""


def write_records(path: str, task: str, to: Path) -> int:
    """Write the lines of a .jsonl, .jsonl.zst or .jsonl.gz file as records of ``task``; returns how many.

    Raises SidError naming the file and the line of a malformed one, and for a file that is missing or empty.
    """
    if not Path(path).is_file():
        raise SidError(f"no such task file: {path}")
    records = []
    for number, line in read_lines(Path(path)):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if not isinstance(item, dict):
                raise ValueError(f"a line must be a JSON object, got {type(item).__name__}")
            records.append(json.dumps(RECORDS[task](item)))
        except KeyError as error:
            raise SidError(
                f"{path}:{number}: task {task} needs the key {error}; the line has {', '.join(item)}"
            ) from error
        except UnicodeDecodeError as error:
            raise SidError(f"{path}:{number}: not UTF-8 text: {error.reason}") from error
        except ValueError as error:
            raise SidError(f"{path}:{number}: {error}") from error
    if not records:
        raise SidError(f"{path}: no questions in it")
    to.write_text("\n".join(records) + "\n", encoding="utf-8")
    return len(records)
