import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sidlm.models import SidForCausalLM, forward_flops_per_token, num_parameters, preset, train_flops_per_token
from sidlm.models.flops import visible_keys
from sidlm.ops.simplicial.flops import visible_pairs


@pytest.mark.parametrize("seq_len", [1, 2, 5, 7, 8, 40])
@pytest.mark.parametrize(("w1", "w2"), [(1, 1), (7, 3), (3, 7), (5, 5), (64, 8), (1, 9)])
def test_visible_counts_are_the_sums_they_name(seq_len, w1, w2):
    assert visible_pairs(seq_len, (w1, w2)) == sum(min(i + 1, w1) * min(i + 1, w2) for i in range(seq_len))
    assert visible_keys(seq_len, w1) == sum(min(i + 1, w1) for i in range(seq_len))
    assert visible_keys(seq_len) == seq_len * (seq_len + 1) // 2


@pytest.mark.parametrize("overrides", [{}, {"mlp_type": "squared_relu"}, {"tie_word_embeddings": True}])
def test_matrix_products_are_those_torch_counts(config_of, overrides):
    config = config_of("full", **overrides)
    with torch.device("meta"):
        model, tokens = SidForCausalLM(config), torch.zeros(1, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, use_cache=False)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    core = 4 * 12 * 4 * 3 * visible_keys(16) / 16
    assert forward_flops_per_token(config, 16) == pytest.approx(counted / 16 + core)


def test_llama_8b_is_about_six_times_its_parameters():
    config = preset("8b", arch="llama")
    weights = num_parameters(config) - config.vocab_size * config.hidden_size
    core = 3 * 4 * 128 * 32 * 32 * (8192 + 1) / 2
    norms = 65 * 4096
    assert train_flops_per_token(config, 8192) == pytest.approx(6 * (weights - norms) + core)


def test_each_kind_of_layer(config_of):
    def core(kind, **kwargs):
        # what attention adds to the same layer at a length of one
        config = config_of(kind, num_hidden_layers=1, **kwargs)
        return [f(config, 32) - f(config, 1) for f in (forward_flops_per_token, train_flops_per_token)]

    per = 4 * 12 * 4
    keys, pairs = visible_keys(32, 6) / 32 - 1, visible_pairs(32, (7, 4)) / 32 - 1
    assert core("sliding", layer_types=["sliding_attention"]) == pytest.approx([per * keys, 3 * per * keys])
    assert core("trilinear", layer_types=["simplicial_attention"]) == pytest.approx([per * pairs, 4 * per * pairs])


def test_only_active_experts_count(config_of):
    few, many = (config_of("full", num_local_experts=n, num_experts_per_tok=2) for n in (4, 8))
    router = 2 * 3 * 48 * 4
    assert forward_flops_per_token(many, 8) - forward_flops_per_token(few, 8) == router
    dense = config_of("full", intermediate_size=3 * 64)
    sparse = config_of("full", num_local_experts=4, num_shared_experts=1)
    assert forward_flops_per_token(sparse, 8) - forward_flops_per_token(dense, 8) == router


@pytest.mark.parametrize("gated", ["swiglu", "squared_relu"])
def test_parameters_of_experts(config_of, kind, gated):
    config = config_of(kind, num_local_experts=4, num_shared_experts=2, moe_intermediate_size=24, mlp_type=gated)
    assert num_parameters(config) == sum(p.numel() for p in SidForCausalLM(config).parameters())
