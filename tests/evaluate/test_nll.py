from __future__ import annotations

import copy
import math

import pytest
import torch

from sidlm.data.sources import Document
from sidlm.evaluate import bits_per_byte, span_nll
from sidlm.evaluate.nll import Span, windows


@pytest.fixture(scope="module")
def documents(texts):
    return [Document(text=text, domain="even" if i % 2 == 0 else "odd") for i, text in enumerate(texts)]


def plain_loop(model, tokenizer, documents, seq_len):
    """The definition: whole logits in float64, one window at a time. domain -> (nll, tokens)."""
    model = copy.deepcopy(model).double().eval()
    totals: dict[str, tuple[float, int]] = {}
    for document in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(document.text)]
        for begin in range(0, len(ids) - 1, seq_len):
            row = torch.tensor([ids[begin : begin + seq_len + 1]])
            with torch.no_grad():
                log_probs = model(input_ids=row[:, :-1]).logits.double().log_softmax(-1)
            nll = -log_probs[0].gather(1, row[0, 1:, None]).sum().item()
            for domain in (document.domain, "all"):
                before = totals.get(domain, (0.0, 0))
                totals[domain] = (before[0] + nll, before[1] + row.shape[1] - 1)
    return totals


@pytest.mark.parametrize("seq_len", [1, 7, 16, 100])
def test_equals_a_plain_loop_over_whole_logits(model, tokenizer, documents, seq_len):
    got = bits_per_byte(model, tokenizer, documents, seq_len=seq_len, batch_size=3)
    want = plain_loop(model, tokenizer, documents, seq_len)
    assert list(got) == ["even", "odd", "all"]
    for domain, (nll, tokens) in want.items():
        own = [d.text for d in documents if domain in ("all", d.domain) and d.text]
        assert got[domain].tokens == tokens == sum(len(tokenizer.encode(text)) for text in own)
        assert got[domain].documents == len(own)
        assert got[domain].bytes == sum(len(text.encode()) for text in own)
        assert got[domain].nll == pytest.approx(nll, rel=2e-6)
        assert got[domain].nll_per_token == pytest.approx(nll / tokens, rel=2e-6)
        assert got[domain].bits_per_byte == pytest.approx(nll / math.log(2) / got[domain].bytes, rel=2e-6)


def test_does_not_depend_on_the_batch_size(model, tokenizer, documents):
    one = bits_per_byte(model, tokenizer, documents, seq_len=16, batch_size=1)["all"].nll
    for batch_size in (2, 5, 64):
        got = bits_per_byte(model, tokenizer, documents, seq_len=16, batch_size=batch_size)["all"].nll
        assert got == pytest.approx(one, rel=1e-6)


def test_a_uniform_model_needs_log2_of_the_vocabulary_per_token(model, tokenizer, documents):
    uniform = copy.deepcopy(model)
    torch.nn.init.zeros_(uniform.lm_head.weight)
    got = bits_per_byte(uniform, tokenizer, documents, seq_len=16)
    for part in got.values():
        want = math.log2(uniform.config.vocab_size) * part.tokens / part.bytes
        assert part.bits_per_byte == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 9, 10, 17])
@pytest.mark.parametrize("seq_len", [1, 4, 8])
def test_windows_predict_every_token_once(length, seq_len):
    tokens = list(range(length))
    spans = list(windows(tokens, seq_len))
    assert [t for span in spans for t in span.tokens[span.start :]] == tokens[1:]
    for span in spans:
        assert span.start == 1 and 2 <= len(span.tokens) <= seq_len + 1


def test_span_nll_keeps_the_order_and_the_mode_and_scores_only_from_start(model):
    model.train()
    spans = [Span([1, 2, 3, 4, 5], 3), Span([9, 8], 1), Span([1, 2, 3, 4, 5], 1)]
    got = span_nll(model, spans, batch_size=2)
    assert model.training
    model.eval()
    for span, nll in zip(spans, got, strict=True):
        row = torch.tensor([span.tokens])
        with torch.no_grad():
            log_probs = model(input_ids=row).logits.double().log_softmax(-1)[0]
        want = -sum(log_probs[i - 1, row[0, i]].item() for i in range(span.start, len(span.tokens)))
        assert nll == pytest.approx(want, rel=1e-5)


def test_errors_name_the_numbers(model, tokenizer):
    with pytest.raises(ValueError, match="no text to evaluate"):
        bits_per_byte(model, tokenizer, [Document(text="", domain="a")], seq_len=8)
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        bits_per_byte(model, tokenizer, [], seq_len=0)
    with pytest.raises(ValueError, match='domain is called "all"'):
        bits_per_byte(model, tokenizer, [Document(text="hello", domain="all")], seq_len=8)
    vocab = model.config.vocab_size
    with pytest.raises(ValueError, match=f"token id {vocab} is outside the model's vocabulary of {vocab}"):
        span_nll(model, [Span([1, vocab], 1)])
    with pytest.raises(ValueError, match="a span of 2 tokens cannot be scored from token 2"):
        span_nll(model, [Span([1, 2], 2)])
