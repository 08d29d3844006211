from __future__ import annotations

import pytest
import torch

from sidlm.data.tokenizer import Tokenizer, train_tokenizer
from sidlm.models import SidConfig, SidForCausalLM

TEXT = 'user assistant system the cat sees a small old red house; naïve café 数学 🎉 {"name": "f"} 12 34\n'


def tiny_model(tokenizer: Tokenizer, **overrides) -> SidForCausalLM:
    fields = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["full_attention", "simplicial_attention", "sliding_attention"],
        "simplicial_window": [7, 4],
        "sliding_window": 6,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    torch.manual_seed(0)
    return SidForCausalLM(SidConfig(**(fields | overrides))).eval()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 5], 330, num_special=16)


@pytest.fixture(scope="session")
def model(tokenizer) -> SidForCausalLM:
    return tiny_model(tokenizer)
