"""Llama 3, 3.1 and 3.2 as Sid models, with transformers' logits. Parameter counts are in test_presets.py."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sidlm.models import SidConfig, SidForCausalLM, num_parameters
from sidlm.nn.rotary import inverse_frequencies

LLAMA31 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA32 = LLAMA31 | {"factor": 32.0}
LONGEST = 131_072

# small, with the proportions of the real ones: grouped heads, head_dim apart from hidden_size / heads, tied
SHAPES = {
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {"rope_parameters": LLAMA31, "head_dim": 32},
    "llama3.2": {"rope_parameters": LLAMA32, "tie_word_embeddings": True, "num_key_value_heads": 1},
    "3b": {"rope_parameters": LLAMA32, "hidden_size": 72, "num_attention_heads": 6, "head_dim": 16,
           "num_key_value_heads": 2, "tie_word_embeddings": True},
    "mha": {"rope_parameters": LLAMA31, "num_key_value_heads": 4, "intermediate_size": 52},
}  # fmt: skip


def llama(folder, name: str, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "vocab_size": 136, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": LONGEST, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
    } | SHAPES[name]  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    with torch.no_grad():  # norms of ones would hide a norm that is left out or applied twice
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


@pytest.fixture(params=list(SHAPES))
def pair(request, tmp_path):
    theirs = llama(tmp_path, request.param)
    return SidForCausalLM.from_pretrained(tmp_path), theirs


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 136, (rows, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def test_logits_are_transformers(pair):
    ours, theirs = pair
    ids = tokens(2, 90)
    expected = theirs(ids).logits
    assert expected.std() > 0.3  # logits near zero would agree whatever is wrong
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_packed_documents_are_transformers(pair):
    ours, theirs = pair
    lengths = (17, 40, 1, 22)
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)
    told = ours(ids, position_ids=positions, doc_ids=documents).logits
    torch.testing.assert_close(told, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_left_padding_is_transformers(pair):
    ours, theirs = pair
    ids, mask = tokens(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[0, :11], mask[2, :29] = 0, 0
    kwargs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    a, b = ours(ids, **kwargs).logits, theirs(ids, **kwargs).logits
    torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=0, atol=1e-5)
    # left to themselves, both count from the first real token
    torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], a[mask.bool()], rtol=0, atol=1e-5)
    generate = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **generate), theirs.generate(ids, **generate))


@pytest.mark.parametrize("first", [2_040, 8_180, 65_000, LONGEST - 60])
@torch.no_grad()
def test_far_positions_are_transformers(pair, first):
    ours, theirs = pair
    ids, positions = tokens(1, 60), torch.arange(first, first + 60)[None]
    expected = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_query_sees_keys_a_whole_context_away(pair):
    """Positions 0..9 and the last ten of 131,072 in one document: the scaled slow frequencies decide what is seen."""
    ours, theirs = pair
    ids, positions = tokens(1, 20), torch.cat((torch.arange(10), torch.arange(LONGEST - 10, LONGEST)))[None]
    # transformers looks for documents where positions jump, unless it is given a mask
    mask = torch.full((20, 20), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected = theirs(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(ours(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(SHAPES))
@torch.no_grad()
def test_bf16_is_no_further_from_fp32_than_transformers(tmp_path, name):
    ours, theirs = [], []
    for seed in range(6):
        exact = llama(tmp_path, name, seed)
        sid = SidForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        ids = tokens(4, 64)
        expected = exact(ids).logits
        ours.append((sid(ids).logits.float() - expected).square().mean().sqrt() / expected.std())
        theirs.append((exact.bfloat16()(ids).logits.float() - expected).square().mean().sqrt() / expected.std())
    assert sum(ours) <= sum(theirs), (sum(ours) / 6, sum(theirs) / 6)


@pytest.mark.parametrize("parameters", [LLAMA31, LLAMA32])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_frequencies_are_transformers_bit_by_bit(parameters, head_dim):
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=parameters)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.equal(inverse_frequencies(head_dim, parameters), theirs)


def test_frequencies_are_the_papers():
    """Wavelengths below 2,048 stay, above 8,192 are 8 times as long, and nothing jumps in between."""
    plain = inverse_frequencies(128, {"rope_theta": 500000.0}).double()
    scaled = inverse_frequencies(128, LLAMA31).double()
    wavelength = 2 * torch.pi / plain
    assert torch.equal(scaled[wavelength < 2048], plain[wavelength < 2048])
    torch.testing.assert_close(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength >= 2048) & (wavelength <= 8192)
    s = (8192 / wavelength - 1) / 3
    torch.testing.assert_close(scaled[between], (((1 - s) / 8 + s) * plain)[between], rtol=1e-6, atol=0)
    assert between.sum() >= 3 and (scaled.diff() < 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_type": "yarn"}, "rope_type 'yarn' is not implemented; known: 'default', 'llama3'"),
        ({"factor": None}, "factor is missing"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0, got 0"),
        ({"low_freq_factor": "1"}, "low_freq_factor must be a number above 0, got '1'"),
        ({"high_freq_factor": 1.0}, r"high_freq_factor \(1.0\) must be above low_freq_factor \(1.0\)"),
    ],
)
def test_scaling_that_makes_no_sense(change, message):
    with pytest.raises(ValueError, match=f"rope_parameters: .*{message}"):
        inverse_frequencies(64, LLAMA31 | change)


def test_the_config_as_published_for_31(tmp_path):
    """rope_scaling beside rope_theta, the spelling of Llama 3.1's own files."""
    scaling = {name: value for name, value in LLAMA31.items() if name != "rope_theta"}
    fields = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": LONGEST,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": scaling, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = SidConfig.from_pretrained(tmp_path)
    assert {name: config.rope_parameters[name] for name in LLAMA31} == LLAMA31
    assert num_parameters(config) == on_meta(config) == 8_030_261_248
    assert config.eos_token_id == [128001, 128008, 128009] and config.dtype == torch.bfloat16


def on_meta(config: SidConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SidForCausalLM(config).parameters())
