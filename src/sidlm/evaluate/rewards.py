"""Rewards of a model's own answers, as a distribution.

Benchmarks hide answers that quantisation has corrupted; Llama 3 looks at the scores that a reward model gives to the
answers before and after (arXiv 2407.21783, section 6.2 and figure 26).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sidlm.data.readers import read_lines
from sidlm.errors import SidError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RewardSummary:
    """Scores of the answers to ``prompts`` prompts."""

    prompts: int
    mean: float
    std: float
    quantiles: tuple[float, ...]
    """at 5, 25, 50, 75 and 95 %"""


@dataclass(frozen=True, kw_only=True)
class RewardComparison:
    """Two models' scores. ``distance`` is the Kolmogorov-Smirnov statistic, the largest difference of the two shares
    of answers below a score, and ``p_value`` the chance of so much between samples of one distribution."""

    before: RewardSummary
    after: RewardSummary
    distance: float
    p_value: float


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The "prompt" or "instruction" of each line of a .jsonl, .jsonl.zst or .jsonl.gz file, at most ``limit``.

    Raises SidError naming the file and the line that has neither, and for a file that is missing or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise SidError(f"no such file of prompts: {path}")
    prompts: list[str] = []
    for number, line in read_lines(path):
        if len(prompts) == limit:
            break
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise SidError(f"{path}:{number}: not JSON: {error}") from error
        found = (
            next((item[k] for k in ("prompt", "instruction") if k in item), None) if isinstance(item, dict) else None
        )
        if not isinstance(found, str) or not found.strip():
            raise SidError(f"{path}:{number}: needs the key prompt or instruction with a text")
        prompts.append(found)
    if not prompts:
        raise SidError(f"{path}: no prompts in it")
    return prompts


@torch.no_grad()
def answer_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judge: PreTrainedModel,
    judge_tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    seed: int = 0,
) -> list[float]:
    """The judge's score of an answer that ``model`` samples (temperature 1) to each prompt, a user's message.

    Random numbers begin anew at ``seed`` for each batch, so two models that agree give the same answers. Both
    tokenizers need a chat template. Raises ValueError without one, or without prompts.
    """
    for name, of in (("model", tokenizer), ("reward model", judge_tokenizer)):
        if of.chat_template is None:
            raise ValueError(f"the {name}'s tokenizer has no chat template, so it cannot be asked")
    if not prompts:
        raise ValueError("no prompts to answer")
    scores: list[float] = []
    for begin in range(0, len(prompts), batch_size):
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts[begin : begin + batch_size]]
        answers = _answers(model, tokenizer, asked, max_new_tokens, seed + begin)
        chats = [[*chat, {"role": "assistant", "content": text}] for chat, text in zip(asked, answers, strict=True)]
        judged = _encode(judge_tokenizer, chats, "right").to(judge.device)
        scores += judge(**judged).logits[:, 0].float().tolist()
    return scores


def compare_rewards(before: Sequence[float], after: Sequence[float]) -> RewardComparison:
    """The distributions of two lists of scores."""
    from scipy.stats import ks_2samp

    # the exact form warns about ties, which answers that did not change are
    found: Any = ks_2samp(before, after, method="asymp")
    return RewardComparison(
        before=_summary(before), after=_summary(after), distance=float(found.statistic), p_value=float(found.pvalue)
    )


def _answers(model: Any, tokenizer: Any, chats: list[Any], max_new_tokens: int, seed: int) -> list[str]:
    encoded = _encode(tokenizer, chats, "left", add_generation_prompt=True).to(model.device)
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, *_turn_ends(tokenizer)} - {None}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            **encoded, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=sorted(ends), pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    return tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def _turn_ends(tokenizer: Any) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[name] for name in ("<|eot_id|>", "<|eom_id|>") if name in vocabulary]


def _encode(tokenizer: Any, chats: list[Any], side: str, **kwargs: Any) -> Any:
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        return tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True, **kwargs)
    finally:
        tokenizer.padding_side = before


def _summary(scores: Sequence[float]) -> RewardSummary:
    values = torch.tensor(scores, dtype=torch.float64)
    points = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    return RewardSummary(
        prompts=len(scores),
        mean=math.fsum(scores) / len(scores),
        std=float(values.std(correction=0)),
        quantiles=tuple(values.quantile(points).tolist()),
    )
