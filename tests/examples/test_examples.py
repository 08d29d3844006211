"""Each script improves a Sid model with a 2-simplicial layer and squared ReLU in a few steps."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from sidlm.errors import SidError


def logged(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def drop(values, count=3):
    """Mean of the first values minus mean of the last."""
    return sum(values[:count]) / count - sum(values[-count:]) / count


def is_sid(model):
    config = model.config
    return "simplicial_attention" in config.layer_types and config.mlp_type == "squared_relu"


@pytest.fixture
def jsonl(tmp_path):
    def write(name, items):
        path = tmp_path / name
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        return path

    return write


def test_sft(example, tmp_path):
    trainer = example("sft", "--steps", 8, "--out", tmp_path / "sft")
    assert is_sid(trainer.model) and drop(logged(trainer, "loss")) > 0.6
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch  # packed rows: documents are told by position_ids
    trained = batch["input_ids"][batch["labels"] != -100]
    text = trainer.processing_class.decode(trained)
    assert "Say" not in text and "user" not in text and text.count("<|eot_id|>") == text.count(".")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)
    assert len(saved.generation_config.eos_token_id) == 2


def test_sft_on_a_folder_and_a_file_of_instructions_then_dpo(example, jsonl, tmp_path):
    chats = jsonl("chats.jsonl", [{"instruction": f"Count {i}", "output": "one two three"} for i in range(16)])
    example("sft", "--steps", 1, "--out", tmp_path / "a")
    again = example(
        "sft", "--model", tmp_path / "a", "--data", chats, "--steps", 4, "--lr", 1e-3, "--out", tmp_path / "b"
    )
    losses = logged(again, "loss")
    assert losses[-1] < losses[0]
    pairs = jsonl("pairs.jsonl", [{"prompt": f"Count {i}", "chosen": "one", "rejected": "none"} for i in range(16)])
    words = ("--model", tmp_path / "b", "--data", pairs, "--steps", 4, "--out", tmp_path / "c", "--limit", 12)
    # and a trained model is not overrun: without --lr it gets Llama 3's rate
    gently = example("dpo", *words)
    assert gently.args.learning_rate == 1e-5
    assert logged(example("dpo", *words, "--lr", 1e-3), "loss")[-1] < logged(gently, "loss")[-1]
    with pytest.raises(SidError, match=r"chats\.jsonl:1: needs the keys prompt, chosen and rejected; it has instr"):
        example("dpo", "--model", tmp_path / "b", "--data", chats, "--out", tmp_path / "d")


def test_lora_is_merged(example, tmp_path):
    trainer = example("lora", "--steps", 8, "--out", tmp_path / "lora")
    assert drop(logged(trainer, "loss")) > 0.6
    adapted = trainer.model.eval()
    assert not any("lora" in name for name, _ in adapted.base_model.model.model.layers[0].mlp.named_parameters())
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert is_sid(saved) and not any("lora" in name for name, _ in saved.named_parameters())
    first, _ = example.module("common").toy_model(0)
    weights = first.state_dict()
    moved = {name for name, weight in saved.state_dict().items() if not torch.equal(weight, weights[name])}
    for name in ("q_proj", "k2_proj", "v2_proj"):
        assert f"model.layers.1.self_attn.{name}.weight" in moved
    assert "model.layers.1.mlp.up_proj.weight" in moved and "lm_head.weight" not in moved


def test_dpo(example, tmp_path):
    trainer = example("dpo", "--steps", 8, "--out", tmp_path / "dpo")
    assert is_sid(trainer.model) and drop(logged(trainer, "loss")) > 0.2
    assert logged(trainer, "rewards/margins")[0] == 0 and logged(trainer, "rewards/margins")[-1] > 0.3
    assert drop(logged(trainer, "nll_loss")) > 0.2


def test_reward_then_grpo_with_it(example, tmp_path):
    trainer = example("reward", "--steps", 8, "--out", tmp_path / "reward")
    assert is_sid(trainer.model) and drop(logged(trainer, "loss")) > 0.2
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").num_labels == 1
    words = ("--reward", tmp_path / "reward", "--steps", 1, "--out", tmp_path / "grpo")
    assert len(logged(example("grpo", *words), "reward")) == 1


def test_grpo(example, tmp_path):
    trainer = example("grpo", "--steps", 10, "--out", tmp_path / "grpo")
    assert is_sid(trainer.model) and drop(logged(trainer, "reward"), 4) < -0.08
