"""Direct preference optimisation with Llama 3's loss (sidlm.post.preference), on answers chosen and rejected.

    python examples/dpo.py --model runs/sft --data preferences.jsonl --out runs/dpo

A line of the data is {prompt, chosen, rejected}, texts or lists of messages. Start from a model that was fine-tuned on
dialogues; it is the reference, too. Without a model or data, a tiny model learns made-up preferences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import tyro
from common import first_and_last, learning_rate, on_this_machine, open_model, save, toy_preferences
from datasets import Dataset
from trl import DPOConfig

from sidlm.post.data import read_preferences
from sidlm.post.preference import Llama3DPOTrainer


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str | None = None
    """folder of a Sid or Llama model"""
    data: str | None = None
    """.jsonl, .jsonl.zst or .jsonl.gz file of preferences"""
    out: str = "runs/dpo"
    """where the trained model goes"""
    steps: int = 100
    """optimizer steps"""
    batch_size: int = 8
    """pairs in a step"""
    max_length: int = 256
    """tokens of a prompt with an answer; what is longer is cut"""
    lr: float | None = None
    """peak learning rate; default: 1e-5 for a given model (Llama 3, section 4.1.4), 1e-3 for the tiny new one"""
    beta: float = 0.1
    """how far the policy may go from the reference: less is further"""
    nll_weight: float = 0.2
    """weight of the chosen answers' likelihood"""
    limit: int | None = None
    """read no more lines than this"""
    seed: int = 0


def main(settings: Settings) -> Llama3DPOTrainer:
    model, tokenizer = open_model(settings.model, settings.seed)
    pairs = read_preferences(settings.data, settings.limit) if settings.data else toy_preferences(256)
    config = DPOConfig(
        output_dir=settings.out,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_length=settings.max_length,
        learning_rate=learning_rate(settings, trained=1e-5, new=1e-3),
        beta=settings.beta,
        gradient_checkpointing=False,
        logging_steps=1,
        seed=settings.seed,
        **on_this_machine(),
    )
    trainer = Llama3DPOTrainer(
        model=model,
        ref_model=copy.deepcopy(model),
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        nll_weight=settings.nll_weight,
    )
    trainer.train()
    for name in ("loss", "rewards/margins", "nll_loss"):
        print(first_and_last(trainer, name))
    save(trainer.model, tokenizer, settings.out)
    return trainer


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
