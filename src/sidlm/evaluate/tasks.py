"""Negative log-likelihood of answers on question files, and accuracy where there are choices.

At small scale accuracy is chance on most benchmarks while the likelihood of the right answer already moves, which is
why the 2-simplicial paper reports it (arXiv 2507.02754, table 2) and Llama 3 forecasts from it (arXiv 2407.21783,
section 3.2.1).
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sidlm.errors import SidError
from sidlm.evaluate.nll import Span, span_nll

if TYPE_CHECKING:
    from sidlm.data.tokenizer import Tokenizer
    from sidlm.models.modeling import SidForCausalLM


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its possible answers; an open question has one. ``where`` is "file:line" for error messages."""

    prompt: str
    answers: tuple[str, ...]
    right: int
    where: str


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Scores of one task. ``nll`` is the mean over questions of the right answer's summed NLL in nats;
    per token and per byte are sums over sums. Accuracies and their 95% half-widths are None without choices:
    ``accuracy`` takes the answer of least NLL, ``accuracy_per_byte`` of least NLL per UTF-8 byte of the answer."""

    questions: int
    tokens: int
    bytes: int
    nll: float
    nll_per_token: float
    nll_per_byte: float
    cut: int
    accuracy: float | None = None
    accuracy_ci95: float | None = None
    accuracy_per_byte: float | None = None
    accuracy_per_byte_ci95: float | None = None
    chance: float | None = None


def _lines(path: Path) -> Iterator[bytes]:
    if not path.is_file():
        raise SidError(f"no such task file: {path}")
    with path.open("rb") as raw:
        if path.suffix == ".zst":
            import zstandard

            try:
                yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
            except zstandard.ZstdError as error:
                raise SidError(f"{path}: not a readable zstd file: {error}") from error
        else:
            yield from raw


def right_choice(answer: Any, choices: Sequence[str]) -> int:
    """Index of the right choice, from its index, its text or its letter."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer < len(choices):
            raise ValueError(f"answer index {answer} is outside its {len(choices)} choices")
        return answer
    if not isinstance(answer, str):
        raise ValueError(f"answer must be an index, a letter or a choice's text, got {answer!r}")
    texts = [i for i, choice in enumerate(choices) if choice == answer]
    letters = [i for i in range(len(choices)) if chr(ord("A") + i) == answer]
    found = set(texts + letters)
    if not found:
        raise ValueError(f"answer {answer!r} is neither one of the {len(choices)} choices nor a letter for one")
    if len(found) > 1:
        raise ValueError(f"answer {answer!r} fits choices {sorted(found)}; give the index")
    return found.pop()


def _text(item: dict[str, Any], key: str) -> str:
    value = item[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, got {type(value).__name__}")
    return value


def _question(item: Any, where: str) -> Question:
    if not isinstance(item, dict):
        raise ValueError(f"a line must be a JSON object, got {type(item).__name__}")
    if "prompt" in item and "completion" in item:
        prompt, answers, right = _text(item, "prompt"), (_text(item, "completion"),), 0
    else:
        # the lm-eval exports call the same fields query and gold
        ask = next((key for key in ("question", "query") if key in item), None)
        answer = next((key for key in ("answer", "gold") if key in item), None)
        if ask is None or answer is None:
            raise ValueError(
                "needs the keys question, choices and answer, or prompt and completion; it has "
                + (", ".join(map(str, item)) or "none")
            )
        text = _text(item, ask)
        prompt = (text if text.startswith("Question:") else f"Question: {text}") + "\nAnswer:"
        if "choices" in item:
            choices = item["choices"]
            if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
                raise ValueError("'choices' must be a list of two or more strings")
            right = right_choice(item[answer], choices)
            answers = tuple(" " + choice for choice in choices)
        else:
            answers, right = (" " + _text(item, answer),), 0
    if not all(answer.strip() for answer in answers):
        raise ValueError("an answer is empty")
    # JSON can spell half a surrogate pair, which no UTF-8 text has: refuse it here, where the line is known
    "".join((prompt, *answers)).encode()
    return Question(prompt=prompt, answers=answers, right=right, where=where)


def read_task(path: str | Path) -> list[Question]:
    """Questions of a ``.jsonl`` or ``.jsonl.zst`` file.

    A line is ``{"question", "choices", "answer"}`` (answer: index from 0, letter from A, or a choice's text),
    ``{"question", "answer"}`` with an answer in words, or ``{"prompt", "completion"}``, which are taken as they are.
    Raises SidError naming the file and the line of a malformed item, and for a file that is missing or empty.
    """
    path = Path(path)
    questions = []
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                questions.append(_question(json.loads(line), f"{path}:{number}"))
    except json.JSONDecodeError as error:
        raise SidError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise SidError(f"{path}:{number}: not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        raise SidError(f"{path}:{number}: {error}") from error
    if not questions:
        raise SidError(f"{path}: no questions in it")
    return questions


def _spans(
    tokenizer: Tokenizer, questions: Sequence[Question], max_len: int
) -> tuple[list[Span], list[int], list[int]]:
    """Spans of every answer, question after question, with tokens per answer, and how many prompts were cut.

    Prompt and answer are encoded apart. Encoding them together could merge a token over the boundary, and then the
    scored tokens would hold part of the prompt, or differ between the choices' prompts. With an answer that begins
    with a space the two agree for byte-level BPE, which starts a new piece there anyway.
    """
    prompts = tokenizer.encode_batch([question.prompt for question in questions])
    flat = tokenizer.encode_batch([answer for question in questions for answer in question.answers])
    spans, lengths, cut = [], [], []
    answers = iter(flat)
    for question, prompt in zip(questions, prompts, strict=True):
        own = [next(answers) for _ in question.answers]
        longest = max(map(len, own))
        if longest + 1 > max_len:
            raise SidError(f"{question.where}: an answer of {longest} tokens does not fit in {max_len}")
        # all choices of a question get the same prompt: cut on the left, by the longest of them
        room = max_len - 1 - longest
        kept = prompt[len(prompt) - room :] if len(prompt) > room else prompt
        cut.append(int(len(kept) < len(prompt)))
        for answer in own:
            context = [tokenizer.bos_id, *kept]
            spans.append(Span([*context, *answer], len(context)))
            lengths.append(len(answer))
    return spans, lengths, cut


def _rate(hits: int, total: int) -> tuple[float, float]:
    """A proportion and the half-width of its 95% interval, 1.96 sqrt(S (1 - S) / N) (Llama 3, section 5.1)."""
    share = hits / total
    return share, 1.96 * math.sqrt(share * (1 - share) / total)


def score_task(
    model: SidForCausalLM,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    batch_size: int = 8,
    max_len: int | None = None,
) -> TaskResult:
    """NLL of every answer's tokens given BOS and its prompt, and accuracy over the questions that have choices.

    ``max_len`` (default: the model's ``max_position_embeddings``) bounds BOS + prompt + answer in tokens; a longer
    prompt loses its beginning, counted in ``TaskResult.cut``. Raises SidError for an answer that does not fit.
    """
    max_len = max_len or model.config.max_position_embeddings
    spans, lengths, cut = _spans(tokenizer, questions, max_len)
    nlls = span_nll(model, spans, batch_size=batch_size)
    tokens = size = chosen = hits = hits_per_byte = 0
    nll, chance, begin = 0.0, 0.0, 0
    for question in questions:
        end = begin + len(question.answers)
        own, sizes = nlls[begin:end], [len(answer.encode()) for answer in question.answers]
        nll += own[question.right]
        tokens += lengths[begin + question.right]
        size += sizes[question.right]
        if len(own) > 1:
            chosen += 1
            chance += 1 / len(own)
            hits += own.index(min(own)) == question.right
            rates = [value / length for value, length in zip(own, sizes, strict=True)]
            hits_per_byte += rates.index(min(rates)) == question.right
        begin = end
    rates = {}
    if chosen:
        rates["accuracy"], rates["accuracy_ci95"] = _rate(hits, chosen)
        rates["accuracy_per_byte"], rates["accuracy_per_byte_ci95"] = _rate(hits_per_byte, chosen)
        rates["chance"] = chance / chosen
    return TaskResult(
        questions=len(questions),
        tokens=tokens,
        bytes=size,
        nll=nll / len(questions),
        nll_per_token=nll / tokens,
        nll_per_byte=nll / size,
        cut=sum(cut),
        **rates,
    )
