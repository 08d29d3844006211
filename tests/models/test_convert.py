"""Checkpoints from layout to layout: transformers' logits, Meta's files, bounded memory."""

import importlib
import json
import subprocess
import sys
import types

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.errors import SidError
from sidlm.models import SidForCausalLM
from sidlm.models.convert import check, meta_layout
from sidlm.models.convert.meta_reader import MetaCheckpoint
from sidlm.models.convert.run import Cast, convert, open_checkpoint
from sidlm.models.convert.safetensors_writer import write_safetensors
from sidlm.models.convert.source import Entry

LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES = {
    "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama3.1": {"rope_parameters": LLAMA31, "num_attention_heads": 8, "intermediate_size": 112},
    "llama3.2": {"rope_parameters": LLAMA31 | {"factor": 32.0}, "tie_word_embeddings": True},
    "mha": {"rope_parameters": LLAMA31, "num_key_value_heads": 4},
}  # fmt: skip


def save_llama(folder, name: str = "llama3", dtype=torch.float32, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    fields = {
        "vocab_size": 136, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
    } | SHAPES[name] | overrides  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval().to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def go(source, target, **kwargs):
    target.mkdir()
    return convert(open_checkpoint(source), target, **kwargs)


def prompt(length: int = 40) -> torch.Tensor:
    return torch.randint(0, 136, (1, length), generator=torch.Generator().manual_seed(1))


def meta_shards(model: LlamaForCausalLM, ranks: int) -> list[dict[str, torch.Tensor]]:
    """Meta's files of a Llama, made by hand: the converter's oracle. Pairs (i, i + D/2) become (2i, 2i+1)."""
    config, out = model.config, [{} for _ in range(ranks)]
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
             "gate_proj": "feed_forward.w1", "down_proj": "feed_forward.w2", "up_proj": "feed_forward.w3",
             "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    top = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
           "lm_head.weight": "output.weight"}  # fmt: skip
    for name, weight in model.state_dict().items():
        weight, kind, kv = weight.clone(), name.split(".")[-2], False
        if kind in heads:
            d = config.head_dim
            order = torch.arange(d).view(2, d // 2).T.flatten()  # row 2i of a head was row i, row 2i + 1 was i + D/2
            weight = weight.view(heads[kind], d, -1)[:, order].reshape(weight.shape)
        if kind in ("k_proj", "v_proj") and ranks > config.num_key_value_heads:
            kv = True
        meta = top.get(name) or f"layers.{name.split('.')[2]}.{names[kind]}.weight"
        for rank, shard in enumerate(out):
            if weight.ndim == 1:
                shard[meta] = weight
            elif kv:
                per = ranks // config.num_key_value_heads
                shard[meta] = weight.chunk(config.num_key_value_heads)[rank // per].clone()
            else:
                shard[meta] = weight.chunk(ranks, dim=1 if kind in ("o_proj", "down_proj") else 0)[rank].clone()
    return out


def params(model: LlamaForCausalLM, **changes) -> dict:
    config = model.config
    return {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "vocab_size": config.vocab_size, "multiple_of": 16,
        "ffn_dim_multiplier": 1.0, "norm_eps": config.rms_norm_eps, "rope_theta": 500000.0,
        "use_scaled_rope": config.rope_parameters["rope_type"] == "llama3",
    } | changes  # fmt: skip


def save_meta(folder, model, ranks: int, **changes):
    folder.mkdir()
    for rank, shard in enumerate(meta_shards(model, ranks)):
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params(model, **changes)))
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(SHAPES))
def test_metas_files_become_a_sid_model_with_transformers_logits(tmp_path, name, ranks):
    theirs = save_llama(tmp_path / "hf", name)
    # four ranks have more than the two key/value heads: n_kv_heads then counts the repeated ones, as for 405B on 16
    kv_heads = max(ranks, theirs.config.num_key_value_heads)
    source = save_meta(tmp_path / "meta", theirs, ranks, n_kv_heads=kv_heads)
    report = go(source, tmp_path / "sid", max_bytes=60_000)
    assert report.check.ok and report.parameters == sum(p.numel() for p in theirs.parameters())
    model = SidForCausalLM.from_pretrained(tmp_path / "sid")
    assert model.config.num_key_value_heads == theirs.config.num_key_value_heads
    rope = model.config.rope_parameters
    assert {key: rope[key] for key in theirs.config.rope_parameters} == theirs.config.rope_parameters
    with torch.no_grad():
        torch.testing.assert_close(model(prompt()).logits, theirs(prompt()).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", list(SHAPES))
def test_the_way_there_and_back_changes_no_bit(tmp_path, name, ranks):
    theirs = save_llama(tmp_path / "hf", name, torch.bfloat16)
    go(tmp_path / "hf", tmp_path / "sid")
    go(tmp_path / "sid", tmp_path / "llama", layout="llama")
    go(tmp_path / "llama", tmp_path / "meta", layout="meta", ranks=ranks)
    written = [torch.load(p, weights_only=True, mmap=True) for p in sorted((tmp_path / "meta").glob("*.pth"))]
    for file, expected in zip(written, meta_shards(theirs, ranks), strict=True):
        assert file.keys() == expected.keys()
        assert all(torch.equal(file[key], expected[key]) for key in expected)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in file.values())
    saved = json.loads((tmp_path / "meta" / "params.json").read_text())
    wanted = params(theirs, n_kv_heads=max(ranks, theirs.config.num_key_value_heads))
    assert {k: v for k, v in saved.items() if k in wanted and k not in ("multiple_of", "ffn_dim_multiplier")} == {
        k: v for k, v in wanted.items() if k not in ("multiple_of", "ffn_dim_multiplier")
    }
    go(tmp_path / "meta", tmp_path / "again", layout="llama")
    again, before = load_file(tmp_path / "again" / "model.safetensors"), theirs.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in again.items())
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    for field in ("rope_parameters", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(reloaded.config, field) == getattr(theirs.config, field), field
    assert reloaded.dtype == torch.bfloat16


def test_torch_save_and_the_streaming_writer_give_the_same_tensors(tmp_path):
    theirs = save_llama(tmp_path / "hf", "llama3.2")
    go(tmp_path / "hf", tmp_path / "meta", layout="meta")
    file = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    assert file["output.weight"].data_ptr() == file["tok_embeddings.weight"].data_ptr()  # stored once
    torch.save(file, tmp_path / "copy.pth")
    size = (tmp_path / "meta" / "consolidated.00.pth").stat().st_size
    assert abs(size - (tmp_path / "copy.pth").stat().st_size) < 200 * len(theirs.state_dict())


@pytest.fixture
def reference(monkeypatch):
    """llama-models' module of the model. The fairscale layers that it is made of are plain ones on a single rank."""
    pytest.importorskip("llama_models.llama3.args")

    class Linear(torch.nn.Linear):
        def __init__(self, rows: int, columns: int, bias: bool, **_):
            super().__init__(rows, columns, bias=bias)

    class Embedding(torch.nn.Embedding):
        def __init__(self, rows: int, columns: int, **_):
            super().__init__(rows, columns)

    parts = {"initialize": {"get_model_parallel_world_size": lambda: 1},
             "layers": {"ColumnParallelLinear": Linear, "RowParallelLinear": Linear,
                        "VocabParallelEmbedding": Embedding}}  # fmt: skip
    for name in ("fairscale", "fairscale.nn", "fairscale.nn.model_parallel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, content in parts.items():
        module = types.ModuleType(f"fairscale.nn.model_parallel.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        setattr(sys.modules["fairscale.nn.model_parallel"], name, module)
    monkeypatch.delitem(sys.modules, "llama_models.llama3.model", raising=False)
    return importlib.import_module("llama_models.llama3.model")


@pytest.mark.parametrize("name", ["llama3", "llama3.1", "mha"])  # Meta's code has the factor 8 built in, and never ties
def test_the_llama_models_reference_gives_the_same_logits(tmp_path, reference, name):
    """Meta's own code on the files written here, and what is read from them again."""
    from llama_models.llama3.args import ModelArgs

    theirs = save_llama(tmp_path / "hf", name)
    go(tmp_path / "hf", tmp_path / "meta", layout="meta")
    fields = json.loads((tmp_path / "meta" / "params.json").read_text()) | {"max_seq_len": 64, "max_batch_size": 1}
    model = reference.Transformer(ModelArgs(**fields))
    weights = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    model.load_state_dict(weights, strict=True)
    go(tmp_path / "meta", tmp_path / "sid")
    ours = SidForCausalLM.from_pretrained(tmp_path / "sid")
    with torch.no_grad():
        expected = model(prompt(), 0)
        torch.testing.assert_close(theirs(prompt()).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours(prompt()).logits, expected, rtol=0, atol=1e-5)


def test_sizes_of_the_feed_forward_layer():
    """Meta's rule gives Llama 3's widths, and what is written gives the width back."""
    assert meta_layout.ffn_rule(4096, 14336) == (1.3, 1024)
    for dim, width in [(4096, 14336), (8192, 28672), (16384, 53248), (2048, 8192), (3072, 8192), (64, 96), (48, 101)]:
        multiplier, multiple = meta_layout.ffn_rule(dim, width)
        assert -(-int(multiplier * int(8 * dim / 3)) // multiple) * multiple == width


def test_rope_factor_of_metas_files(tmp_path):
    """The published files do not say: 8 for Llama 3.1, 32 with tied embeddings (3.2), or what the user says."""
    for tied, expected in ((False, 8.0), (True, 32.0)):
        folder = save_meta(
            tmp_path / f"{tied}", save_llama(tmp_path / f"hf{tied}", "llama3.1", tie_word_embeddings=tied), 1
        )
        assert MetaCheckpoint(folder).config.rope_parameters["factor"] == expected
        assert open_checkpoint(folder, rope_factor=4.0).config.rope_parameters["factor"] == 4.0


def test_other_dtypes(tmp_path):
    theirs = save_llama(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    report = convert(Cast(open_checkpoint(tmp_path / "hf"), torch.bfloat16), tmp_path / "out")
    assert report.check.ok
    model = SidForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight.bfloat16())


def test_sid_models_and_experts_stream_too(tmp_path, model_of):
    for kind, overrides in {
        "mixed": {},
        "determinant": {"tie_word_embeddings": True},
        "full": {"num_local_experts": 3},
    }.items():
        model = model_of(kind, **overrides)
        model.save_pretrained(tmp_path / kind)
        source = open_checkpoint(tmp_path / kind)
        ids = torch.randint(0, 97, (1, 20))
        with torch.no_grad():
            torch.testing.assert_close(check.streamed_logits(source, ids), model(ids).logits[0], rtol=0, atol=2e-5)
        go(tmp_path / kind, tmp_path / f"{kind}-out")
        again = SidForCausalLM.from_pretrained(tmp_path / f"{kind}-out")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert again.config.to_diff_dict() == model.config.to_diff_dict() | {"dtype": "float32"}


def test_the_check_finds_a_wrong_permutation(tmp_path, monkeypatch):
    save_llama(tmp_path / "hf")
    monkeypatch.setattr(meta_layout, "to_neighbours", lambda weight, heads: weight)
    with pytest.raises(SidError, match="the converted model computes something else: logits on 32 random tokens"):
        go(tmp_path / "hf", tmp_path / "meta", layout="meta")


def test_the_check_knows_nan():
    logits = torch.full((3, 5), torch.nan)
    assert not check.compare(logits, logits).ok


def test_files_start_where_torch_would_put_them(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.zeros(0, 4), "d": torch.randn(2, 2)}
    entries = {name: Entry(tuple(x.shape), x.dtype) for name, x in tensors.items()}
    write_safetensors(tmp_path, entries, tensors.__getitem__, max_bytes=70)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in tensors.values())
    assert index["metadata"]["total_parameters"] == 15 + 7 + 4
    assert len(set(index["weight_map"].values())) == 2
    for share in ((1, 2), (0, 2)):  # two processes write the same folder
        (tmp_path / "shared").mkdir(exist_ok=True)
        write_safetensors(tmp_path / "shared", entries, tensors.__getitem__, max_bytes=70, share=share)
    for path in (tmp_path / "shared").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    assert len(list((tmp_path / "shared").iterdir())) == 3
    for name, file in index["weight_map"].items():
        content = (tmp_path / file).read_bytes()
        assert (8 + int.from_bytes(content[:8], "little")) % 64 == 0
        with safe_open(tmp_path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), tensors[name])
    with pytest.raises(ValueError, match=r"b .* was announced, got \(3, 5\)"):
        write_safetensors(tmp_path, {"b": entries["b"]}, {"b": tensors["a"]}.__getitem__)


MEMORY = """
import sys
from pathlib import Path
import torch
from sidlm.models.convert import run
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
root = Path(sys.argv[1])
warm = run.open_checkpoint(root / "hf")  # imports what it needs
run.logits(warm, torch.zeros(1, 4, dtype=torch.long))
ways = ("hf", "sid", {}), ("sid", "meta", dict(layout="meta", ranks=2)), ("meta", "llama", dict(layout="llama"))
for source, target, kwargs in ways:
    (root / target).mkdir()
    reset()
    before = peak()
    run.convert(run.open_checkpoint(root / source), root / target, **kwargs)
    print(target, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded_by_a_layer(tmp_path):
    """A model of 80 MB of which one block, in fp32 for the check, is a twentieth."""
    save_llama(tmp_path / "hf", hidden_size=256, intermediate_size=1024, num_hidden_layers=20, vocab_size=512)
    weights = (tmp_path / "hf" / "model.safetensors").stat().st_size
    script = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True)
    assert script.returncode == 0, script.stderr[-2000:]
    peaks = {line.split()[0]: int(line.split()[1]) for line in script.stdout.splitlines()}
    assert weights > 75e6 and peaks.keys() == {"sid", "meta", "llama"}
    assert max(peaks.values()) < 0.35 * weights, (peaks, weights)
