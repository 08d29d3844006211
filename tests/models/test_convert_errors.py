"""Broken and hostile checkpoints: one clear error each, and nothing in them is ever run."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.errors import SidError
from sidlm.models.convert.run import convert, open_checkpoint


class Payload:
    """Pickled, it creates a file where it is loaded by a reader that trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    return tmp_path / "llama"


@pytest.fixture
def meta(llama, tmp_path):
    (tmp_path / "meta").mkdir()
    convert(open_checkpoint(llama), tmp_path / "meta", layout="meta", ranks=2)
    return tmp_path / "meta"


def refuses(folder, *words: str) -> str:
    with pytest.raises(SidError) as caught:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    return message


def rewrite(path, change) -> None:
    """A JSON file or a .pth changed in place."""
    if path.suffix == ".pth":
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)
    else:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


# ---- folders of transformers ----


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def test_a_truncated_shard(llama):
    path = shards(llama)[1]
    path.write_bytes(path.read_bytes()[:-100])
    refuses(llama, str(path), "not a whole safetensors file")


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}"])
def test_a_shard_that_is_none(llama, content):
    path = shards(llama)[0]
    path.write_bytes(content)
    refuses(llama, str(path), "not a whole safetensors file")


def test_a_missing_shard(llama):
    path = shards(llama)[1]
    path.unlink()
    refuses(llama, f"{path.name} is missing", f"one of the {len(shards(llama)) + 1} files")


def test_an_index_that_leads_out_of_the_folder(llama):
    rewrite(llama / "model.safetensors.index.json", lambda index: index["weight_map"].update(x="../secret.safetensors"))
    refuses(llama, "'../secret.safetensors' is no file name")


def test_a_missing_weight_and_one_too_many(llama):
    tensors = load_file(shards(llama)[1])
    gone_name = min(tensors)
    gone = tensors.pop(gone_name)
    save_file(tensors | {"extra.weight": gone}, shards(llama)[1])
    refuses(llama, "1 weights are missing, the first is model.layers.")
    save_file(load_file(shards(llama)[1]) | {gone_name: gone}, shards(llama)[1])
    refuses(llama, "1 weights that config.json has no place for, the first is extra.weight")


def test_a_weight_of_another_shape(llama):
    path = next(p for p in shards(llama) if "model.layers.1.mlp.up_proj.weight" in load_file(p))
    save_file(load_file(path) | {"model.layers.1.mlp.up_proj.weight": torch.zeros(47, 32)}, path)
    refuses(llama, "model.layers.1.mlp.up_proj.weight has shape (47, 32), but (48, 32) by its config")


def test_weights_that_are_a_pickle(llama):
    for path in [*shards(llama), llama / "model.safetensors.index.json"]:
        path.unlink()
    (llama / "pytorch_model.bin").write_bytes(b"")
    refuses(llama, "no model.safetensors", "pytorch_model.bin is a pickle, which is not read")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, ("model_type must be 'llama' or 'sid', got 'gpt2'",)),
        ({"hidden_act": "gelu"}, ("hidden_act must be 'silu'", "'gelu'")),
        ({"num_key_value_heads": 3}, ("num_attention_heads (4) must be a multiple of num_key_value_heads (3)",)),
        ({"model_type": "sid", "layer_types": ["full_attention", "mystery_attention"]},
         ("layer_types[1] must be one of", "'mystery_attention'")),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, ("rope_type 'yarn'",)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, ("low_freq_factor",)),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be(llama, change, words):
    rewrite(llama / "config.json", lambda config: config.update(change))
    refuses(llama, *words)


def test_a_config_that_is_no_json(llama):
    (llama / "config.json").write_text("{'a': 1}")
    refuses(llama, "config.json is not valid JSON")


# ---- Meta's layout ----


def test_code_in_a_pth_is_not_run(meta, tmp_path):
    path = meta / "consolidated.01.pth"
    torch.save({"norm.weight": Payload(tmp_path / "ran")}, path)
    refuses(meta, str(path), "is refused, for it holds more than tensors", "open")
    assert not (tmp_path / "ran").exists()


def test_a_bare_pickle_is_not_run(meta, tmp_path):
    (meta / "consolidated.00.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    refuses(meta, "consolidated.00.pth", "not a whole file of torch.save")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_pth(meta):
    path = meta / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refuses(meta, str(path), "not a whole file of torch.save")


def test_a_storage_that_is_cut_short(meta):
    """The archive is whole, but a storage holds fewer bytes than the pickle says."""
    path = meta / "consolidated.00.pth"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content[:8] if name.endswith("/data/0") else content)
    refuses(meta, "consolidated.00.pth: the tensors take", "but the file stores")


def test_a_missing_rank(meta):
    (meta / "consolidated.00.pth").unlink()
    refuses(meta, "consolidated.00.pth is missing, there is consolidated.01.pth")


@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "norm_eps", "rope_theta"])
def test_params_without_a_key(meta, name):
    rewrite(meta / "params.json", lambda params: params.pop(name))
    refuses(meta, f"params.json: {name} is missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_heads": -4}, ("n_heads must be a number above 0, got -4",)),
        ({"dim": "wide"}, ("dim must be a number above 0, got 'wide'",)),
        ({"n_layers": 3}, ("weights are missing", "model.layers.2.")),
        ({"n_layers": 1}, ("tensors that params.json has no place for", "layers.1.")),
        ({"n_heads": 8}, ("wk has",)),
        ({"quantization_args": {"scheme": "int8"}}, ("quantised and vision checkpoints are not read",)),
    ],
)
def test_params_that_cannot_be(meta, change, words):
    rewrite(meta / "params.json", lambda params: params.update(change))
    refuses(meta, *words)


def test_params_that_are_no_object(meta):
    (meta / "params.json").write_text("[1]")
    refuses(meta, "params.json must hold a JSON object, got list")


def test_ranks_that_disagree(meta):
    rewrite(meta / "consolidated.01.pth", lambda file: file.update({"norm.weight": torch.zeros(31)}))
    refuses(meta, "norm.weight is (32,) torch.float32 on rank 0, but (31,) torch.float32 on rank 1")
    rewrite(meta / "consolidated.01.pth", lambda file: file.update({"norm.weight": torch.zeros(32)}))
    refuses(meta, "norm.weight must be the same on all 2 ranks, but is not")
    rewrite(meta / "consolidated.01.pth", lambda file: file.pop("norm.weight"))
    refuses(meta, "norm.weight is not on all of the ranks 0 and 1")


def test_repeated_heads_that_are_not_in_a_later_layer(llama, tmp_path):
    (tmp_path / "four").mkdir()
    convert(open_checkpoint(llama), tmp_path / "four", layout="meta", ranks=4)
    path = tmp_path / "four" / "consolidated.01.pth"
    rewrite(path, lambda file: file["layers.1.attention.wv.weight"].add_(1))
    refuses(tmp_path / "four", "layers.1.attention.wv.weight does not repeat its heads as those of layer 0")


def test_a_file_that_holds_no_dictionary(meta):
    torch.save([torch.zeros(2)], meta / "consolidated.00.pth")
    refuses(meta, "consolidated.00.pth must hold a dictionary of tensors")


def test_folders_that_are_none(tmp_path):
    refuses(tmp_path, "holds neither config.json nor params.json")
    refuses(tmp_path / "x", "no such folder")


# ---- what cannot be written ----


@pytest.mark.parametrize(
    ("kind", "overrides", "layout", "words"),
    [
        ("mixed", {}, "llama", "layers of type simplicial_attention, sliding_attention"),
        ("full", {"mlp_type": "squared_relu"}, "meta", "mlp_type is squared_relu"),
        ("full", {"num_local_experts": 2}, "gguf", "2 experts"),
        ("full", {"head_dim": 16}, "meta", "head_dim is 16, hidden_size 48 and num_attention_heads 4"),
    ],
)
def test_models_that_a_layout_cannot_hold(tmp_path, model_of, kind, overrides, layout, words):
    model_of(kind, **overrides).save_pretrained(tmp_path / "sid")
    (tmp_path / "out").mkdir()
    with pytest.raises(SidError, match=words):
        convert(open_checkpoint(tmp_path / "sid"), tmp_path / "out", layout=layout)
