"""convert_squared_relu on tiny random Nemotron and Arcee models of transformers."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NemotronConfig,
    NemotronForCausalLM,
)

from sidlm import ops
from sidlm.nn import SquaredReLUFeedForward, convert_squared_relu
from sidlm.ops.sparse24.select import select_2to4

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {"nemotron": (NemotronConfig, NemotronForCausalLM), "arcee": (ArceeConfig, ArceeForCausalLM)}


def build(kind, **settings):
    config, model = MODELS[kind]
    torch.manual_seed(0)
    # weights large enough that the feed-forward layers matter
    return model(config(**SIZES, initializer_range=0.3, **settings)).eval()


@pytest.fixture(params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture
def ids():
    return torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def two_of_four(up, down, x):
    y = x @ up.T
    return y, (y.clamp_min(0).square() * select_2to4(y)) @ down.T


@torch.no_grad()
def test_the_layers_become_sparse_and_the_report_is_true(kind, ids):
    model = build(kind)
    former, inputs = copy.deepcopy(model), {}
    for path, module in former.named_modules():
        if path.endswith("mlp"):
            module.register_forward_hook(lambda m, args, out, path=path: inputs.update({path: (args[0], out)}))
    before = former(ids).logits.log_softmax(-1)
    parameters = dict(model.named_parameters())
    report = convert_squared_relu(model, input_ids=ids)

    after = model(ids).logits.log_softmax(-1)
    again = dict(model.named_parameters())
    assert list(again) == list(parameters) and all(again[name] is p for name, p in parameters.items())
    assert set(model.state_dict()) == set(former.state_dict())
    assert report.converted == ("model.layers.0.mlp", "model.layers.1.mlp") and not report.refused
    for found in report.layers:
        module, (x, out) = model.get_submodule(found.path), inputs[found.path]
        assert isinstance(module, SquaredReLUFeedForward) and not module.training and module.statistics is None
        y, expected = two_of_four(module.up_proj.weight, module.down_proj.weight, x)
        torch.testing.assert_close(module(x), expected)
        assert found.error == pytest.approx(((expected - out).norm() / out.norm()).item(), rel=1e-3) and found.error > 0
        assert found.zeros == pytest.approx((y <= 0).float().mean().item(), rel=1e-4)
        lost = ((y > 0) & ~select_2to4(y)).sum() / (y > 0).sum()
        assert found.dropped == pytest.approx(lost.item(), rel=1e-4)
    kl = (before.exp() * (before - after)).sum(-1)
    assert (report.kl_mean, report.kl_max) == pytest.approx((kl.mean().item(), kl.max().item()), rel=1e-3)
    for loss, logits in ((report.loss_before, before), (report.loss_after, after)):
        nll = -logits[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
        assert loss == pytest.approx(nll, rel=1e-4)
    assert kl.mean() > 1e-4
    assert "2 layers converted" in str(report) and "model.layers.1.mlp: error" in str(report)


def test_without_tokens_it_only_converts(kind):
    model = build(kind).train()
    report = convert_squared_relu(model)
    assert len(report.converted) == 2 and report.layers == () and report.loss_before is None
    assert all(m.training for m in model.modules())
    assert str(report) == "2 layers converted"


def test_a_converted_model_is_saved_as_what_it_was(kind, ids, tmp_path):
    model = build(kind)
    before = model(ids).logits
    convert_squared_relu(model)
    model.save_pretrained(tmp_path)
    again = MODELS[kind][1].from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, before)
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (2, 23)


def test_low_precision(ids):
    model = build("arcee").bfloat16()
    report = convert_squared_relu(model, input_ids=ids, precision="fp8")
    assert model.model.layers[0].mlp.precision == "fp8"
    assert all(0.01 < layer.error < 1 for layer in report.layers)


def test_a_model_without_a_head_has_no_loss(ids):
    report = convert_squared_relu(build("nemotron").model, input_ids=ids)
    assert len(report.layers) == 2 and report.loss_before is None and report.kl_max is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mlp_bias": True}, r"model\.layers\.0\.mlp up_proj is a Linear with a bias"),
        ({"intermediate_size": 60}, r"has 60 activations, which is no multiple of 8"),
        ({"hidden_act": "silu"}, "no squared-ReLU feed-forward layer to convert: none has"),
    ],
)
def test_models_that_cannot_be_converted(kind, change, reason):
    model = build(kind, **change) if "intermediate_size" not in change else None
    if model is None:
        config, cls = MODELS[kind]
        model = cls(config(**SIZES | change))
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=reason):
        convert_squared_relu(model)
    assert [type(m) for m in model.modules()] == before


def test_gated_layers_are_none(ids):
    """A SwiGLU layer whose activation is relu(x)^2 has a gate, which a converted layer would forget."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="relu2"))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no squared-ReLU feed-forward layer"):
        convert_squared_relu(model)


class Squared(nn.Module):
    def __init__(self, factor=1.0, bias=False):
        super().__init__()
        self.up_proj = nn.Linear(16, 32, bias=bias)
        self.down_proj = nn.Linear(32, 16, bias=False)
        self.factor = factor

    def act_fn(self, x):
        return x.relu() ** 2

    def forward(self, x):
        return self.factor * self.down_proj(self.act_fn(self.up_proj(x)))


class Scaled(Squared):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def test_what_computes_something_else_stays():
    model = nn.ModuleDict({"plain": Squared(), "twice": Squared(2.0), "bias": Squared(bias=True), "scaled": Scaled()})
    twice = model["twice"]
    report = convert_squared_relu(model)
    assert report.converted == ("plain",) and model["twice"] is twice and type(model["scaled"]) is Scaled
    assert set(report.refused) == {"twice", "bias"}
    assert "computes something else" in report.refused["twice"] and "twice left: computes" in str(report)


def test_a_layer_at_two_places_is_converted_at_both():
    shared = Squared()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    assert convert_squared_relu(model).converted == ("a", "b.c")
    assert isinstance(model["b"]["c"], SquaredReLUFeedForward)


def test_a_failure_leaves_the_model_as_it_was(ids, monkeypatch):
    model, real, calls = build("nemotron").train(), ops.squared_relu_ffn, []

    def fail(*args, **settings):
        calls.append(1)
        if len(calls) == 4:  # two to measure the layers, then in the second layer of the converted model
            raise RuntimeError("out of memory")
        return real(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "squared_relu_ffn", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            convert_squared_relu(model, input_ids=ids)
    assert model.training
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, length >= 2\), got \(20,\)"):
        convert_squared_relu(model, input_ids=ids[0])
    for layer in model.model.layers:
        assert type(layer.mlp).__name__ == "NemotronMLP" and not layer.mlp._forward_hooks
