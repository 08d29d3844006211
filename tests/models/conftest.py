import pytest
import torch

from sidlm.models import SidConfig, SidForCausalLM

KINDS = {
    "full": {"layer_types": ["full_attention"] * 3},
    "sliding": {"layer_types": ["sliding_attention"] * 3},
    "trilinear": {"layer_types": ["simplicial_attention"] * 3},
    "no_norm": {
        "layer_types": ["simplicial_attention"] * 3,
        "simplicial_qk_norm": False,
        "simplicial_position": "none",
    },
    "determinant": {
        "layer_types": ["simplicial_attention"] * 3,
        "simplicial_form": "determinant",
        "simplicial_position": "rotation",
        "simplicial_k2_bias": 0.0,
    },
    "mixed": {"layer_types": ["full_attention", "simplicial_attention", "sliding_attention"]},
}


def tiny_config(kind: str = "mixed", **overrides) -> SidConfig:
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "simplicial_window": [7, 4],
        "sliding_window": 6,
        "max_position_embeddings": 128,
        # large enough that a token out of place moves the logits visibly
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return SidConfig(**(fields | KINDS[kind] | overrides))


def tiny_model(kind: str = "mixed", seed: int = 0, **overrides) -> SidForCausalLM:
    torch.manual_seed(seed)
    return SidForCausalLM(tiny_config(kind, **overrides)).eval()


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


@pytest.fixture
def config_of():
    return tiny_config


@pytest.fixture
def model_of():
    return tiny_model


@pytest.fixture
def ids():
    """(batch, length, seed) -> token ids that are none of the special ones."""

    def build(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))

    return build
