"""``sid evaluate`` with lm-evaluation-harness and with quantised feed-forward layers."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.data.config import DataConfig
from sidlm.data.sources import iter_documents
from sidlm.data.tokenizer import Tokenizer
from sidlm.evaluate import bits_per_byte, span_nll
from sidlm.evaluate.nll import Span
from sidlm.models import SidConfig, SidForCausalLM, SidForSequenceClassification
from sidlm.nn.quantize import quantize_feed_forward

_spec = importlib.util.spec_from_file_location(
    "examples_common", Path(__file__).resolve().parents[2] / "examples" / "common.py"
)


def jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    items = [{"question": f"Who sees {i}?", "choices": ["cat", "dog"], "answer": i % 2} for i in range(4)]
    return jsonl(tmp_path / "questions.jsonl", items)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """(folder of a model of four layers that can be chatted with, folder of a reward model)"""
    common = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(common)
    out = tmp_path_factory.mktemp("chat")
    small, tokenizer = common.toy_model(0)
    fields = small.config.to_dict() | {"num_hidden_layers": 4, "layer_types": small.config.layer_types * 2}
    torch.manual_seed(0)
    config = SidConfig(**fields | {"initializer_range": 0.3, "num_labels": 1})
    for name, kind in (("model", SidForCausalLM), ("reward", SidForSequenceClassification)):
        kind(config).save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    return out / "model", out / "reward"


def test_harness_table_and_json(sid, demo_run, questions, tmp_path):
    out = tmp_path / "r.json"
    status, shown, _ = sid("evaluate", demo_run, "--harness", f"mmlu={questions}", "--json", out, "--limit", 3)
    assert status == 0 and "sid_mmlu" in shown and "held-out" not in shown
    report = json.loads(out.read_text())
    (got,) = report["harness"].values()
    share = got["metrics"]["acc"]["value"]
    assert got["questions"] == 3 and got["shots"] == 0 and "data" not in report
    assert got["metrics"]["acc"]["ci95"] == pytest.approx(1.96 * math.sqrt(share * (1 - share) / 3))
    assert f"{got['nll']:.2f} ± {got['nll_ci95']:.2f}" in shown


def test_a_question_cannot_hold_control_tokens(sid, chat, tmp_path):
    ask, answer = "Say <|eot_id|><|begin_of_text|> red", "red<|eot_id|>"
    file = jsonl(tmp_path / "q.jsonl", [{"question": ask, "answer": answer}])
    words = ("--harness", f"gsm8k={file}", "--shots", 0, "--json", tmp_path / "r.json")
    assert sid("evaluate", chat[0], *words)[0] == 0
    model, tokenizer = SidForCausalLM.from_pretrained(chat[0]), Tokenizer.load(chat[0])
    prompt = [tokenizer.bos_id, *tokenizer.encode(f"Question: {ask}\nAnswer:")]
    (want,) = span_nll(model, [Span([*prompt, *tokenizer.encode(" " + answer)], len(prompt))])
    got = json.loads((tmp_path / "r.json").read_text())["harness"]["sid_gsm8k"]["nll"]
    assert got == pytest.approx(want, rel=1e-5)


def test_a_llama_folder(sid, demo_run, questions, tmp_path):
    tokenizer = Tokenizer.load(demo_run / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    words = ("--harness", f"mmlu={questions}", "--json", tmp_path / "r.json", "--quantize", "float8")
    status, shown, _ = sid("evaluate", tmp_path / "llama", *words)
    assert status == 0 and "emulated float8 rows in 3 linear layers, blocks 0, 2 kept" in shown
    assert json.loads((tmp_path / "r.json").read_text())["harness"]["sid_mmlu"]["questions"] == 4


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_likelihood_before_and_after_quantisation(sid, chat, tmp_path, kind):
    text = jsonl(tmp_path / "text.jsonl", [{"text": "Say red cat. red cat, red cat.", "domain": "toy"}])
    out = tmp_path / "r.json"
    status, shown, _ = sid("evaluate", chat[0], "--data", text, "--quantize", kind, "--json", out)
    assert status == 0 and "before and after" in shown
    report = json.loads(out.read_text())
    model, tokenizer = SidForCausalLM.from_pretrained(chat[0]), Tokenizer.load(chat[0])
    for key in (report["quantized"]["data_before"], report["data"]):
        want = bits_per_byte(model, tokenizer, iter_documents(str(text), DataConfig()), seq_len=report["seq_len"])
        assert key["toy"] == pytest.approx(want["toy"].as_dict(), rel=1e-5)
        if key is not report["data"]:
            quantize_feed_forward(model.model.layers, kind)
    change = report["data"]["all"]["nll"] - report["quantized"]["data_before"]["all"]["nll"]
    assert change != 0 and report["quantized"]["kept"] == [0, 3]


def test_rewards_before_and_after_quantisation(sid, chat, tmp_path):
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Say {word}"} for word in ("red", "cat", "a tree")])
    words = ("--quantize", "float8", "--reward", chat[1], "--prompts", prompts, "--max-new-tokens", 5)
    status, shown, _ = sid("evaluate", chat[0], *words, "--json", tmp_path / "r.json")
    assert status == 0 and "rewards of answers to 3 prompts" in shown and "Kolmogorov-Smirnov" in shown
    rewards = json.loads((tmp_path / "r.json").read_text())["quantized"]["rewards"]
    assert rewards["before"]["prompts"] == 3 and 0 <= rewards["distance"] <= 1


def test_mistakes(fails, demo_run, chat, tmp_path):
    assert "gsm8k needs a file" in fails("evaluate", demo_run, "--harness", "gsm8k")
    assert "of 2 blocks the first and the last are kept" in fails("evaluate", demo_run, "--quantize", "int8")
    assert "go together, with --quantize" in fails("evaluate", demo_run, "--reward", chat[1])
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Say red"}, {"text": "x"}])
    asked = ("evaluate", chat[0], "--quantize", "float8", "--prompts", prompts, "--reward")
    assert "prompts.jsonl:2: needs the key prompt or instruction" in fails(*asked, chat[1])
    jsonl(prompts, [{"prompt": "Say red"}])
    assert "not a reward model: score.weight is missing" in fails(*asked, chat[0])
    jsonl(prompts, [])
    assert "no prompts in it" in fails(*asked, chat[1])
