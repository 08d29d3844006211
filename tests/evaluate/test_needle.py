"""Needles: a model that copies reads all of them, a random one none; and the command."""

import json

import pytest
import torch

from sidlm.cli.evaluate import main
from sidlm.data.tokenizer import train_tokenizer
from sidlm.errors import SidError
from sidlm.evaluate.needle import needle_recall, needles, reader_of
from sidlm.models import SidForCausalLM, preset


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The secret number of a key is 12345. The grass is green. The sky is blue."] * 20, 600)


def copying(ids, first):
    """What followed the longest earlier occurrence of the last tokens."""
    row, out = ids.tolist(), []
    for end in range(first + 1, len(row) + 1):
        best = max(range(1, end), key=lambda i: next((n for n in range(i) if row[i - 1 - n] != row[end - 1 - n]), i))
        out.append(row[best])
    return torch.tensor(out)


def reading(predict):
    """predict(ids, first) -> the most likely token after each of the positions first..len(ids) - 1."""
    return lambda found: [
        bool((predict(one.ids[:-1], one.start - 1) == one.ids[one.start :]).all().item()) for one in found
    ]


def test_a_copying_model_reads_all(tokenizer):
    found = needles(tokenizer, 160)
    assert len(found) == 10 and all(len(one.ids) == 161 for one in found)
    assert len({tuple(one.ids.tolist()) for one in found}) == 10
    assert needle_recall(reading(copying), found) == {"recall": 1.0} | {
        f"depth {d:.2f}": 1.0 for d in (0, 0.25, 0.5, 0.75, 1)
    }
    blind = needle_recall(reading(lambda ids, first: copying(ids[-60:], first - len(ids) + 60)), found)
    assert blind["depth 0.00"] == 0.0 and blind["depth 1.00"] == 1.0


def test_a_random_model_reads_none(tokenizer):
    torch.manual_seed(0)
    model = SidForCausalLM(preset("nano", vocab_size=tokenizer.vocab_size)).eval()
    assert needle_recall(reader_of(model), needles(tokenizer, 128, repeats=1))["recall"] == 0.0


def test_too_short(tokenizer):
    with pytest.raises(SidError, match=r"need \d+ tokens, more than the 20 of the context"):
        needles(tokenizer, 20)


def test_the_command(tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    SidForCausalLM(preset("nano", vocab_size=tokenizer.vocab_size)).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert main([str(tmp_path), "--needle", "128", "160", "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report["needle"]) == {"128", "160"} and report["needle"]["160"]["recall"] == 0.0
    assert "needle" in capsys.readouterr().out
    with pytest.raises(SidError, match="--needle 4096 exceeds the model's 2048 positions"):
        main([str(tmp_path), "--needle", "4096"])
