import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from sidlm.models import SidForCausalLM, SidModel


def shifted(labels: torch.Tensor) -> torch.Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def gradients(model, **kwargs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**kwargs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_auto_classes(config_of):
    config = config_of()
    assert type(AutoConfig.for_model("sid")) is type(config)
    assert type(AutoModel.from_config(config)) is SidModel
    assert type(AutoModelForCausalLM.from_config(config)) is SidForCausalLM


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [0, 4])
def test_save_and_load_are_bit_equal(model_of, kind, ids, tmp_path, tied, experts):
    model, tokens = model_of(kind, tie_word_embeddings=tied, num_local_experts=experts), ids(2, 9)
    if experts:
        model.model.layers[0].mlp.balance_bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.1]))
    model.save_pretrained(tmp_path)
    assert sorted(p.suffix for p in tmp_path.glob("model*")) == [".safetensors"]
    for loader in (SidForCausalLM, AutoModelForCausalLM):
        again = loader.from_pretrained(tmp_path)
        assert again.config.to_diff_dict() == model.config.to_diff_dict()
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert not again.training
        if experts:
            assert again.model.layers[2].mlp.expert_counts.tolist() == [0] * 4


def test_shift_labels_give_the_loss_of_labels_without_logits(model_of, kind, ids):
    model, tokens = model_of(kind).double(), ids(2, 15)
    labels = tokens.clone()
    labels[0, :4] = -100
    usual, fused = model(tokens, labels=labels), model(tokens, shift_labels=shifted(labels))
    assert fused.logits is None and usual.logits.shape == (2, 15, 97)
    nll = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(fused.loss, nll, rtol=1e-9, atol=0)
    torch.testing.assert_close(usual.loss.double(), nll, rtol=1e-5, atol=0)
    a = gradients(model, input_ids=tokens, labels=labels)
    b = gradients(model, input_ids=tokens, shift_labels=shifted(labels))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-7)


def test_loss_is_normalised_by_the_count_given(model_of, ids):
    model, tokens = model_of(), ids(4, 15)
    labels = shifted(tokens)
    labels[0, 3:] = -100
    count = (labels >= 0).sum()
    whole = model(tokens, shift_labels=labels).loss
    parts = [model(tokens[i : i + 1], shift_labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(model(tokens, shift_labels=labels, num_items_in_batch=int(count)).loss, whole)
    usual = [model(tokens[i : i + 1], labels=tokens[i : i + 1], num_items_in_batch=56).loss for i in range(4)]
    torch.testing.assert_close(sum(usual), model(tokens, labels=tokens).loss)


def test_a_batch_of_ignored_labels_has_loss_zero(model_of, ids):
    loss = model_of()(ids(1, 5), shift_labels=torch.full((1, 5), -100)).loss
    assert loss == 0


def test_labels_and_shift_labels_together_are_refused(model_of, ids):
    tokens = ids(1, 5)
    with pytest.raises(ValueError, match="not both"):
        model_of()(tokens, labels=tokens, shift_labels=tokens)
    with pytest.raises(ValueError, match=r"shift_labels must be \(1, 5\), got \(1, 4\)"):
        model_of()(tokens, shift_labels=tokens[:, :4])


def test_logits_to_keep(model_of, ids):
    model, tokens = model_of(), ids(2, 9)
    logits = model(tokens).logits
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([0, 5])).logits, logits[:, [0, 5]])


def test_hidden_states_and_tuples(model_of, ids):
    model, tokens = model_of(), ids(2, 9)
    out = model(tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits, rtol=0, atol=0)
    torch.testing.assert_close(out.hidden_states[0], model.get_input_embeddings()(tokens), rtol=0, atol=0)
    assert model(tokens).hidden_states is None
    as_tuple = model(tokens, use_cache=False, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.logits)


def test_training_builds_no_cache_and_evaluation_does(model_of, ids):
    model, tokens = model_of(), ids(2, 9)
    assert model(tokens).past_key_values is not None
    assert model(tokens, labels=tokens).past_key_values is None
    assert model.train()(tokens).past_key_values is None


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(model_of, kind, ids, experts, reentrant):
    model, tokens = model_of(kind, num_local_experts=experts).train(), ids(2, 15)
    runs = {"input_ids": tokens, "shift_labels": shifted(tokens)}
    plain = gradients(model, **runs)
    calls = []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # the first module of the block: recomputation stops early once it has what it needs
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    checkpointed = gradients(model, **runs)
    assert len(calls) == 2, "the block was not recomputed"
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(model_of, kind, ids, dtype):
    model, tokens = model_of(kind, initializer_range=0.02), ids(2, 15)
    exact = model.double()(tokens).logits
    model = model.to(dtype)
    out = model(tokens)
    assert out.logits.dtype == dtype
    atol = {torch.bfloat16: 0.02 * exact.abs().max().item(), torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.logits.double(), exact, rtol=0, atol=atol)
    grads = gradients(model, input_ids=tokens, shift_labels=shifted(tokens))
    assert all(g.isfinite().all() and g.dtype == dtype for g in grads.values())
    assert model.generate(tokens, max_new_tokens=4, min_new_tokens=4).shape == (2, 19)


@pytest.mark.parametrize("experts", [0, 4])
def test_autocast(model_of, kind, ids, experts):
    model, tokens = model_of(kind, initializer_range=0.05, num_local_experts=experts), ids(2, 15)
    packed = {"doc_ids": torch.tensor([[0] * 8 + [1] * 7] * 2), "shift_labels": shifted(tokens)}
    exact = model(tokens, **packed).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(tokens, **packed).loss
        cached = model.generate(tokens, max_new_tokens=8, do_sample=False)
        plain = model.generate(tokens, max_new_tokens=8, do_sample=False, use_cache=False)
    loss.backward()
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0)
    # an expert that no token chose has a zero gradient, not a missing one
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(cached, plain)


COMPILED = """
import torch
from sidlm.models import SidConfig, SidForCausalLM

torch.manual_seed(0)
kinds = ["full_attention", "simplicial_attention", "sliding_attention"]
model = SidForCausalLM(SidConfig(
    vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, simplicial_window=[7, 4], sliding_window=6, layer_types=kinds, initializer_range=0.2,
)).train()
tokens = torch.randint(0, 97, (2, 12))
for extra in ({}, {"doc_ids": torch.tensor([[0] * 5 + [1] * 7] * 2)}):
    results = []
    for compiled in (False, True):
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager", fullgraph=True)
        model.zero_grad()
        model(tokens, shift_labels=tokens, **extra).loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
    for layer in model.model.layers:
        layer._compiled_call_impl = None
"""


def test_blocks_compile_without_a_graph_break():
    # a process of its own: the shape checkers of these tests do not trace
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("tied", [False, True])
def test_initial_scales(model_of, tied):
    std = 0.02
    model = model_of("mixed", hidden_size=256, intermediate_size=512, head_dim=64, initializer_range=std,
                     num_local_experts=4, num_shared_experts=1, tie_word_embeddings=tied)  # fmt: skip
    residual = std / math.sqrt(2 * 3)
    seen = set()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        leaf = next(part for part in reversed(name.split(".")) if part != "weight")
        seen.add(leaf)
        expected = {"o_proj": residual, "down_proj": residual, "embed_tokens": std if tied else 1.0}.get(leaf, std)
        assert abs(p.std().item() / expected - 1) < 0.1, (name, p.std().item(), expected)
        assert abs(p.mean().item()) < expected / 10, name
    assert {"q_proj", "k2_proj", "v2_proj", "o_proj", "up_proj", "down_proj", "router", "embed_tokens"} <= seen


def test_loss_at_initialisation_is_that_of_a_guess(model_of, kind, ids):
    model, tokens = model_of(kind, initializer_range=0.02), ids(4, 30)
    assert abs(model(tokens, labels=tokens).loss.item() - math.log(97)) < 0.1


def test_it_learns(model_of, kind, ids):
    model, tokens = model_of(kind, initializer_range=0.02).train(), ids(4, 20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(tokens, shift_labels=shifted(tokens)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1.0


def test_meta_device_and_bf16_keep_the_frequencies(model_of, tmp_path):
    model = model_of("full")
    model.save_pretrained(tmp_path)
    loaded = SidForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    position = torch.tensor([[100_000]])
    cos = loaded.model.rotary(position, 1).cos
    assert cos.dtype == torch.float32
    assert torch.equal(cos, model.model.rotary(position, 1).cos)
