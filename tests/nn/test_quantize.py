"""int8 and emulated float8 feed-forward layers: against torchao's own arithmetic, and the policy."""

import copy

import pytest
import torch
from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.nn.quantize import EmulatedFloat8Linear, quantize_feed_forward, quantize_rows

ACTS = {"ordinary": 1.0, "large": 900.0, "beyond the cap": 5000.0}


def rows(scale, dtype=torch.float32):
    x = torch.randn(7, 48, generator=torch.Generator().manual_seed(0)) * scale
    x[2, 5] = 40 * scale  # an outlier
    x[4] = 0
    return x.to(dtype)


@pytest.mark.parametrize("scale", list(ACTS.values()), ids=list(ACTS))
@pytest.mark.parametrize("cap", [None, 1200.0])
def test_rows_are_torchaos_bit_for_bit(scale, cap):
    x = rows(scale)
    want_scale = _choose_scale_float8(x, [1, 48], hp_value_lb=1e-12, hp_value_ub=cap)
    want = _quantize_affine_float8(x, want_scale, torch.float8_e4m3fn)
    got, got_scale = quantize_rows(x, cap)
    assert torch.equal(got_scale, want_scale) and torch.equal(got.float(), want.float())
    assert got.dtype == torch.float8_e4m3fn and not got[4].float().any()


def test_the_cap_saturates_outliers_and_saves_the_others():
    x = torch.full((1, 64), 3.0)
    x[0, 0] = 60_000.0
    (free, free_scale), (capped, capped_scale) = quantize_rows(x), quantize_rows(x, 1200.0)
    assert (free.float() * free_scale)[0, 0] == 60_000 and (capped.float() * capped_scale)[0, 0] == 1200
    error = [((q.float() * s)[0, 1:] - 3).abs().max().item() for q, s in ((free, free_scale), (capped, capped_scale))]
    assert error[1] < error[0] / 4 and error[1] < 3 / 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_its_rounded_operands(dtype):
    linear = torch.nn.Linear(48, 20, bias=False).to(dtype)
    x = rows(3.0, dtype)
    weight, weight_scale = quantize_rows(linear.weight.detach())
    activation, scale = quantize_rows(x, 1200.0)
    want = (activation.double() * scale.double()) @ (weight.double() * weight_scale.double()).T
    got = EmulatedFloat8Linear(linear)(x[None])[0]
    assert got.dtype == dtype
    # the result's own rounding, and of float32 sums of 48 terms
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=48 * 2**-24 * want.abs().max().item())
    # against the layer itself: each operand is within 2^-4 of its own size
    assert ((got.double() - linear(x).double()).norm() / linear(x).double().norm()) < 0.06


@pytest.mark.parametrize("cap", [None, 1200.0])
def test_an_uncapped_layer_is_another_one(cap):
    linear, x = torch.nn.Linear(48, 20, bias=False), rows(5000.0)
    layer = EmulatedFloat8Linear(linear, cap)
    error = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert error < 0.06 if cap is None else error > 0.2


def model_of(mlp_type="squared_relu", layers=4, **more):
    torch.manual_seed(0)
    config = SidConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        layer_types=["full_attention", "simplicial_attention"] * (layers // 2), simplicial_window=[8, 4],
        mlp_type=mlp_type, initializer_range=0.2, **more,
    )  # fmt: skip
    return SidForCausalLM(config).eval()


IDS = torch.arange(40)[None] % 61


@pytest.mark.parametrize("kind", ["int8", "float8"])
@pytest.mark.parametrize("mlp_type", ["squared_relu", "swiglu"])
@torch.no_grad()
def test_only_inner_feed_forward_layers_change(kind, mlp_type):
    model = model_of(mlp_type)
    before, weights = model(IDS).logits, copy.deepcopy(model.state_dict())
    done = quantize_feed_forward(model.model.layers, kind)
    assert done.kept == (0, 3) and done.kind == kind
    names = ("gate_proj", "up_proj", "down_proj") if mlp_type == "swiglu" else ("up_proj", "down_proj")
    assert done.layers == tuple(f"{i}.mlp.{name}" for i in (1, 2) for name in names)
    assert done.bytes_before == 2 * len(names) * 32 * 48 * 4
    # a byte for each weight and four for each row's scale
    assert done.bytes_before / 4 < done.bytes_after <= done.bytes_before * (1 / 4 + 1 / 32)
    kept = {k: v for k, v in model.state_dict().items() if not any(f"layers.{path}." in k for path in done.layers)}
    assert len(kept) == len(weights) - len(done.layers)
    assert all(torch.equal(v, weights[k]) for k, v in kept.items())
    after = model(IDS).logits
    error = ((after - before).norm() / before.norm()).item()
    assert 0 < error < {"int8": 0.01, "float8": 0.06}[kind]
    assert torch.equal(model(IDS).logits, after)
    generated = model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 9)


@torch.no_grad()
def test_a_token_without_activations():
    model = model_of()
    quantize_feed_forward(model.model.layers, "float8")
    x = torch.zeros(1, 3, 32)
    assert not model.model.layers[1].mlp(x).any()


@torch.no_grad()
def test_both_ends_on_request_and_a_model_of_two():
    model = model_of(layers=2)
    with pytest.raises(ValueError, match="nothing to quantise: of 2 blocks the first and the last are kept"):
        quantize_feed_forward(model.model.layers, "int8")
    assert quantize_feed_forward(model.model.layers, "float8", keep_ends=False).kept == ()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"mlp_sparsity": "2:4"}, r"block 1: its sparsity is '2:4', it multiplies its weights itself"),
        ({"mlp_precision": "fp8"}, r"block 1: its precision is 'fp8'"),
        ({"num_local_experts": 2, "num_experts_per_tok": 1}, r"block 1: MoEFeedForward is not made of linear layers"),
    ],
)
def test_layers_that_multiply_themselves_are_refused(more, message):
    model = model_of(**more)
    with pytest.raises(ValueError, match=message):
        quantize_feed_forward(model.model.layers, "int8")


def test_bad_arguments():
    blocks = model_of().model.layers
    with pytest.raises(ValueError, match=r"kind must be one of \('int8', 'float8'\), got 'int4'"):
        quantize_feed_forward(blocks, "int4")
    with pytest.raises(ValueError, match="cap must be positive, got 0"):
        quantize_feed_forward(blocks, "float8", cap=0.0)


def test_a_llama_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    llama = LlamaForCausalLM(config).eval()
    assert len(quantize_feed_forward(llama.model.layers, "float8").layers) == 3
    assert llama(IDS).logits.isfinite().all()


def test_the_policy_reaches_torchaos_float8_on_a_gpu(monkeypatch):
    """What torchao is asked for where the GPU has float8; its arithmetic is compared above."""
    import torchao.quantization as torchao
    from torchao.quantization.granularity import PerRow

    import sidlm.nn.quantize as quantize

    asked = []
    monkeypatch.setattr(quantize, "_has_float8", lambda device: True)
    monkeypatch.setattr(quantize, "_nbytes", lambda layer: 0)
    monkeypatch.setattr(torchao, "quantize_", lambda module, config: asked.append((module[0], config)))
    model = model_of()
    done = quantize_feed_forward(model.model.layers, "float8", cap=900.0)
    assert done.implementation == "torchao float8 rows" and len(asked) == 4
    assert [layer for layer, _ in asked] == [model.model.layers.get_submodule(path) for path in done.layers]
    for _, config in asked:
        assert config.activation_value_ub == 900.0 and config.activation_value_lb > 0
        assert config.granularity == [PerRow(), PerRow()] and config.weight_dtype == torch.float8_e4m3fn


@pytest.mark.gpu
def test_torchaos_rows_on_a_gpu_are_the_emulated_ones():
    model = model_of().to("cuda", torch.bfloat16)
    plain = copy.deepcopy(model.model.layers)
    done = quantize_feed_forward(model.model.layers, "float8")
    assert done.implementation == "torchao float8 rows"
    for path in done.layers:
        linear = plain.get_submodule(path)
        x = torch.nn.functional.pad(rows(3000.0, torch.bfloat16), (0, 48))[:, : linear.in_features].cuda()
        got, want = model.model.layers.get_submodule(path)(x), EmulatedFloat8Linear(linear)(x)
        assert not got[4].any()  # a token without activations
        torch.testing.assert_close(got, want, rtol=2 * 2**-8, atol=2**-12 * want.abs().max().item())
    assert model(IDS.cuda()).logits.isfinite().all()
