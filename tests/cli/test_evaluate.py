from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sidlm.data.config import DataConfig
from sidlm.data.sources import iter_documents
from sidlm.data.tokenizer import Tokenizer, train_tokenizer
from sidlm.evaluate import bits_per_byte
from sidlm.models import SidForCausalLM


@pytest.fixture
def copy(demo_run, tmp_path):
    """A run folder that a test may break."""
    return shutil.copytree(demo_run, tmp_path / "broken")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = [{"text": "The cat sees a dog.", "domain": "animals"}, {"text": "A red house.", "domain": "things"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_table_and_json_hold_what_bits_per_byte_says(sid, demo_run, text, tmp_path):
    out = tmp_path / "results" / "r.json"
    status, shown, err = sid("evaluate", demo_run, "--data", text, "--json", out, "--seq-len", 16)
    assert status == 0 and not err
    model = SidForCausalLM.from_pretrained(demo_run / "model")
    tokenizer = Tokenizer.load(demo_run / "model")
    want = bits_per_byte(model, tokenizer, iter_documents(str(text), DataConfig()), seq_len=16)
    got = json.loads(out.read_text())
    assert got["seq_len"] == 16 and list(got["data"]) == ["animals", "things", "all"]
    for domain, part in want.items():
        assert got["data"][domain] == pytest.approx(part.as_dict(), rel=1e-5)
        # the table shows what the file holds; the other loading of the model may differ in the last bits
        assert domain in shown and f"{got['data'][domain]['bits_per_byte']:.4f}" in shown


def test_without_data_the_documents_that_training_held_out(sid, demo_run, corpus, tmp_path):
    out = tmp_path / "r.json"
    assert sid("evaluate", demo_run, "--json", out)[0] == 0
    got = json.loads(out.read_text())
    assert got["seq_len"] == 32  # the run's row length
    assert 1 <= got["data"]["all"]["documents"] < 12
    last = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()][-1]["valid"]["all"]
    assert got["data"]["all"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)


def test_tasks(sid, demo_run, tmp_path):
    task = tmp_path / "task.jsonl"
    items = [{"question": "Who?", "choices": ["cat", "dog"], "answer": i % 2} for i in range(4)]
    task.write_text("".join(json.dumps(item) + "\n" for item in items))
    out = tmp_path / "r.json"
    status, shown, err = sid("evaluate", demo_run, "--tasks", task, "--json", out)
    assert status == 0 and not err and "50.0 ± 49.0" in shown
    (got,) = json.loads(out.read_text())["tasks"].values()
    assert got["questions"] == 4 and got["accuracy"] == 0.5 and got["chance"] == 0.5
    assert got["accuracy_ci95"] == pytest.approx(0.49)


def test_folders_that_are_no_model(fails, demo_run, text, tmp_path):
    assert fails("evaluate", tmp_path / "absent", "--data", text) == f"no such folder: {tmp_path / 'absent'}"
    assert fails("evaluate", text, "--data", text).startswith(f"not a folder: {text}")
    (tmp_path / "empty").mkdir()
    assert fails("evaluate", tmp_path / "empty", "--data", text).startswith(f"no config.json in {tmp_path / 'empty'}")


def test_tokenizer_missing(fails, copy, text):
    (copy / "model" / "tokenizer.json").unlink()
    assert fails("evaluate", copy, "--data", text).startswith(f"no tokenizer.json in {copy / 'model'}")


def test_tokenizer_larger_than_the_model_names_both_numbers(fails, copy, text):
    large = train_tokenizer(["some other text that is longer " * 9], 700)
    size = json.loads((copy / "model" / "config.json").read_text())["vocab_size"]
    config = json.loads((copy / "model" / "config.json").read_text()) | {"vocab_size": large.vocab_size - 1}
    (copy / "model" / "config.json").write_text(json.dumps(config))
    large.save(copy / "model")
    assert f"the tokenizer has {large.vocab_size} tokens but the model only {large.vocab_size - 1}" in fails(
        "evaluate", copy, "--data", text
    )
    assert size  # the model itself had another one


def test_data_that_is_missing_or_empty(fails, demo_run, tmp_path):
    assert "nowhere.txt' does not exist" in fails("evaluate", demo_run, "--data", tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text("")
    assert fails("evaluate", demo_run, "--data", tmp_path / "empty.txt").startswith(
        f"no text in {tmp_path / 'empty.txt'}"
    )
    (tmp_path / "folder").mkdir()
    assert "holds no text" in fails("evaluate", demo_run, "--data", tmp_path / "folder")


def test_a_damaged_shard_is_named(fails, demo_run, tmp_path):
    broken = tmp_path / "broken.jsonl.zst"
    broken.write_bytes(b"\x28\xb5\x2f\xfd not zstd after the magic")
    assert str(broken) in fails("evaluate", demo_run, "--data", broken)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "fine"}\n{"text": \n')
    message = fails("evaluate", demo_run, "--data", lines)
    assert str(lines) in message and "2" in message


def test_wrong_checkpoint_shape_names_the_weight_and_both_shapes(fails, copy, text):
    file = copy / "model" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = torch.zeros(8, 8)
    save_file(weights, file, metadata={"format": "pt"})
    assert fails("evaluate", copy, "--data", text) == (
        f"{copy / 'model'}: {name} has shape (8, 8) in the checkpoint but (32, 32) by config.json"
    )


def test_a_missing_weight_is_named_instead_of_made_up(fails, copy, text):
    file = copy / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.self_attn.k2_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    assert "1 weights are missing in the checkpoint, the first is model.layers.1.self_attn.k2_proj.weight" in fails(
        "evaluate", copy, "--data", text
    )


def test_weights_that_are_cut_off(fails, copy, text):
    file = copy / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert str(copy / "model") in fails("evaluate", copy, "--data", text)
    file.unlink()
    assert str(copy / "model") in fails("evaluate", copy, "--data", text)
    (copy / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Path.cwd()))
    assert "pytorch_model.bin is a pickle, which is not read" in fails("evaluate", copy, "--data", text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"simplicial_window": [0, 4]}, ("simplicial_window", "0, 4")),
        ({"hidden_size": "wide"}, ("hidden_size", "wide")),
        ({"layer_types": ["full_attention"]}, ("layer_types has 1 entries", "num_hidden_layers is 2")),
        ({"num_key_value_heads": 3}, ("num_attention_heads (4)", "num_key_value_heads (3)")),
    ],
)
def test_a_config_that_describes_no_model(fails, copy, text, change, words):
    path = copy / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    message = fails("evaluate", copy, "--data", text)
    assert message.startswith(str(path)) and all(word in message for word in words)


def test_a_config_that_is_not_json(fails, copy, text):
    path = copy / "model" / "config.json"
    path.write_text("{")
    assert str(path) in fails("evaluate", copy, "--data", text)


def test_other_mistakes(fails, demo_run, copy, text, tmp_path):
    assert "--seq-len 257 exceeds the model's 256 positions" in fails(
        "evaluate", demo_run, "--data", text, "--seq-len", 257
    )
    assert "no such task file" in fails("evaluate", demo_run, "--tasks", tmp_path / "no.jsonl")
    shutil.copytree(copy / "model", tmp_path / "alone")
    assert fails("evaluate", tmp_path / "alone").startswith("nothing to evaluate")
    assert "--device 'nonsense'" in fails("evaluate", demo_run, "--data", text, "--device", "nonsense")
