"""Reinforcement learning with GRPO: answers are scored, those better than their group's mean become likelier.

    python examples/grpo.py --model runs/sft --data chats.jsonl --reward runs/reward --out runs/grpo

The score is a reward model's, or, without one, how much of what the user asked for the answer says: a rule that fits
the made-up dialogues. Of the data only what precedes the last answer is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from common import first_and_last, learning_rate, on_this_machine, open_model, open_tokenizer, save, toy_chats
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from sidlm.models import SidForSequenceClassification
from sidlm.post.data import read_chats


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str | None = None
    """folder of a Sid or Llama model"""
    data: str | None = None
    """.jsonl, .jsonl.zst or .jsonl.gz file of dialogues"""
    reward: str | None = None
    """folder of a reward model (examples/reward.py)"""
    out: str = "runs/grpo"
    """where the trained model goes"""
    steps: int = 50
    """optimizer steps"""
    batch_size: int = 32
    """answers in a step"""
    group: int = 8
    """answers to one prompt"""
    max_tokens: int = 16
    """longest answer"""
    lr: float | None = None
    """peak learning rate; default: 1e-6 for a given model, 1e-2 for the tiny new one"""
    beta: float = 0.0
    """weight of the divergence from the first model"""
    limit: int | None = None
    """read no more lines than this"""
    seed: int = 0


def said_what_was_asked(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
    """Share of an answer's characters that stand in the last word asked for, up to its length."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        word, answer = prompt[-1]["content"].split()[-1], completion[0]["content"]
        rewards.append(sum(letter in word for letter in answer) / max(len(answer), len(word)))
    return rewards


def main(settings: Settings) -> GRPOTrainer:
    model, tokenizer = open_model(settings.model, settings.seed)
    chats = read_chats(settings.data, settings.limit) if settings.data else toy_chats(256)
    prompts = [{"prompt": chat["messages"][:-1]} for chat in chats]
    scored = {}
    if settings.reward:
        judge = SidForSequenceClassification.from_pretrained(settings.reward).eval()
        scored = {"reward_processing_classes": open_tokenizer(settings.reward)}
    config = GRPOConfig(
        output_dir=settings.out,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        num_generations=settings.group,
        max_completion_length=settings.max_tokens,
        learning_rate=learning_rate(settings, trained=1e-6, new=1e-2),
        beta=settings.beta,
        gradient_checkpointing=False,
        logging_steps=1,
        seed=settings.seed,
        **on_this_machine(),
    )
    torch.manual_seed(settings.seed)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=judge if settings.reward else said_what_was_asked,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=tokenizer,
        **scored,
    )
    trainer.train()
    print(first_and_last(trainer, "reward"))
    save(trainer.model, tokenizer, settings.out)
    return trainer


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
