"""Prompts that are padded on the right, and continued: padding inside of rows, which not every kernel can take."""

import importlib.util
import os

import pytest
import torch
from transformers import DynamicCache

from sidlm.ops.simplicial import api, decode

INTERPRETED = importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter (TRITON_INTERPRET=1)")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
LENGTHS, NEW = (3, 7), 3
WIDE = {"num_hidden_layers": 1, "simplicial_window": [12, 10]}  # a window counts padding: here it reaches over it


@pytest.fixture(params=["trilinear", "determinant"])
def model(request, model_of):
    return model_of(request.param, **WIDE, layer_types=["simplicial_attention"])


@pytest.fixture
def ran(monkeypatch):
    """Implementations of the dense operation and of decoding, in the order in which they ran."""
    names, backend = [], api._backend
    monkeypatch.setattr(api, "_backend", lambda impl: names.append(impl) or backend(impl))
    for impl, run in decode._BACKENDS.items():
        counted = lambda *args, impl=impl, run=run: names.append(f"decode {impl}") or run(*args)  # noqa: E731
        monkeypatch.setitem(decode._BACKENDS, impl, counted)
    return names


def greedy(model, tokens, mask):
    """Logits (B, NEW, vocabulary) of the last token of each prompt and of its continuation, which goes behind all."""
    cache, logits = DynamicCache(config=model.config), []
    out = model(tokens, attention_mask=mask, past_key_values=cache).logits
    rows = torch.arange(len(tokens))
    logits.append(out[rows, mask.sum(dim=1) - 1])
    while len(logits) < NEW:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = logits[-1].argmax(dim=-1, keepdim=True)
        logits.append(model(step, attention_mask=mask, past_key_values=cache).logits[:, -1])
    return torch.stack(logits, dim=1)


def prompts(ids):
    tokens = ids(len(LENGTHS), max(LENGTHS))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return tokens * mask, mask


def one_by_one(model, tokens):
    rows = (tokens[i : i + 1, :n] for i, n in enumerate(LENGTHS))
    return torch.cat([greedy(model, row, torch.ones_like(row)) for row in rows])


@KERNELS
@pytest.mark.parametrize("rings", [False, True])
def test_continuing_padded_prompts_is_continuing_each_alone(model, ids, ran, monkeypatch, rings):
    """The kernels run where they may; where a row has a hole, what decodes from rings sees over it, as eager does."""
    tokens, mask = prompts(ids)
    with torch.no_grad():
        alone = one_by_one(model, tokens)
        assert set(ran) == {"eager"}
        ran.clear()
        monkeypatch.setenv("SID_IMPL", "simplicial=triton" + ",simplicial_decode=triton" * rings)
        together = greedy(model, tokens, mask)
    assert ran == (["decode triton"] * NEW if rings else ["triton"] + ["eager"] * (NEW - 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("grad", [False, True])
def test_on_a_gpu(model, ids, ran, grad):
    """Nothing is named, and the kernels run where they may; with gradients there are no rings."""
    tokens, mask = (x.cuda() for x in prompts(ids))
    with torch.set_grad_enabled(grad):
        alone = one_by_one(model.cuda(), tokens)
        assert set(ran) == {"triton" if grad else "decode triton"}
        ran.clear()
        together = greedy(model, tokens, mask)
    assert ran == (["triton"] + ["eager"] * (NEW - 1) if grad else ["decode triton"] * NEW)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


@KERNELS
def test_without_a_cache(model, ids, ran, monkeypatch):
    tokens, mask = prompts(ids)
    # a hole in the first row, which is no hole where its end is another document
    tokens, mask = (torch.cat((x, y), dim=1) for x, y in ((tokens, ids(2, 2)), (mask, torch.ones(2, 2).long())))
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, use_cache=False).logits
        monkeypatch.setenv("SID_IMPL", "simplicial=triton")
        ran.clear()
        mine = model(tokens, attention_mask=mask, use_cache=False).logits
        assert ran == ["eager"] and torch.equal(mine, expected)
        doc_ids = torch.tensor([[0] * 7 + [1] * 2, [0] * 9])
        model(tokens, attention_mask=mask, doc_ids=doc_ids, use_cache=False)
        assert ran == ["eager", "triton"]


@KERNELS
def test_rows_that_end_or_begin_with_padding_have_no_hole(model, ids, ran, monkeypatch):
    monkeypatch.setenv("SID_IMPL", "simplicial=triton")
    tokens, mask = prompts(ids)
    with torch.no_grad():
        model(tokens, attention_mask=mask)
        model(tokens.flip(1), attention_mask=mask.flip(1))
    assert ran == ["triton", "triton"]
