"""GGUF files of plain Llama models: read back with the public package, run in llama.cpp where it is installed."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.data.tokenizer import SPLIT_PATTERN, train_tokenizer
from sidlm.errors import SidError
from sidlm.models.convert import gguf_file
from sidlm.models.convert.run import Cast, convert, open_checkpoint

gguf = pytest.importorskip("gguf")
TEXT = [
    f"{word} number {i} of the old house; it's 12345 and naïve 数学 😀\n"
    for i, word in enumerate(["tree", "river", "bird"] * 60)
]
LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def llama(tmp_path):
    tokenizer = train_tokenizer(TEXT, 400, num_special=16)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
        initializer_range=0.2, rope_parameters=LLAMA31, bos_token_id=tokenizer.bos_id,
        eos_token_id=[tokenizer.eos_id], pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    (tmp_path / "out").mkdir()
    return model


def test_names_shapes_values_and_settings(tmp_path, llama):
    convert(open_checkpoint(tmp_path / "llama"), tmp_path / "out", layout="gguf")
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {t.name: t for t in reader.tensors}
    expected = set(gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2).mapping[n][1] for n in (
        "model.embed_tokens", "model.norm", "lm_head", *(f"model.layers.{i}.{part}" for i in range(2) for part in (
            "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))))  # fmt: skip
    assert tensors.keys() == {f"{name}.weight" for name in expected} | {"rope_freqs.weight"}
    state = llama.state_dict()
    assert np.array_equal(tensors["blk.1.ffn_down.weight"].data, state["model.layers.1.mlp.down_proj.weight"].numpy())
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [96, 64]  # GGUF counts dimensions from the last
    # rotary pairs are neighbours: row 2i of a head was row i, row 2i + 1 was i + 8
    q = state["model.layers.0.self_attn.q_proj.weight"].view(4, 2, 8, 64).transpose(1, 2).reshape(64, 64)
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, q.numpy())
    factors = tensors["rope_freqs.weight"].data
    assert factors.shape == (8,) and factors[0] == 1 and factors[-1] == pytest.approx(8)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 64,
        "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.context_length": 256, "llama.rope.freq_base": 500000.0, "llama.rope.dimension_count": 16,
        "llama.vocab_size": len(state["lm_head.weight"]), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smaug-bpe", "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": llama.config.bos_token_id,
        "tokenizer.ggml.eos_token_id": llama.config.eos_token_id[0],
        "tokenizer.ggml.padding_token_id": llama.config.pad_token_id,
    }  # fmt: skip
    assert {name: fields.get(name) for name in wanted} == wanted
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokenizer = Tokenizer.from_file(str(tmp_path / "llama" / "tokenizer.json"))
    count = tokenizer.get_vocab_size()
    kinds, tokens = fields["tokenizer.ggml.token_type"], fields["tokenizer.ggml.tokens"]
    assert tokens[:count] == [tokenizer.id_to_token(i) for i in range(count)]
    assert set(kinds[: count - 16]) == {gguf.TokenType.NORMAL} and set(kinds[count:]) == {gguf.TokenType.UNUSED}
    assert set(kinds[count - 16 : count]) == {gguf.TokenType.CONTROL}


def test_bf16_and_tied_embeddings(tmp_path, llama):
    tied = LlamaForCausalLM(LlamaConfig(**llama.config.to_dict() | {"tie_word_embeddings": True}))
    tied.save_pretrained(tmp_path / "llama")
    convert(Cast(open_checkpoint(tmp_path / "llama"), torch.bfloat16), tmp_path / "out", layout="gguf")
    tensors = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert tensors["token_embd.weight"] == gguf.GGMLQuantizationType.BF16 and "output.weight" not in tensors
    assert tensors["blk.0.attn_norm.weight"] == gguf.GGMLQuantizationType.F32  # llama.cpp wants these so


def test_the_split_rule_is_sids():
    assert gguf_file.LLAMA3_SPLIT == SPLIT_PATTERN


def test_tokenizers_that_llama_cpp_does_not_know(tmp_path, llama):
    path = tmp_path / "llama" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    path.write_text(json.dumps(content))
    with pytest.raises(SidError, match=r"llama\.cpp has no name for this BPE tokenizer's split rule"):
        convert(open_checkpoint(tmp_path / "llama"), tmp_path / "out", layout="gguf")
    path.unlink()
    with pytest.raises(SidError, match=r"a GGUF file holds its tokenizer: no tokenizer\.json"):
        convert(open_checkpoint(tmp_path / "llama"), tmp_path / "out", layout="gguf")


@torch.no_grad()
def test_llama_cpp_writes_the_same_text(tmp_path, llama):
    llama_cpp = pytest.importorskip("llama_cpp")
    convert(open_checkpoint(tmp_path / "llama"), tmp_path / "out", layout="gguf")
    tokenizer = Tokenizer.from_file(str(tmp_path / "llama" / "tokenizer.json"))
    # keys and values in fp32 as here: by default it rounds them to fp16
    engine = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=256, verbose=False, type_k=0, type_v=0)
    try:
        for text in ("The old house", "it's 12345 and\n\n  naïve 数学 😀 x"):
            ids = tokenizer.encode(text).ids
            assert engine.tokenize(text.encode(), add_bos=True) == ids
            wanted = llama.generate(torch.tensor([ids]), max_new_tokens=80, do_sample=False, eos_token_id=None)
            stream = engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
            assert [next(stream) for _ in range(80)] == wanted[0, len(ids) :].tolist()
    finally:
        engine.close()
