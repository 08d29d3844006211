"""Generation through the ring buffers, which a CPU does not choose by itself, is generation without a cache."""

import pytest
import torch
from transformers import DynamicCache

from sidlm import ops
from sidlm.nn import simplicial_attention

KINDS = ["trilinear", "determinant", "mixed"]


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """Rings on this device too; counts the decoding steps."""
    taken = []
    monkeypatch.setattr(
        simplicial_attention, "_wants_rings", lambda keys: keys.shape[2] <= 16 and not torch.is_grad_enabled()
    )
    decode = ops.two_simplicial_decode

    def counted(*args, **kwargs):
        taken.append(args[0].shape[1])
        return decode(*args, **kwargs)

    monkeypatch.setattr(ops, "two_simplicial_decode", counted)
    yield taken
    assert taken


def greedy(model, inputs, **kwargs):
    return model.generate(inputs, **({"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | kwargs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 19])
@pytest.mark.parametrize("window", [[7, 4], [3, 8], [64, 40]], ids=str)
def test_greedy(model_of, kind, ids, length, window):
    model, prompt = model_of(kind, simplicial_window=window), ids(2, length)
    assert torch.equal(greedy(model, prompt), greedy(model, prompt, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded(model_of, kind, ids):
    model, mask = model_of(kind), torch.ones(3, 18, dtype=torch.long)
    mask[0, :15] = mask[1, :7] = 0
    cached, plain = (greedy(model, ids(3, 18), attention_mask=mask, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_inside_a_row(model_of, kind, ids):
    """What lies before the padding is seen from behind it, at its distance."""
    model, tokens, mask = model_of(kind).double(), ids(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, 9:11] = mask[1, :3] = 0
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for start, stop in ((0, 11), (11, 13), (13, 14), (14, 16)):
            out = model(tokens[:, start:stop], past_key_values=cache, attention_mask=mask[:, :stop]).logits
            torch.testing.assert_close(out[1:], whole[1:, start:stop], rtol=0, atol=1e-6)
            if start:
                torch.testing.assert_close(out[:1], whole[:1, start:stop], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_chunks_and_lookup(model_of, kind, ids):
    model, prompt = model_of(kind), ids(2, 19)
    assert torch.equal(greedy(model, prompt, num_beams=3), greedy(model, prompt, num_beams=3, use_cache=False))
    assert torch.equal(greedy(model, prompt, prefill_chunk_size=4), greedy(model, prompt))
    assert torch.equal(greedy(model, prompt, cache_implementation="static"), greedy(model, prompt, use_cache=False))
    # the lookup records the past, which the rings do not: the steps before and after it do
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6, 7, 8, 5, 6]])
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=3), greedy(model, prompt))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[24], [3, 1, 1, 5, 14], [20, 1, 3], [9, 9, 6], [17, 7]], ids=str)
def test_any_chunks_are_the_whole_forward(model_of, kind, ids, chunks, steps):
    model, tokens = model_of(kind).double(), ids(2, 26)
    whole = model(tokens, use_cache=False).logits
    cache, parts, start = DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for n in (*chunks, 1, 1):
            parts.append(model(tokens[:, start : start + n], past_key_values=cache).logits)
            start += n
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_continue(model_of, kind, ids):
    model, tokens = model_of(kind).double(), ids(2, 27)
    doc_ids = torch.tensor([[0] * 13 + [1] * 14] * 2)
    positions = torch.tensor([[*range(13), *range(14)]] * 2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :24], past_key_values=cache, position_ids=positions[:, :24], doc_ids=doc_ids[:, :24])
        out = model(tokens[:, 24:], past_key_values=cache, position_ids=positions[:, 24:], doc_ids=doc_ids).logits
    torch.testing.assert_close(out, model(tokens[:, 13:]).logits[:, -3:], rtol=0, atol=1e-6)
