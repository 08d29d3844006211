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


ABLATIONS = {
    "recipe": {},
    "no_warmup": {},
    "naive": {"mlp_dense_features": 0.0},
    "no_permutation": {"mlp_permute_tokens": False},
    "no_mask_reuse": {"mlp_reuse_mask": False},
}


def trained(model, tokens, warmup, steps=6):
    """Losses, and after the first step the norm of all gradients and what they dropped of the activations."""
    optimizer, losses, first = torch.optim.AdamW(model.parameters(), lr=3e-3), [], None
    for layer in mlps(model):
        layer.measure()
    for step in range(steps):
        for layer in mlps(model):
            layer.enabled.fill_(step >= warmup)
        found = gradients(model, tokens)
        norm = torch.stack([g.norm() for g in found.values()]).norm().item()
        first = first or (norm, [layer.statistics[2].item() for layer in mlps(model)])
        optimizer.step()
        losses.append(model(tokens, shift_labels=tokens).loss.item())
    return losses, *first


def test_the_recipe_and_its_ablations_train(model_of, ids):
    """Table 1 of the paper as runs of a few steps: all learn, no two are the same, and each drops what it says."""
    tokens, runs = ids(8, 16), {}
    for name, fields in ABLATIONS.items():
        runs[name] = trained(model_of("full", **SPARSE, **fields), tokens, warmup=0 if name == "no_warmup" else 3)
        assert runs[name][0][-1] < runs[name][0][0] - 0.1, name
    assert len({tuple(losses) for losses, *_ in runs.values()}) == len(ABLATIONS)
    (recipe, norm, _), (no_warmup, sparse_norm, _) = runs["recipe"], runs["no_warmup"]
    assert norm != sparse_norm and recipe[0] != no_warmup[0]
    for name in ("naive", "no_permutation", "no_mask_reuse"):
        assert runs[name][0][:2] == pytest.approx(recipe[:2], abs=1e-5), name  # still warming up
        assert runs[name][0][3] != pytest.approx(recipe[3], abs=1e-7), name
    # sparse at once: the most active features are those that lose most
    few, more = (trained(model_of("full", **SPARSE, mlp_dense_features=x), tokens, 0, 1)[2] for x in (0.4, 0.0))
    assert all(0 < a < b for a, b in zip(few, more, strict=True))
