from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from sidlm.evaluate.rewards import answer_rewards, compare_rewards
from sidlm.models import SidForSequenceClassification
from sidlm.nn.quantize import quantize_feed_forward

_spec = importlib.util.spec_from_file_location(
    "examples_common", Path(__file__).resolve().parents[2] / "examples" / "common.py"
)
PROMPTS = [f"Say {word}" for word in ("red", "a big tree", "cat", "old road river", "dog")]


@pytest.fixture(scope="module")
def chat():
    """(policy, tokenizer, judge)"""
    common = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(common)
    policy, tokenizer = common.toy_model(0)
    torch.manual_seed(1)
    policy.config.num_labels = 1
    return policy.eval(), tokenizer, SidForSequenceClassification(policy.config).eval()


def test_scores_are_the_judges_of_the_answers(chat):
    policy, tokenizer, judge = chat
    got = answer_rewards(policy, tokenizer, judge, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2, seed=3)
    want = []
    for begin in range(0, 5, 2):
        asked = [[{"role": "user", "content": p}] for p in PROMPTS[begin : begin + 2]]
        tokenizer.padding_side = "left"
        encoded = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(3 + begin)
        out = policy.generate(**encoded, max_new_tokens=6, do_sample=True, top_k=0)
        for chat_, answer in zip(asked, out[:, encoded["input_ids"].shape[1] :], strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            ids = tokenizer.apply_chat_template([*chat_, {"role": "assistant", "content": text}], return_dict=True)
            want.append(judge(torch.tensor([ids["input_ids"]])).logits.item())
    assert got == pytest.approx(want, abs=1e-5)
    again = answer_rewards(policy, tokenizer, judge, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2, seed=3)
    assert again == got
    assert answer_rewards(policy, tokenizer, judge, tokenizer, PROMPTS, max_new_tokens=6, batch_size=2, seed=4) != got


def test_quantised_answers_have_other_scores(chat):
    policy, tokenizer, judge = chat
    before = answer_rewards(policy, tokenizer, judge, tokenizer, PROMPTS, max_new_tokens=8)
    quantize_feed_forward(policy.model.layers, "float8", keep_ends=False)
    after = answer_rewards(policy, tokenizer, judge, tokenizer, PROMPTS, max_new_tokens=8)
    found = compare_rewards(before, after)
    assert found.before.prompts == found.after.prompts == 5 and 0 <= found.distance <= 1


def test_comparison_is_scipys_and_sees_a_shift():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    same, shifted = compare_rewards(a.tolist(), b.tolist()), compare_rewards(a.tolist(), (b + 0.5).tolist())
    assert same.p_value > 0.05 and shifted.p_value < 1e-6
    below = ((a[:, None] <= a).double().mean(0) - ((b + 0.5)[:, None] <= a).double().mean(0)).abs().max()
    assert shifted.distance == pytest.approx(float(below), abs=1e-2)
    assert shifted.after.mean == pytest.approx(float(b.mean()) + 0.5)
    assert shifted.before.quantiles[2] == pytest.approx(float(a.median()), abs=0.02)


def test_what_cannot_be_asked(chat):
    policy, tokenizer, judge = chat
    with pytest.raises(ValueError, match="no prompts"):
        answer_rewards(policy, tokenizer, judge, tokenizer, [])
    template, tokenizer.chat_template = tokenizer.chat_template, None
    with pytest.raises(ValueError, match="the model's tokenizer has no chat template"):
        answer_rewards(policy, tokenizer, judge, tokenizer, PROMPTS)
    tokenizer.chat_template = template
