from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import zstandard

from sidlm.errors import SidError
from sidlm.evaluate import read_task, score_task, tasks

CHOICES = ["red", "a deep and quiet blue", "green"]
LINES = [
    {"question": "What colour is the sky?", "choices": CHOICES, "answer": 1},
    {"question": "What colour is grass?", "choices": CHOICES, "answer": "C"},
    {"question": "What colour is blood?", "choices": CHOICES[:2], "answer": "red"},
    {"query": "Question: What colour is the sea?", "choices": CHOICES, "gold": 1},
    {"question": "How much is 6 times 7?", "answer": "6 * 7 = 42"},
    {"prompt": "def f():\n    return", "completion": " 42\n"},
]


def write(path, lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(zstandard.compress(text.encode()) if path.suffix == ".zst" else text.encode())
    return path


@pytest.mark.parametrize("name", ["task.jsonl", "task.jsonl.zst"])
def test_every_form_of_a_question_is_read(tmp_path, name):
    path = write(tmp_path / name, [*LINES[:2], "", *LINES[2:]])
    questions = read_task(path)
    assert [q.right for q in questions] == [1, 2, 0, 1, 0, 0]
    assert [len(q.answers) for q in questions] == [3, 3, 2, 3, 1, 1]
    assert questions[0].prompt == "Question: What colour is the sky?\nAnswer:"
    assert questions[3].prompt == "Question: What colour is the sea?\nAnswer:"
    assert questions[0].answers[1] == " a deep and quiet blue"
    assert questions[5] == type(questions[5])(
        prompt="def f():\n    return", answers=(" 42\n",), right=0, where=f"{path}:7"
    )


def by_hand(model, tokenizer, prompt, answer):
    """NLL of the answer's tokens, and their number, from whole logits in float64."""
    context = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    target = tokenizer.encode(answer)
    with torch.no_grad():
        log_probs = model(input_ids=torch.tensor([context + target])).logits.log_softmax(-1)[0]
    return -sum(log_probs[len(context) + i - 1, token].item() for i, token in enumerate(target)), len(target)


def test_scores_equal_a_plain_loop(tmp_path, model, tokenizer):
    questions = read_task(write(tmp_path / "task.jsonl", LINES))
    got = score_task(model, tokenizer, questions, batch_size=4)
    exact = copy.deepcopy(model).double().eval()
    nll, tokens, size, hits, hits_per_byte = 0.0, 0, 0, 0, 0
    for q in questions:
        parts = [by_hand(exact, tokenizer, q.prompt, answer) for answer in q.answers]
        nll += parts[q.right][0]
        tokens += parts[q.right][1]
        size += len(q.answers[q.right].encode())
        if len(parts) > 1:
            raw = [part[0] for part in parts]
            rates = [part[0] / len(answer.encode()) for part, answer in zip(parts, q.answers, strict=True)]
            hits += raw.index(min(raw)) == q.right
            hits_per_byte += rates.index(min(rates)) == q.right
    assert (got.questions, got.tokens, got.bytes, got.cut) == (6, tokens, size, 0)
    assert got.nll == pytest.approx(nll / 6, rel=1e-5)
    assert got.nll_per_token == pytest.approx(nll / tokens, rel=1e-5)
    assert got.nll_per_byte == pytest.approx(nll / size, rel=1e-5)
    assert got.accuracy == hits / 4
    assert got.accuracy_per_byte == hits_per_byte / 4
    assert got.accuracy_ci95 == pytest.approx(1.96 * math.sqrt(hits / 4 * (1 - hits / 4) / 4))
    assert got.chance == pytest.approx((1 / 3 * 3 + 1 / 2) / 4)


def test_does_not_depend_on_the_batch_size_or_the_order(tmp_path, model, tokenizer):
    questions = read_task(write(tmp_path / "task.jsonl", LINES))
    one = score_task(model, tokenizer, questions, batch_size=1)
    for batch_size, items in ((3, questions), (100, questions), (2, questions[::-1])):
        other = score_task(model, tokenizer, items, batch_size=batch_size)
        assert other.nll == pytest.approx(one.nll, rel=1e-6)
        assert other.accuracy == one.accuracy and other.accuracy_per_byte == one.accuracy_per_byte


def test_raw_and_per_byte_choices_differ_where_lengths_do(tmp_path, model, tokenizer, monkeypatch):
    """Known NLLs: 2 nats for " a" (1 a byte), 4 for " abcdefg" (0.5 a byte); the right answer is the long one."""
    monkeypatch.setattr(tasks, "span_nll", lambda model, spans, **kw: [2.0, 4.0] * (len(spans) // 2))
    lines = [{"question": "?", "choices": ["a", "abcdefg"], "answer": "abcdefg"}] * 3
    got = score_task(model, tokenizer, read_task(write(tmp_path / "t.jsonl", lines)))
    assert (got.accuracy, got.accuracy_per_byte, got.nll, got.chance) == (0.0, 1.0, 4.0, 0.5)
    assert got.nll_per_byte == 0.5 and got.accuracy_ci95 == got.accuracy_per_byte_ci95 == 0.0


def test_the_likely_answer_is_the_one_chosen(tmp_path, model, tokenizer):
    """A model whose head wants one token picks the answer made of it, raw and per byte."""
    biased = copy.deepcopy(model)
    token = tokenizer.encode(" x")[-1]
    with torch.no_grad():
        biased.lm_head.weight.zero_()
        for layer in biased.model.layers:  # hidden states become the embedding of the last token
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        biased.model.embed_tokens.weight.fill_(1.0)
        biased.lm_head.weight[token] = 10.0
    lines = [{"question": "?", "choices": [" xx", " yy"], "answer": i} for i in (0, 0, 0, 1)]
    lines = [{"prompt": "a", "completion": " x"}, *lines]
    got = score_task(biased, tokenizer, read_task(write(tmp_path / "t.jsonl", lines)))
    share = got.accuracy
    assert share == 0.75
    assert got.accuracy_ci95 == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / 4))


def test_long_prompts_lose_their_beginning_and_long_answers_are_refused(tmp_path, model, tokenizer):
    lines = [
        {"prompt": "Numbers 1234567890 and " * 20, "completion": " dog"},
        {"question": "tail", "choices": CHOICES, "answer": 0},
    ]
    questions = read_task(write(tmp_path / "t.jsonl", lines))
    got = score_task(model, tokenizer, questions, max_len=64)
    assert got.cut == 1
    kept = tokenizer.encode(lines[0]["prompt"])[-(64 - 1 - len(tokenizer.encode(" dog"))) :]
    row = torch.tensor([[tokenizer.bos_id, *kept, *tokenizer.encode(" dog")]])
    with torch.no_grad():
        log_probs = model.eval()(input_ids=row).logits.double().log_softmax(-1)[0]
    begin = 1 + len(kept)
    want = -sum(log_probs[i - 1, row[0, i]].item() for i in range(begin, row.shape[1]))
    assert score_task(model, tokenizer, questions[:1], max_len=64).nll == pytest.approx(want, rel=1e-5)
    with pytest.raises(SidError, match=r"t\.jsonl:2: an answer of \d+ tokens does not fit in 4"):
        score_task(model, tokenizer, questions[1:], max_len=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"not JSON: .* at column"),
        ("[1, 2]", "must be a JSON object, got list"),
        ({"question": "q", "choices": ["a", "b"]}, r"needs the keys .* it has question, choices"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "two or more strings"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer index 2 is outside its 2 choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "'C' is neither one of the 2 choices nor a letter"),
        ({"question": "q", "choices": ["B", "A"], "answer": "A"}, r"'A' fits choices \[0, 1\]; give the index"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "answer must be an index, a letter"),
        ({"question": 3, "answer": "x"}, "'question' must be a string, got int"),
        ({"prompt": "q", "completion": ""}, "an answer is empty"),
        ('{"prompt": "\\ud800", "completion": "x"}', "not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.zst"])
def test_malformed_lines_are_named_by_file_and_line(tmp_path, name, line, message):
    path = write(tmp_path / name, [LINES[0], line, LINES[1]])
    with pytest.raises(SidError, match=message) as error:
        read_task(path)
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(SidError, match=r"no such task file: .*absent\.jsonl"):
        read_task(tmp_path / "absent.jsonl")
    with pytest.raises(SidError, match=r"empty\.jsonl: no questions in it"):
        read_task(write(tmp_path / "empty.jsonl", []))
    broken = tmp_path / "broken.jsonl.zst"
    broken.write_bytes(b"this is not zstd at all")
    with pytest.raises(SidError, match=r"broken\.jsonl\.zst: not a readable zstd file"):
        read_task(broken)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(LINES[0]).encode() + b'\n{"prompt": "caf\xe9", "completion": "x"}\n')
    with pytest.raises(SidError, match=r"latin\.jsonl:2: not UTF-8 text"):
        read_task(latin)
