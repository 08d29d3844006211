import pytest
import torch

from sidlm.models import PRESETS, SidForCausalLM, num_parameters, preset
from sidlm.models.presets import ARCHS

LLAMA = {
    "1b": 1_235_814_400,
    "3b": 3_212_749_824,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "405b": 405_853_388_800,
}


def on_meta(config) -> SidForCausalLM:
    with torch.device("meta"):
        return SidForCausalLM(config)


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("arch", ARCHS)
def test_counts_are_those_of_the_model(name, arch):
    config = preset(name, arch=arch)
    model = on_meta(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    heads = {"model.embed_tokens.weight", "lm_head.weight"}
    others = sum(p.numel() for n, p in model.named_parameters() if n not in heads)
    assert num_parameters(config, non_embedding=True) == others


@pytest.mark.parametrize(("name", "count"), LLAMA.items())
def test_llama_sizes_are_exact(name, count):
    assert num_parameters(preset(name, arch="llama")) == count


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("vocab_size", [None, 512, 50_000])
def test_sid_has_as_many_parameters_as_llama(name, vocab_size):
    sid, llama = (num_parameters(preset(name, arch=arch, vocab_size=vocab_size)) for arch in ("sid", "llama"))
    assert abs(sid / llama - 1) < 0.005


def test_archs():
    sid, llama = preset("nano"), preset("nano", arch="llama")
    assert sid.layer_types == ["full_attention"] * 3 + ["simplicial_attention"]
    assert llama.layer_types == ["full_attention"] * 4
    assert (sid.mlp_type, llama.mlp_type) == ("squared_relu", "swiglu")
    assert 0.9e6 < num_parameters(sid) < 1.3e6


def test_overrides():
    config = preset("nano", vocab_size=300, num_hidden_layers=8, simplicial_window=[32, 4], bos_token_id=1)
    assert (config.vocab_size, config.num_hidden_layers, len(config.layer_types)) == (300, 8, 8)
    assert config.simplicial_window == [32, 4] and config.bos_token_id == 1
    llama = preset("nano", arch="llama", vocab_size=300, num_hidden_layers=8)
    assert abs(num_parameters(config) / num_parameters(llama) - 1) < 0.01
    assert preset("nano", intermediate_size=100).intermediate_size == 100
    swiglu = preset("nano", mlp_type="swiglu")
    assert abs(num_parameters(swiglu) / num_parameters(preset("nano", arch="llama")) - 1) < 0.01
    assert preset("micro", arch="llama", layer_types=["sliding_attention"] * 8).layer_types[0] == "sliding_attention"
    assert preset("nano", mlp_sparsity="2:4").intermediate_size == preset("nano").intermediate_size
    # a preset handed out is a copy
    preset("nano").simplicial_window[0] = 1
    assert preset("nano").simplicial_window == [64, 8]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("nanoo",), {}, "unknown preset 'nanoo'; did you mean 'nano'"),
        (("nano",), {"arch": "lama"}, "unknown arch 'lama'; did you mean 'llama'"),
        (("nano",), {"hidden_sise": 3}, "unknown SidConfig field 'hidden_sise'; did you mean 'hidden_size'"),
        (("nano",), {"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
    ],
)
def test_unknown_names_get_the_nearest(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        preset(*args, **kwargs)
