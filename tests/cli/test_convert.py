"""`sid convert`, and training on from what it wrote."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.main import main
from sidlm.models import SidForCausalLM

RUN = (
    *("--data.seq_len", "32", "--train.batch_size", "4", "--train.device", "cpu", "--validation.documents", "4"),
    *("--data.valid_fraction", "0.2", "--samples.max_new_tokens", "1", "--validation.every", "0"),
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, corpus):
    """Run folder of a tiny Llama. Do not change it."""
    out = tmp_path_factory.mktemp("run") / "llama"
    shape = ["hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4", "head_dim=8"]
    shape += ["num_key_value_heads=2", "max_position_embeddings=256"]
    words = ["--model.arch", "llama", "--model.set", *shape, "--data.train", str(corpus), "--data.vocab_size", "600"]
    assert main(["train", *RUN, *words, "--train.out", str(out), "--train.steps", "40", "--optim.lr", "1e-2"]) == 0
    return out


def bits_per_byte(sid, folder, corpus, tmp_path) -> float:
    status, _, err = sid("evaluate", folder, "--data", corpus, "--seq-len", "32", "--json", tmp_path / "result.json")
    assert status == 0, err
    return json.loads((tmp_path / "result.json").read_text())["data"]["all"]["bits_per_byte"]


def test_every_layout_and_back(tmp_path, llama, sid):
    for source, target, options in (
        (llama, "llama", ("--to", "llama")),
        (tmp_path / "llama", "meta", ("--to", "meta", "--shards", "2")),
        (tmp_path / "meta", "sid", ("--max-shard-gb", "0.001", "--portable")),
        (tmp_path / "sid", "half", ("--dtype", "bf16")),
    ):
        status, said, err = sid("convert", source, tmp_path / target, *options)
        assert status == 0, err
        assert "logits on 32 random tokens: largest difference" in said and "same likeliest token at 100%" in said
        assert (tmp_path / target / "tokenizer.json").is_file()
    before = load_file(llama / "model" / "model.safetensors")
    after = SidForCausalLM.from_pretrained(tmp_path / "sid").state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"
    assert sorted(p.name for p in (tmp_path / "meta").glob("*.pth")) == ["consolidated.00.pth", "consolidated.01.pth"]
    assert (tmp_path / "sid" / "modeling_sid.py").is_file()
    assert SidForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    status, said, err = sid("generate", tmp_path / "sid", "The", "--max-new-tokens", "3", "--greedy")
    assert status == 0, err


def test_training_goes_on_from_an_upcycled_llama(tmp_path, llama, corpus, sid):
    """2-simplicial layers change nothing at first, and training from there lowers the loss."""
    out, run = tmp_path / "sid", tmp_path / "run"
    status, said, err = sid("convert", llama, out, "--simplicial-every", "2", "--simplicial-window", "32", "4")
    assert status == 0, err
    start = bits_per_byte(sid, out, corpus, tmp_path)
    assert start == pytest.approx(bits_per_byte(sid, llama, corpus, tmp_path), rel=1e-5)
    words = ("train", "--model.init_from", out, *RUN, "--data.train", corpus, "--train.out", run, "--optim.lr", "3e-3")
    status, said, err = sid(*words, "--train.steps", "10", "--checkpoint.every", "5")
    assert status == 0, err
    assert f"started from {out}" in said
    model = SidForCausalLM.from_pretrained(run / "model")
    assert model.config.layer_types == ["full_attention", "simplicial_attention"]
    assert model.model.layers[1].self_attn.k2_proj.weight.abs().max() > 1e-4
    after = bits_per_byte(sid, run, corpus, tmp_path)
    assert after < start - 0.01, (start, after)
    # a run that goes on needs the folder's config, not its weights; and stays the run it was
    (out / "model.safetensors").unlink()
    status, said, err = sid(*words, "--train.steps", "12")
    assert status == 0 and "from step 10" in said, err
    # but a new one that would start at random is refused
    status, said, err = sid(*words[:-4], "--train.out", tmp_path / "other", "--train.steps", "2")
    assert status == 2 and "no model.safetensors" in err


def test_squared_relu_is_fitted_on_text(tmp_path, llama, corpus, sid):
    options = ("--squared-relu", corpus, "--rows", "20", "--row-tokens", "32", "--squared-relu-steps", "50")
    status, said, err = sid("convert", llama, tmp_path / "sid", *options)
    assert status == 0, err
    assert said.count("squared ReLU of width 96, relative error on held-out text") == 2
    assert "loss on held-out text: " in said
    assert SidForCausalLM.from_pretrained(tmp_path / "sid").config.mlp_type == "squared_relu"


def test_a_gguf_file(tmp_path, llama, sid):
    pytest.importorskip("gguf")
    status, _, err = sid("convert", llama, tmp_path / "gguf", "--to", "gguf")
    assert status == 0 and (tmp_path / "gguf" / "model.gguf").is_file(), err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shards", "2"), "--shards is for --to meta, not sid"),
        (("--to", "llama", "--portable"), "--portable is for --to sid, not llama"),
        (("--to", "meta", "--simplicial-every", "2"), "they need --to sid, not meta"),
        (("--to", "meta", "--shards", "3"), "cannot be cut over 3 ranks"),
        (("--simplicial-every", "9"), "every 9th layer cannot be 2-simplicial in a model with 2 layers"),
        (("--squared-relu", "CORPUS", "--rows", "100000"), "fewer than --rows 100000 x --row-tokens 512"),
        (("--squared-relu", "nowhere.txt"), "nowhere.txt"),
        (
            ("--squared-relu", "CORPUS", "--rows", "4", "--row-tokens", "8", "--squared-relu-width", "130"),
            "at most 128",
        ),
    ],
)
def test_mistakes(tmp_path, llama, corpus, fails, options, message):
    words = [str(corpus) if word == "CORPUS" else word for word in options]
    assert message in fails("convert", llama, tmp_path / "out", *words)
    assert list(tmp_path.iterdir()) == []  # not even half a folder


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path, llama, fails, monkeypatch):
    (tmp_path / "out").mkdir()
    assert "out exists: choose a new folder" in fails("convert", llama, tmp_path / "out")
    from sidlm.models.convert import meta_layout

    monkeypatch.setattr(meta_layout, "to_neighbours", lambda weight, heads: weight)
    said = fails("convert", llama, tmp_path / "wrong", "--to", "meta")
    assert "the converted model computes something else" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_init_from_mistakes(tmp_path, llama, corpus, fails):
    words = ("train", *RUN, "--data.train", corpus, "--train.out", tmp_path / "run", "--train.steps", "2")
    assert "no config.json" in fails(*words, "--model.init_from", tmp_path)
    near = fails(*words, "--model.init_from", llama, "--model.set", "sliding_windw=3")
    assert "unknown SidConfig field 'sliding_windw'; did you mean 'sliding_window'" in near
    shape = fails(*words, "--model.init_from", llama, "--model.set", "intermediate_size=32")
    assert "has shape (64, 32), but (32, 32) by its config" in shape
    few = fails(*words, "--model.init_from", llama, "--model.set", "vocab_size=400")
    assert "vocab_size=400 is below the tokenizer's" in few
