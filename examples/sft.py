"""Supervised fine-tuning on dialogues with TRL: only what the assistant says is trained, rows are packed.

    python examples/sft.py --model runs/demo/model --data chats.jsonl --out runs/sft

A line of the data is {messages}, {instruction, output} or {prompt, completion}. Without a model or data, a tiny model
learns made-up dialogues. Packed dialogues do not see each other: Sid reads the restarts of the position ids.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from common import first_and_last, learning_rate, on_this_machine, open_model, save, toy_chats
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from sidlm.post.data import read_chats


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str | None = None
    """folder of a Sid or Llama model"""
    data: str | None = None
    """.jsonl, .jsonl.zst or .jsonl.gz file of dialogues"""
    out: str = "runs/sft"
    """where the trained model goes"""
    steps: int = 100
    """optimizer steps"""
    batch_size: int = 4
    """rows of max_length tokens in a step"""
    max_length: int = 256
    """tokens in a packed row; longer dialogues are cut"""
    lr: float | None = None
    """peak learning rate; default: 1e-5 for a given model (Llama 3, section 4.1.3), 1e-3 for the tiny new one"""
    limit: int | None = None
    """read no more lines than this"""
    seed: int = 0


def main(settings: Settings) -> SFTTrainer:
    model, tokenizer = open_model(settings.model, settings.seed)
    chats = read_chats(settings.data, settings.limit) if settings.data else toy_chats(256)
    config = SFTConfig(
        output_dir=settings.out,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_length=settings.max_length,
        learning_rate=learning_rate(settings, trained=1e-5, new=1e-3),
        lr_scheduler_type="cosine",
        assistant_only_loss=True,
        # not "wrapped", which joins dialogues without a boundary that any model could see
        packing=True,
        packing_strategy="bfd",
        gradient_checkpointing=False,
        logging_steps=1,
        seed=settings.seed,
        **on_this_machine(),
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=Dataset.from_list(chats), processing_class=tokenizer)
    trainer.train()
    print(first_and_last(trainer))
    save(trainer.model, tokenizer, settings.out)
    return trainer


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
