"""Packed documents and padding: no token sees another document's, in any kind of layer."""

import pytest
import torch
from transformers import DynamicCache

FIRST, SECOND = 13, 11
DOC_IDS = torch.tensor([[0] * FIRST + [1] * SECOND] * 2)
POSITIONS = torch.tensor([[*range(FIRST), *range(SECOND)]] * 2)
PACKED = {
    "doc_ids": {"doc_ids": DOC_IDS, "position_ids": POSITIONS},
    "position_ids": {"position_ids": POSITIONS},
    "one row of position_ids": {"position_ids": POSITIONS[:1]},
    "all-ones mask": {"position_ids": POSITIONS, "attention_mask": torch.ones(2, FIRST + SECOND, dtype=torch.long)},
}


@pytest.mark.parametrize("how", list(PACKED))
def test_second_document_ignores_the_first(model_of, kind, ids, how):
    model = model_of(kind)
    tokens = ids(2, FIRST + SECOND)
    other = torch.cat((ids(2, FIRST, seed=1), tokens[:, FIRST:]), dim=1)
    a, b = (model(x, **PACKED[how]).logits for x in (tokens, other))
    assert torch.equal(a[:, FIRST:], b[:, FIRST:])
    assert not torch.equal(a[:, :FIRST], b[:, :FIRST])
    # without the boundary the same change must be seen, or the test shows nothing
    a, b = (model(x).logits for x in (tokens, other))
    assert not torch.equal(a[:, FIRST : FIRST + 3], b[:, FIRST : FIRST + 3])


@pytest.mark.parametrize("how", list(PACKED))
def test_packed_is_each_document_alone(model_of, kind, ids, how):
    model, tokens = model_of(kind).double(), ids(2, FIRST + SECOND)
    alone = torch.cat((model(tokens[:, :FIRST]).logits, model(tokens[:, FIRST:]).logits), dim=1)
    torch.testing.assert_close(model(tokens, **PACKED[how]).logits, alone, rtol=0, atol=1e-6)


def test_gradients_do_not_cross_documents(model_of, kind, ids):
    model = model_of(kind)
    embeds = model.get_input_embeddings()(ids(2, FIRST + SECOND)).detach().requires_grad_()
    model(inputs_embeds=embeds, doc_ids=DOC_IDS).logits[:, FIRST:].square().sum().backward()
    assert embeds.grad[:, :FIRST].abs().max() == 0
    assert embeds.grad[:, FIRST:].abs().min() > 0


def test_explicit_doc_ids_win_over_positions(model_of, kind, ids):
    model, tokens = model_of(kind), ids(2, FIRST + SECOND)
    one = torch.zeros(2, FIRST + SECOND, dtype=torch.long)
    joined = model(tokens, position_ids=POSITIONS, doc_ids=one).logits
    assert not torch.equal(joined[:, FIRST:], model(tokens, position_ids=POSITIONS).logits[:, FIRST:])


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_never_seen(model_of, kind, ids, side):
    model, tokens = model_of(kind).double(), ids(2, 10)
    left, right = {"left": (5, 0), "right": (0, 5), "both": (3, 4)}[side]
    mask = torch.nn.functional.pad(torch.ones(2, 10, dtype=torch.long), (left, right))
    whole = model(tokens).logits
    for seed in (1, 2):
        padded = torch.cat((ids(2, left, seed=seed), tokens, ids(2, right, seed=seed + 5)), dim=1)
        out = model(padded, attention_mask=mask).logits
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, left : left + 10], whole, rtol=0, atol=1e-6)


def test_padding_inside_packed_rows(model_of, kind, ids):
    model, tokens = model_of(kind).double(), ids(2, FIRST + SECOND)
    mask = torch.ones(2, FIRST + SECOND, dtype=torch.long)
    mask[:, FIRST - 2 : FIRST] = 0
    out = model(tokens, attention_mask=mask, position_ids=POSITIONS).logits
    torch.testing.assert_close(out[:, : FIRST - 2], model(tokens[:, : FIRST - 2]).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(out[:, FIRST:], model(tokens[:, FIRST:]).logits, rtol=0, atol=1e-6)


def test_a_packed_cache_continues_only_with_doc_ids(model_of, kind, ids):
    model, tokens = model_of(kind).double(), ids(2, FIRST + SECOND)
    step = ids(2, 1, seed=4)
    cache = model(tokens, position_ids=POSITIONS).past_key_values
    with pytest.raises(ValueError, match="cache holds packed documents: pass doc_ids"):
        model(step, past_key_values=cache)
    doc_ids = torch.nn.functional.pad(DOC_IDS, (0, 1), value=1)
    out = model(step, past_key_values=cache, doc_ids=doc_ids, position_ids=torch.full((2, 1), SECOND)).logits
    alone = model(torch.cat((tokens[:, FIRST:], step), dim=1)).logits[:, -1:]
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-6)


def test_positions_that_restart_behind_a_cache_are_refused(model_of, ids):
    model = model_of()
    cache = DynamicCache(config=model.config)
    model(ids(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids restart behind 4 cached positions"):
        model(ids(1, 3), past_key_values=cache, position_ids=torch.tensor([[4, 0, 1]]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask must be 2-D .*got 4-D \(2, 1, 6, 6\)"),
        ({"attention_mask": torch.ones(2, 5)}, r"attention_mask must be \(2, 6\), got \(2, 5\)"),
        ({"position_ids": torch.arange(6)}, r"position_ids must be \(2 or 1, 6\), got \(6,\)"),
        ({"doc_ids": torch.zeros(2, 5, dtype=torch.long)}, r"doc_ids must be \(2, 6\).*got \(2, 5\)"),
        ({"output_attentions": True}, "output_attentions: Sid's attention never forms its weights"),
        ({"inputs_embeds": torch.zeros(2, 6, 48)}, "exactly one of input_ids and inputs_embeds"),
    ],
)
def test_bad_inputs_name_themselves(model_of, ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        model_of()(ids(2, 6), **kwargs)
