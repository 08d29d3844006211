"""Every way to generate against loops that recompute the whole prefix and choose by rules written here anew."""

import copy

import pytest
import torch
from transformers import StaticCache
from transformers.generation.streamers import BaseStreamer

from sidlm.models.cache import SimplicialStaticCacheLayer

NEW = 10
REPEATING = [5, 6, 7, 8, 5, 6, 7, 9, 5, 6, 7, 8, 5, 6]  # gives a lookup its candidates, right and wrong ones


@pytest.fixture(params=["full", "sliding", "trilinear", "determinant", "mixed"])
def kind(request):
    return request.param


@pytest.fixture
def model(model_of, kind):
    """Without an end token: what is generated is as long as was asked for."""
    return model_of(kind, eos_token_id=None)


def generate(model, prompt, **options):
    options = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(prompt)} | options
    return model.generate(prompt, **options)


def naive(model, prompt, choose, new=NEW):
    """(B, T) -> (B, T + new): each token chosen from the logits of a forward pass over all that is before it."""
    for _ in range(new):
        with torch.no_grad():
            logits = model(prompt, use_cache=False).logits[:, -1]
        prompt = torch.cat((prompt, choose(logits, prompt)[:, None]), dim=1)
    return prompt


def greedy(logits, _):
    return logits.argmax(dim=-1)


GREEDY = {
    "cache": {},
    "no cache": {"use_cache": False},
    "chunks of 1": {"prefill_chunk_size": 1},
    "chunks of 5": {"prefill_chunk_size": 5},
    "static": {"cache_implementation": "static"},
    "static, chunks": {"cache_implementation": "static", "prefill_chunk_size": 5},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "lookup, chunks": {"prompt_lookup_num_tokens": 3, "prefill_chunk_size": 4},
    "lookup, many": {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 1},
}


@pytest.mark.parametrize("mode", GREEDY)
def test_greedy(model, mode):
    prompt = torch.tensor([REPEATING])
    assert torch.equal(generate(model, prompt, **GREEDY[mode]), naive(model, prompt, greedy))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [*GREEDY, "offloaded"])
def test_greedy_on_a_gpu(model, mode):
    """With the kernels, and the caches that need a device."""
    model, prompt = copy.deepcopy(model).cuda(), torch.tensor([REPEATING], device="cuda")
    options = GREEDY.get(mode, {"cache_implementation": mode})
    assert torch.equal(generate(model, prompt, **options), naive(model, prompt, greedy))


@pytest.mark.parametrize("mode", ["cache", "no cache", "chunks of 5", "static", "static, chunks"])
def test_left_padded_batches(model, mode, ids):
    """Each row as if it were alone."""
    rows = [ids(1, length, seed=length)[0] for length in (3, 11, 17)]
    batch, mask = torch.zeros(3, 17, dtype=torch.long), torch.zeros(3, 17, dtype=torch.long)
    for i, row in enumerate(rows):
        batch[i, 17 - len(row) :], mask[i, 17 - len(row) :] = row, 1
    out = generate(model, batch, attention_mask=mask, **GREEDY[mode])[:, 17:]
    alone = [naive(model, row[None], greedy)[0, len(row) :] for row in rows]
    assert torch.equal(out, torch.stack(alone))


@pytest.mark.parametrize("assistant", ["itself", "full", "mixed"])
def test_assisted(model, model_of, kind, assistant):
    """A small model proposes, the large one decides; what it rejects leaves no trace in either cache."""
    helper = model_of(kind, eos_token_id=None) if assistant == "itself" else model_of(assistant, seed=1)
    helper.config.eos_token_id = helper.generation_config.eos_token_id = None
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.num_assistant_tokens = 5
    prompt = torch.tensor([REPEATING])
    assert torch.equal(generate(model, prompt, assistant_model=helper), naive(model, prompt, greedy))


def penalised(logits, prompt, penalty):
    seen = torch.zeros_like(logits).scatter_(1, prompt, 1.0).bool()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def warped(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one distribution, cut by the rules in transformers' order."""
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        order = logits.argsort(dim=-1, descending=True)
        cumulative = logits.gather(-1, order).softmax(dim=-1).cumsum(dim=-1)
        beyond = (cumulative.roll(1, dims=-1) >= top_p).index_fill(-1, torch.tensor([0]), False)
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -torch.inf)
    if min_p:
        chances = logits.softmax(dim=-1)
        logits = logits.masked_fill(chances < min_p * chances.amax(dim=-1, keepdim=True), -torch.inf)
    return logits.softmax(dim=-1)


SAMPLING = {
    "temperature": {"temperature": 0.7},
    "top-p": {"top_p": 0.6},
    "top-k": {"top_k": 5},
    "min-p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
}


@pytest.mark.parametrize("mode", SAMPLING)
def test_sampling(model, mode, ids):
    rules, prompt = SAMPLING[mode], ids(2, 9)
    cache = {"cache_implementation": "static"} if mode == "all" else {}

    def choose(logits, _):
        return torch.multinomial(warped(logits, **rules), 1)[:, 0]

    torch.manual_seed(3)
    expected = naive(model, prompt, choose)
    torch.manual_seed(3)
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert torch.equal(generate(model, prompt, do_sample=True, **(neutral | rules), **cache), expected)


def test_repetition_penalty(model, ids):
    prompt = ids(2, 9)
    expected = naive(model, prompt, lambda logits, seen: penalised(logits, seen, 1.8).argmax(dim=-1))
    assert not torch.equal(expected, naive(model, prompt, greedy))
    assert torch.equal(generate(model, prompt, repetition_penalty=1.8), expected)


def beam_search(model, prompt, beams, new=NEW):
    """The likeliest of `beams` continuations of one row."""
    rows, scores = prompt, torch.zeros(1)
    for _ in range(new):
        with torch.no_grad():
            logits = model(rows, use_cache=False).logits[:, -1]
        total = scores[:, None] + logits.log_softmax(dim=-1)
        scores, best = total.flatten().topk(beams)
        rows = torch.cat((rows[best // total.shape[1]], (best % total.shape[1])[:, None]), dim=1)
    return rows[:1]


@pytest.mark.parametrize("mode", ["cache", "no cache", "chunks of 5", "static"])
def test_beams(model, mode, ids):
    prompt = ids(1, 9)
    assert torch.equal(generate(model, prompt, num_beams=4, **GREEDY[mode]), beam_search(model, prompt, 4))


def test_stop_sets(model, ids):
    prompt = ids(1, 9)
    whole = naive(model, prompt, greedy)
    new = whole[0, 9:].tolist()
    for stops in ([new[4]], [new[7], new[2]], [int(whole.max()) + 1]):
        end = next((i + 1 for i, token in enumerate(new) if token in stops), NEW)
        assert torch.equal(generate(model, prompt, eos_token_id=stops, pad_token_id=0), whole[:, : 9 + end])


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


def test_streaming(model):
    prompt, stream = torch.tensor([REPEATING]), Collect()
    whole = generate(model, prompt, streamer=stream)
    assert stream.tokens == [*whole[0].tolist(), "end"]


def test_a_static_cache_is_continued(model, ids):
    """Prefill, a chunk behind it and single steps are the whole forward pass."""
    model, tokens = model.double(), ids(2, 24)
    whole = model(tokens, use_cache=False).logits
    cache, parts = StaticCache(config=model.config, max_cache_len=24), []
    with torch.no_grad():
        for part in (tokens[:, :3], tokens[:, 3:4], tokens[:, 4:15], *tokens[:, 15:].split(1, dim=1)):
            parts.append(model(part, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


def test_a_static_cache_is_bounded(model_of, ids):
    model = model_of("mixed")
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        model(ids(2, 30), past_key_values=cache)
    full, simplicial, sliding = cache.layers
    assert isinstance(simplicial, SimplicialStaticCacheLayer) and simplicial.get_max_length() == 40
    assert full.keys.shape[2] == 40 and sliding.keys.shape[2] == 6
    assert [x.shape[2] for x in simplicial._tensors()] == [6, 6, 3, 3]
    with pytest.raises(ValueError, match="the static cache holds 40 positions, but 41 are to be cached"):
        model(ids(2, 11), past_key_values=cache)
