from __future__ import annotations

import pytest
import torch

from sidlm.data.tokenizer import train_tokenizer
from sidlm.models import SidConfig, SidForCausalLM

TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "def main():\n    return 42\n",
    "Voilà, une phrase en français — déjà vue. Ça va?",
    "数学は楽しい。 😀 emoji",
    "x",
    "",
    "Numbers 1234567890 and punctuation !?;: " * 9,
]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 600)


@pytest.fixture(scope="session")
def model(tokenizer):
    torch.manual_seed(7)
    config = SidConfig(
        vocab_size=tokenizer.vocab_size + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        layer_types=["full_attention", "simplicial_attention"],
        simplicial_window=[8, 4],
        initializer_range=0.3,  # far from uniform, so that a wrong target or a wrong context shows
    )
    return SidForCausalLM(config).float()


@pytest.fixture(scope="session")
def texts():
    return TEXTS
