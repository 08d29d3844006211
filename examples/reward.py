"""A reward model from a language model: its head is replaced by one score, trained on pairs of answers.

    python examples/reward.py --model runs/sft --data preferences.jsonl --out runs/reward

The loss is -log sigmoid(score of chosen - score of rejected), without a margin, as in Llama 3 (section 4.1.2). A line
of the data is {prompt, chosen, rejected}. Without a model or data, a tiny model learns made-up preferences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from common import first_and_last, learning_rate, on_this_machine, open_tokenizer, save, toy_model, toy_preferences
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from sidlm.models import SidForSequenceClassification
from sidlm.post.data import read_preferences


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str | None = None
    """folder of a Sid or Llama language model"""
    data: str | None = None
    """.jsonl, .jsonl.zst or .jsonl.gz file of preferences"""
    out: str = "runs/reward"
    """where the reward model goes"""
    steps: int = 100
    """optimizer steps"""
    batch_size: int = 8
    """pairs in a step"""
    max_length: int = 256
    """tokens of a prompt with an answer; longer pairs are left out"""
    lr: float | None = None
    """peak learning rate; default: 1e-5 for a given model, 1e-3 for the tiny new one"""
    limit: int | None = None
    """read no more lines than this"""
    seed: int = 0


def main(settings: Settings) -> RewardTrainer:
    torch.manual_seed(settings.seed)  # of the new head
    if settings.model is None:
        language, tokenizer = toy_model(settings.seed)
        language.config.num_labels = 1
        model = SidForSequenceClassification(language.config)
        model.model.load_state_dict(language.model.state_dict())
    else:
        model = SidForSequenceClassification.from_pretrained(settings.model, num_labels=1, dtype=torch.float32)
        tokenizer = open_tokenizer(settings.model)
    pairs = read_preferences(settings.data, settings.limit) if settings.data else toy_preferences(256)
    config = RewardConfig(
        output_dir=settings.out,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_length=settings.max_length,
        learning_rate=learning_rate(settings, trained=1e-5, new=1e-3),
        gradient_checkpointing=False,
        logging_steps=1,
        seed=settings.seed,
        **on_this_machine(),
    )
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    trainer.train()
    for name in ("loss", "accuracy"):
        print(first_and_last(trainer, name))
    save(trainer.model, tokenizer, settings.out)
    return trainer


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
