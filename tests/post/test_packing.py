"""Rows packed by TRL: dialogues in one row do not see each other, whatever the collator puts beside them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer

COUNT = 24


@pytest.fixture
def trainer_of(common, tmp_path):
    def build(**config):
        model, tokenizer = common.toy_model(0)
        args = SFTConfig(
            str(tmp_path), per_device_train_batch_size=64, gradient_checkpointing=False, assistant_only_loss=True,
            **{"max_length": 128} | config, **common.on_this_machine(),
        )  # fmt: skip
        data = Dataset.from_list(common.toy_chats(COUNT))
        return SFTTrainer(model=model.double(), args=args, train_dataset=data, processing_class=tokenizer)

    return build


def separate(model, rows):
    """Mean loss over the labels of rows that are run alone."""
    total = count = 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            labels[:, 0] = -100
            logits = model(ids).logits[0, :-1]
            total += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
            count += int((labels[0, 1:] != -100).sum())
    return total / count


def loss_of(trainer, batch):
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch)).item()


@pytest.mark.parametrize(
    "config",
    [{"packing": True}, {"packing": True, "pad_to_multiple_of": 64}, {"padding_free": True, "max_length": None}],
)
def test_packed_is_separate(trainer_of, config):
    alone = trainer_of()
    want = separate(alone.model, alone.train_dataset)
    trainer = trainer_of(**config)
    (batch,) = trainer.get_train_dataloader()
    assert "attention_mask" not in batch and {"position_ids", "seq_idx"} <= set(batch)
    assert int((batch["position_ids"] == 0).sum()) >= COUNT
    got = loss_of(trainer, batch)
    assert got == pytest.approx(want, rel=1e-6)
    # an all-ones mask beside them, as other collators add it, does not join the dialogues
    ones = torch.ones_like(batch["input_ids"])
    assert loss_of(trainer, {**batch, "attention_mask": ones}) == pytest.approx(got, rel=1e-9)
    # without the restarts of positions they are joined, and the loss is another one
    growing = torch.arange(batch["input_ids"].shape[1])[None]
    joined = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": growing}
    assert abs(loss_of(trainer, joined) - want) > 1e-4


def test_padded_rows_are_separate_too(trainer_of):
    trainer = trainer_of()
    (batch,) = trainer.get_train_dataloader()
    assert loss_of(trainer, batch) == pytest.approx(separate(trainer.model, trainer.train_dataset), rel=1e-6)


def test_transformers_own_flattening(trainer_of):
    trainer = trainer_of()
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset]
    batch = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)(rows)
    assert loss_of(trainer, batch) == pytest.approx(separate(trainer.model, trainer.train_dataset), rel=1e-6)
