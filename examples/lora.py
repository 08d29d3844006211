"""Low-rank adapters (LoRA, with PEFT) for fine-tuning on dialogues, merged into the model at the end.

    python examples/lora.py --model runs/demo/model --data chats.jsonl --out runs/lora

Every linear layer but the output head gets an adapter, k2_proj and v2_proj of 2-simplicial layers included. What is
saved is a plain model without adapters. Without a model or data, a tiny model learns made-up dialogues.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from common import first_and_last, learning_rate, on_this_machine, open_model, save, toy_chats
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from sidlm.post.data import read_chats


@dataclass(frozen=True, kw_only=True)
class Settings:
    model: str | None = None
    """folder of a Sid or Llama model"""
    data: str | None = None
    """.jsonl, .jsonl.zst or .jsonl.gz file of dialogues"""
    out: str = "runs/lora"
    """where the model with its adapters merged goes"""
    rank: int = 16
    """width of the adapters"""
    alpha: float = 32.0
    """an adapter's output counts alpha / rank times"""
    steps: int = 100
    """optimizer steps"""
    batch_size: int = 4
    """rows of max_length tokens in a step"""
    max_length: int = 256
    """tokens in a packed row; longer dialogues are cut"""
    lr: float | None = None
    """peak learning rate; default: 1e-4 for a given model, 1e-2 for the tiny new one"""
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
        learning_rate=learning_rate(settings, trained=1e-4, new=1e-2),
        assistant_only_loss=True,
        packing=True,
        gradient_checkpointing=False,
        logging_steps=1,
        seed=settings.seed,
        **on_this_machine(),
    )
    adapters = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(chats),
        processing_class=tokenizer,
        peft_config=adapters,
    )
    trainer.model.print_trainable_parameters()
    trainer.train()
    print(first_and_last(trainer))
    save(trainer.model.merge_and_unload(), tokenizer, settings.out)
    return trainer


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
