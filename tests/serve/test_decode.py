from __future__ import annotations

import math

import pytest
import torch

from sidlm.errors import SidError
from sidlm.serve.decode import Sampling, decode

PROMPT = [3, 50, 60, 70, 50, 60, 80, 50, 60, 70, 3, 4, 5, 6, 7, 8, 9]


def tokens(model, sampling, prompt=PROMPT, **options):
    return list(decode(model, prompt, sampling, **({"stop_ids": ()} | options)))


def ids(chosen):
    return [c.id for c in chosen]


def naive(model, choose, new, prompt=PROMPT):
    """Each token from a forward pass over all that is before it."""
    prompt = list(prompt)
    out = []
    for _ in range(new):
        with torch.no_grad():
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        out.append(choose(logits, out))
        prompt.append(out[-1])
    return out


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_greedy(model, chunk):
    expected = naive(model, lambda logits, _: int(logits.argmax()), 20)
    assert ids(tokens(model, Sampling(max_new_tokens=20, temperature=0), chunk=chunk)) == expected


@pytest.mark.parametrize(
    "rules",
    [
        {"temperature": 0.7},
        {"top_p": 0.7, "temperature": 1.3},
        {"top_k": 7},
        {"min_p": 0.1},
        {"repetition_penalty": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "temperature": 0.9},
    ],
    ids=str,
)
def test_sampling_is_transformers(model, rules):
    prompt = torch.tensor([PROMPT])
    torch.manual_seed(5)
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
    theirs = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=15, **(neutral | rules)
    )
    mine = tokens(model, Sampling(max_new_tokens=15, seed=5, **rules))
    assert ids(mine) == theirs[0, len(PROMPT) :].tolist()


def test_penalties_and_bias(model):
    def choose(logits, seen):
        logits = logits.clone()
        for token in set(seen):
            logits[token] -= 0.5 + 2.0 * seen.count(token)
        logits[9] += 3.0
        logits[int(logits.argmax())] += 0
        return int(logits.argmax())

    rules = {"presence_penalty": 0.5, "frequency_penalty": 2.0, "logit_bias": {9: 3.0}}
    assert ids(tokens(model, Sampling(max_new_tokens=20, temperature=0, **rules))) == naive(model, choose, 20)


def test_log_probabilities_are_the_models(model):
    chosen = tokens(model, Sampling(max_new_tokens=6, seed=1, temperature=2.0, top_logprobs=4))
    prompt = list(PROMPT)
    for c in chosen:
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(dim=-1)
        assert math.isclose(c.logprob, float(logprobs[c.id]), abs_tol=1e-4)
        assert [i for i, _ in c.top] == logprobs.topk(4).indices.tolist()
        torch.testing.assert_close(torch.tensor([v for _, v in c.top]), logprobs.topk(4).values, rtol=0, atol=1e-4)
        prompt.append(c.id)
    assert tokens(model, Sampling(max_new_tokens=1))[0].logprob is None


def test_seed_decides(model):
    draws = [ids(tokens(model, Sampling(max_new_tokens=12, seed=seed))) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_ends(model):
    greedy = Sampling(max_new_tokens=10, temperature=0)
    whole = tokens(model, greedy)
    assert [c.finish for c in whole] == [None] * 9 + ["length"]
    stop = whole[6].id
    until = tokens(model, greedy, stop_ids={stop, 999})
    first = ids(whole).index(stop)
    assert ids(until) == ids(whole)[: first + 1] and until[-1].finish == "stop"


def test_cancelled_before_any_pass(model):
    calls = iter([False, False, True])
    assert len(tokens(model, Sampling(max_new_tokens=10), cancelled=lambda: next(calls))) == 2
    asked = []
    assert not tokens(model, Sampling(max_new_tokens=10), chunk=4, cancelled=lambda: len(asked) == 3 or asked.append(1))
    assert len(asked) == 3  # the prompt had more chunks


@pytest.mark.parametrize(
    ("prompt", "rules", "error"),
    [
        ([], {}, "the prompt is empty"),
        ([1] * 1020, {"max_new_tokens": 7}, "1020 tokens of prompt and 7 new ones exceed the model's 1024 positions"),
        ([1, 330], {}, "token id 330 is outside the vocabulary of 330"),
        ([-1], {}, "token id -1 is outside"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ([1], {"top_p": 1.5}, "top_p must be between 0 and 1, got 1.5"),
        ([1], {"temperature": math.nan}, "temperature must be at least 0, got nan"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty must be positive"),
    ],
)
def test_bad_requests_are_named(model, prompt, rules, error):
    with pytest.raises(SidError, match=error):
        tokens(model, Sampling(**({"max_new_tokens": 1} | rules)), prompt)
