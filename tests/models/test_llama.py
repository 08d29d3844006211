"""A Llama checkpoint is a Sid checkpoint."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.models import SidConfig, SidForCausalLM


def llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(3)
    fields = {
        "vocab_size": 101, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    } | overrides  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**fields)).eval()


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"head_dim": 16}, {"num_key_value_heads": 6}])
def test_a_llama_folder_loads_with_llamas_logits(tmp_path, ids, overrides):
    reference = llama(**overrides)
    reference.save_pretrained(tmp_path)
    model, info = SidForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokens = ids(2, 70)
    torch.testing.assert_close(model(tokens).logits, reference(tokens).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(tokens, labels=tokens).loss, reference(tokens, labels=tokens).loss)
    kwargs = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(model.generate(tokens[:, :9], **kwargs), reference.generate(tokens[:, :9], **kwargs))
    assert model.config.layer_types == ["full_attention"] * 3 and model.config.mlp_type == "swiglu"
    # and it goes on as a Sid checkpoint
    model.save_pretrained(tmp_path / "sid")
    again = SidForCausalLM.from_pretrained(tmp_path / "sid")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_gradients_are_llamas(tmp_path, ids):
    reference = llama()
    reference.save_pretrained(tmp_path)
    model, tokens = SidForCausalLM.from_pretrained(tmp_path), ids(2, 30)
    for m in (reference, model):
        m(tokens, labels=tokens).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=0, atol=1e-5)


def test_left_padding_is_llamas(tmp_path, ids):
    reference = llama()
    reference.save_pretrained(tmp_path)
    model, tokens = SidForCausalLM.from_pretrained(tmp_path), ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    a, b = model(tokens, attention_mask=mask).logits, reference(tokens, attention_mask=mask).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=0, atol=1e-5)


def test_what_the_file_leaves_out_is_llamas_default():
    config = SidConfig.from_dict({"model_type": "llama", "num_hidden_layers": 2})
    defaults = LlamaConfig()
    assert config.rms_norm_eps == defaults.rms_norm_eps == 1e-6
    assert config.rope_parameters["rope_theta"] == defaults.rope_parameters["rope_theta"] == 10000.0
    assert (config.hidden_size, config.intermediate_size) == (defaults.hidden_size, defaults.intermediate_size)


def test_old_files_with_rope_theta_outside(tmp_path):
    fields = {"model_type": "llama", "num_hidden_layers": 2, "rope_theta": 250000.0, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert SidConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 250000.0


@pytest.mark.parametrize(("field", "value"), [("attention_bias", True), ("mlp_bias", True), ("hidden_act", "gelu")])
def test_a_llama_that_sid_cannot_be_is_refused(field, value):
    with pytest.raises(ValueError, match=f"Llama config: {field} must be .* got {value!r}"):
        SidConfig.from_dict({"model_type": "llama", field: value})
