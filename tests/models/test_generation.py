"""Generation with the cache is generation without it, in every kind of layer."""

import pytest
import torch
from transformers import DynamicCache

# shorter than the windows (7, 4) and 6, around them, and well past them
LENGTHS = [2, 6, 19]
WIDE = {"simplicial_window": [64, 40], "sliding_window": 64}


def greedy(model, inputs, **kwargs):
    kwargs = {"max_new_tokens": 14, "do_sample": False} | kwargs
    kwargs.setdefault("min_new_tokens", kwargs["max_new_tokens"])
    return model.generate(inputs, **kwargs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("windows", [{}, WIDE], ids=["narrow", "wide"])
def test_greedy_with_cache_is_greedy_without(model_of, kind, ids, length, windows):
    model, prompt = model_of(kind, **windows), ids(2, length)
    assert torch.equal(greedy(model, prompt), greedy(model, prompt, use_cache=False))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("windows", [{}, WIDE], ids=["narrow", "wide"])
def test_left_padded_is_unpadded(model_of, kind, ids, windows, use_cache):
    model = model_of(kind, **windows)
    rows = [ids(1, length, seed=length)[0] for length in (3, 11, 18)]
    alone = [greedy(model, row[None], use_cache=use_cache)[0, len(row) :] for row in rows]
    batch, mask = torch.zeros(3, 18, dtype=torch.long), torch.zeros(3, 18, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 18 - len(row) :] = row
        mask[i, 18 - len(row) :] = 1
    together = greedy(model, batch, attention_mask=mask, use_cache=use_cache)[:, 18:]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("window", [[1, 1], [3, 1], [2, 5]])
def test_smallest_windows(model_of, ids, window):
    model = model_of("mixed", simplicial_window=window, sliding_window=1)
    prompt = ids(2, 9)
    assert torch.equal(greedy(model, prompt), greedy(model, prompt, use_cache=False))


@pytest.mark.parametrize("split", [1, 5, 8, 20])
def test_prefill_and_steps_are_the_whole_forward(model_of, kind, ids, split):
    model, tokens = model_of(kind).double(), ids(2, 24)
    whole = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    parts = [model(tokens[:, :split], past_key_values=cache).logits]
    # a chunk of several tokens behind the cache, then single ones
    parts.append(model(tokens[:, split : split + 3], past_key_values=cache).logits)
    for t in range(split + 3, 24):
        parts.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


def test_chunked_prefill(model_of, kind, ids):
    model, prompt = model_of(kind), ids(2, 19)
    assert torch.equal(greedy(model, prompt, prefill_chunk_size=4), greedy(model, prompt))


def test_beams_with_cache_are_beams_without(model_of, kind, ids):
    model, prompt = model_of(kind), ids(2, 9)
    kwargs = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(greedy(model, prompt, **kwargs), greedy(model, prompt, use_cache=False, **kwargs))


def test_samples_with_cache_are_samples_without(model_of, kind, ids):
    model, prompt = model_of(kind), ids(2, 9)
    kwargs = {"do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(7)
    cached = greedy(model, prompt, **kwargs)
    torch.manual_seed(7)
    assert torch.equal(cached, greedy(model, prompt, use_cache=False, **kwargs))
    assert cached.shape == (6, 9 + 14)


@pytest.mark.parametrize("windows", [{}, WIDE], ids=["narrow", "wide"])
def test_prompt_lookup_is_greedy(model_of, kind, windows):
    model = model_of(kind, **windows)
    # repetition gives the lookup candidates, some of which are wrong and cropped again
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 9, 5, 6, 7, 8, 5, 6]])
    assert torch.equal(greedy(model, prompt, prompt_lookup_num_tokens=3), greedy(model, prompt))


def test_inputs_embeds(model_of, kind, ids):
    model, prompt = model_of(kind), ids(2, 9)
    embeds = model.get_input_embeddings()(prompt)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(prompt).logits, rtol=0, atol=0)
    new = greedy(model, prompt, max_new_tokens=5)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=5, min_new_tokens=5, do_sample=False), new)
