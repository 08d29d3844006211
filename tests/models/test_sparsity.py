"""Models with 2:4 sparse feed-forward layers: checkpoints, loading, generation, training mode, FLOPs."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from sidlm.models import SidForCausalLM, train_flops_per_token

DENSE = {"mlp_type": "squared_relu", "intermediate_size": 192}
SPARSE = DENSE | {"mlp_sparsity": "2:4"}


def mlps(model):
    return [layer.mlp for layer in model.model.layers]


def gradients(model, tokens):
    model.zero_grad()
    model(tokens, shift_labels=tokens).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_checkpoints_are_exchanged(model_of, ids, tmp_path):
    dense, sparse, tokens = model_of("mixed", **DENSE), model_of("mixed", **SPARSE), ids(2, 9)
    assert set(dense.state_dict()) == set(sparse.state_dict())
    assert not torch.equal(dense(tokens).logits, sparse(tokens).logits)
    dense.save_pretrained(tmp_path / "dense")
    sparse.save_pretrained(tmp_path / "sparse")
    as_sparse = SidForCausalLM.from_pretrained(tmp_path / "dense", mlp_sparsity="2:4")
    assert torch.equal(as_sparse(tokens).logits, sparse(tokens).logits)
    as_dense = SidForCausalLM.from_pretrained(tmp_path / "sparse", mlp_sparsity=None)
    assert torch.equal(as_dense(tokens).logits, dense(tokens).logits)


def test_save_and_load_are_bit_equal(model_of, kind, ids, tmp_path):
    model, tokens = model_of(kind, **SPARSE), ids(2, 9)
    for layer in mlps(model):
        layer.enabled.fill_(False)  # as during a warm-up; a loaded model is sparse
    model.save_pretrained(tmp_path)
    for layer in mlps(model):
        layer.enabled.fill_(True)
    for loader in (SidForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path)
        assert all(layer.enabled.device.type == "cpu" and layer.enabled.item() for layer in mlps(again))
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert again.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("split", [1, 8])
def test_generation_is_the_whole_forward(model_of, kind, ids, split):
    """The two activations that stay of four are of one token: they do not depend on what is computed beside it."""
    model, tokens = model_of(kind, **SPARSE).double(), ids(2, 16)
    whole = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, :split], past_key_values=cache).logits]
    for t in range(split, 16):
        parts.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(tokens[:, :5], **settings)
    assert torch.equal(cached, model.generate(tokens[:, :5], use_cache=False, **settings))


def test_switched_off_it_is_the_dense_model(model_of, ids):
    dense, sparse, tokens = model_of("mixed", **DENSE).double(), model_of("mixed", **SPARSE).double(), ids(2, 16)
    for layer in mlps(sparse):
        layer.enabled.fill_(False)
    expected = gradients(dense, tokens)
    for name, grad in gradients(sparse, tokens).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(model_of, ids, reentrant):
    model, tokens = model_of("mixed", **SPARSE).train(), ids(2, 16)
    plain = gradients(model, tokens)
    for layer in mlps(model):
        layer.measure()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in gradients(model, tokens).items():
        assert torch.equal(grad, plain[name]), name
    assert all(layer.statistics.isfinite().all() for layer in mlps(model))


def test_autocast(model_of, ids):
    model, tokens = model_of("full", initializer_range=0.05, **SPARSE), ids(2, 16)
    exact = model(tokens, shift_labels=tokens).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, shift_labels=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    assert loss != exact and all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_on_the_meta_device_and_copied(model_of, config_of):
    with torch.device("meta"):
        model = SidForCausalLM(config_of("mixed", **SPARSE))
    assert model.lm_head.weight.is_meta and all(layer.enabled.item() for layer in mlps(model))
    one = model_of("mixed", **SPARSE)
    two = copy.deepcopy(one)
    mlps(two)[0].enabled.fill_(False)
    assert mlps(one)[0].enabled.item() is True


def test_flops_are_those_of_the_dense_model(config_of):
    """What a token costs is counted as if nothing were dropped, by the formulas and by torch."""
    dense, sparse = config_of("full", **DENSE), config_of("full", **SPARSE)
    assert train_flops_per_token(sparse, 16) == train_flops_per_token(dense, 16)
    counts, tokens = [], torch.zeros(1, 16, dtype=torch.long)
    for config in (dense, sparse):
        model = SidForCausalLM(config).train()
        with FlopCounterMode(display=False) as counter:
            model(tokens, shift_labels=tokens, use_cache=False).loss.backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 3 * 3 * 16 * 2 * 2 * 48 * 192  # the feed-forward layers alone
