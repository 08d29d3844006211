"""What the scripts of this folder share: opening a model, and something small to train on where nothing is given."""

from __future__ import annotations

import random
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sidlm.data.tokenizer import train_tokenizer
from sidlm.models import SidConfig, SidForCausalLM

# for folders that have none; what the assistant says is marked for the loss
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
WORDS = ["red", "green", "blue", "small", "big", "old", "new", "cat", "dog", "bird", "tree", "house", "river", "road"]


def open_model(folder: str | None, seed: int = 0) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder, Sid's or Llama's; without one a tiny new model with a 2-simplicial layer."""
    if folder is None:
        return toy_model(seed)
    tokenizer = open_tokenizer(folder)
    # a Llama folder too: SidForCausalLM reads it as it is; steps of 1e-5 would be lost in bfloat16 weights
    return ends_turns(SidForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer), tokenizer


def open_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.chat_template is None:
        # a rendered chat is text: its control tokens must be seen in it
        tokenizer = AutoTokenizer.from_pretrained(folder, split_special_tokens=False)
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def ends_turns(model: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, whose generation ends at the end of a turn, too, as the template writes it."""
    eot = tokenizer.get_vocab().get("<|eot_id|>", tokenizer.eos_token_id)
    model.generation_config.eos_token_id = sorted({eot, tokenizer.eos_token_id})
    return model


def save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learning_rate(settings: Any, *, trained: float, new: float) -> float:
    """--lr if it is given; a trained model would not survive the rate at which a tiny new one learns in a few steps."""
    return settings.lr if settings.lr is not None else trained if settings.model else new


def on_this_machine() -> dict[str, Any]:
    """Arguments of any of TRL's configs: bf16 on a GPU, float32 without one; nothing is sent anywhere."""
    gpu = torch.cuda.is_available()
    return {"use_cpu": not gpu, "bf16": gpu, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def first_and_last(trainer: Any, name: str = "loss") -> str:
    """How a logged number went."""
    values = [float(entry[name]) for entry in trainer.state.log_history if name in entry]
    return f"{name} {values[0]:.4f} -> {values[-1]:.4f} in {trainer.state.global_step} steps"


def toy_model(seed: int = 0) -> tuple[SidForCausalLM, PreTrainedTokenizerBase]:
    texts = [message["content"] for chat in toy_chats(64) for message in chat["messages"]]
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(texts, 384, num_special=32).save(folder)
        tokenizer = open_tokenizer(folder)
    torch.manual_seed(seed)
    config = SidConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["full_attention", "simplicial_attention"],
        simplicial_window=[16, 8],
        mlp_type="squared_relu",
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ends_turns(SidForCausalLM(config), tokenizer), tokenizer


def toy_chats(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Dialogues in which the user asks for words and gets them twice."""
    rng = random.Random(seed)
    chats = []
    for _ in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        chats.append({"messages": [_message("user", f"Say {words}"), _message("assistant", f"{words}, {words}.")]})
    return chats


def toy_preferences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts whose chosen answer does what was asked, and whose rejected one says something else."""
    rng = random.Random(seed)
    pairs = []
    for chat in toy_chats(count, seed):
        ask, right = chat["messages"]
        wrong = " ".join(rng.choices(WORDS, k=rng.randint(1, 4)))
        pairs.append({"prompt": [ask], "chosen": [right], "rejected": [_message("assistant", f"No {wrong}!")]})
    return pairs


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
