import pytest
from transformers import AutoConfig

from sidlm.models import SidConfig, SidForCausalLM


def test_default_pattern_is_every_fourth_layer():
    types = SidConfig(num_hidden_layers=9).layer_types
    assert [i for i, t in enumerate(types) if t == "simplicial_attention"] == [3, 7]
    assert set(types) == {"full_attention", "simplicial_attention"}


def test_round_trip(tmp_path, config_of, kind):
    config = config_of(kind, num_local_experts=4, num_shared_experts=1, moe_gate="sigmoid")
    config.save_pretrained(tmp_path)
    for again in (SidConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is SidConfig and again.to_diff_dict() == config.to_diff_dict()


def test_sparsity_round_trip(tmp_path, config_of):
    settings = {"mlp_sparsity": "2:4", "mlp_precision": "fp8", "mlp_dense_features": 0.25, "mlp_permute_tokens": False,
                "mlp_reuse_mask": False}  # fmt: skip
    config_of("full", mlp_type="squared_relu", **settings).save_pretrained(tmp_path)
    again = SidConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in settings} == settings
    layer = SidForCausalLM(again).model.layers[0].mlp
    assert {name: getattr(layer, name.removeprefix("mlp_")) for name in settings} == settings


def test_lists_are_not_shared():
    a, b = SidConfig(), SidConfig()
    a.simplicial_window[0] = 3
    a.rope_parameters["rope_theta"] = 1.0
    assert b.simplicial_window == [512, 32] and b.rope_parameters["rope_theta"] == 500_000.0
    mine = {"rope_type": "default", "rope_theta": 2.0}
    SidConfig(rope_parameters=mine).rope_parameters["rope_theta"] = 3.0
    assert mine["rope_theta"] == 2.0


def test_a_tuple_window_is_saved_as_a_list():
    assert SidConfig(simplicial_window=(64, 8)).simplicial_window == [64, 8]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, r"num_attention_heads \(6\).*num_key_value_heads \(4\)"),
        ({"head_dim": 33}, "head_dim must be even.*33"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "layer_types has 1 entries, num_hidden"),
        ({"num_hidden_layers": 1, "layer_types": ["ful_attention"]}, r"layer_types\[0\] must.*'ful_attention'"),
        ({"mlp_type": "gelu"}, "mlp_type must be one of .*'gelu'"),
        ({"mlp_sparsity": "4:8", "mlp_type": "squared_relu"}, "mlp_sparsity must be one of .*'4:8'"),
        ({"mlp_sparsity": "2:4"}, "mlp_sparsity '2:4' needs mlp_type 'squared_relu', got 'swiglu'"),
        ({"mlp_precision": "fp8"}, "mlp_precision 'fp8' needs mlp_type 'squared_relu', got 'swiglu'"),
        ({"mlp_precision": "fp4", "mlp_type": "squared_relu"}, "mlp_precision must be one of .*'fp4'"),
        (
            {"mlp_sparsity": "2:4", "mlp_type": "squared_relu", "num_local_experts": 4},
            "mlp_sparsity '2:4' is for dense feed-forward layers, but num_local_experts is 4",
        ),
        (
            {"mlp_sparsity": "2:4", "mlp_type": "squared_relu", "intermediate_size": 100},
            "intermediate_size must be a multiple of 8 for 2:4 sparsity, got 100",
        ),
        ({"mlp_dense_features": -0.1}, "mlp_dense_features is a share of the features, from 0 to 1, got -0.1"),
        ({"num_local_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok must be in 1\.\.2.*got 3"),
        ({"num_shared_experts": 1}, "num_shared_experts is 1 but num_local_experts is 0"),
        ({"num_local_experts": 4, "moe_gate": "relu"}, "moe_gate must be one of .*'relu'"),
        ({"simplicial_window": [8]}, r"simplicial_window must be two positive numbers \(w1, w2\), got \[8\]"),
        ({"simplicial_window": [8, 0]}, r"simplicial_window must be two positive numbers \(w1, w2\), got \[8, 0\]"),
        ({"simplicial_form": "quad"}, "simplicial_form must be one of .*'quad'"),
        ({"simplicial_position": "alibi"}, "simplicial_position must be one of .*'alibi'"),
        ({"simplicial_position": "rotation"}, "'rotation' needs simplicial_form 'determinant', got 'trilinear'"),
        (
            {"simplicial_position": "rotation", "simplicial_form": "determinant", "simplicial_k2_bias": 0.5},
            "'rotation' needs simplicial_k2_bias 0, got 0.5",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_the_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        SidConfig(**fields)


def test_unknown_rope_type_is_refused_by_the_model(config_of):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValueError, match="rope_type 'yarn' is not implemented"):
        SidForCausalLM(config_of(rope_parameters=rope))
