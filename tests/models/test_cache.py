import pytest
import torch
from transformers import DynamicCache

from sidlm.models.cache import SimplicialCacheLayer


def fill(layer: SimplicialCacheLayer, chunks: list[int], window=(7, 4), batch=2):
    """Feeds positions 0, 1, ... whose value is their number; returns what the last update gave, one list a tensor."""
    position, out = 0, None
    for n in chunks:
        x = torch.arange(position, position + n, dtype=torch.float32).expand(batch, 3, 1, n).transpose(2, 3)
        out = layer.update(x, x + 100, k2=x + 200, v2=x + 300, window=window)
        position += n
    (k, k2), (v, v2) = out
    return [x[0, 0, :, 0].tolist() for x in (k, v, k2, v2)]


@pytest.mark.parametrize("chunks", [[1], [5], [20], [3, 1, 1], [20, 1], [2, 9, 4], [6, 1], [7, 1]])
@pytest.mark.parametrize("window", [(7, 4), (4, 7), (1, 1), (3, 1)])
def test_update_returns_what_the_new_queries_see(chunks, window):
    k, v, k2, v2 = fill(SimplicialCacheLayer(), chunks, window)
    end, new = sum(chunks), chunks[-1]
    for w, x, offset in ((window[0], k, 0), (window[0], v, 100), (window[1], k2, 200), (window[1], v2, 300)):
        first = max(0, end - new - (w - 1))
        assert x == [float(i + offset) for i in range(first, end)]


def test_memory_is_bounded_by_the_windows(model_of, ids):
    model = model_of("mixed")
    cache = DynamicCache(config=model.config)
    model(ids(2, 50), past_key_values=cache)
    model(ids(2, 1), past_key_values=cache)
    full, simplicial, sliding = cache.layers
    assert isinstance(simplicial, SimplicialCacheLayer)
    assert full.keys.shape[2] == 51 and sliding.keys.shape[2] == 6 - 1
    assert [x.shape[2] for x in simplicial._tensors()] == [6, 6, 3, 3]
    assert [layer.get_seq_length() for layer in cache.layers] == [51, 51, 51]


@pytest.mark.parametrize("record", [True, False])
def test_crop(record):
    layer = SimplicialCacheLayer()
    fill(layer, [5])
    if record:
        layer.activate_past_recording()
    one = torch.full((2, 3, 4, 1), 9.0)
    layer.update(one, one, k2=one, v2=one, window=(7, 4))
    if not record:
        with pytest.raises(RuntimeError, match="activate_past_recording"):
            layer.crop(-4)
        return
    layer.crop(-4)
    assert layer.get_seq_length() == 5
    assert layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert layer.keys2[0, 0, :, 0].tolist() == [202, 203, 204]
    layer.crop(0)
    layer.crop(9)
    assert layer.get_seq_length() == 5
    layer.crop(-9)
    assert layer.get_seq_length() == 0 and layer.keys.shape[2] == 0


@pytest.mark.parametrize("argument", [-2, 1], ids=["to remove", "to keep"])
def test_crop_needs_no_recording_while_nothing_was_dropped(argument):
    layer = SimplicialCacheLayer()
    fill(layer, [3])
    layer.crop(argument)
    assert layer.get_seq_length() == 1 and layer.keys2[0, 0, :, 0].tolist() == [200]


def test_crop_then_continue_is_the_whole_forward(model_of, kind, ids):
    model, tokens = model_of(kind).double(), ids(2, 20)
    cache = DynamicCache(config=model.config)
    model(tokens[:, :14], past_key_values=cache)
    cache.activate_past_recording()
    model(ids(2, 3, seed=5), past_key_values=cache)
    cache.crop(-3)
    out = model(tokens[:, 14:], past_key_values=cache).logits
    torch.testing.assert_close(out, model(tokens).logits[:, 14:], rtol=0, atol=1e-6)


def test_batch_surgery(model_of, kind, ids):
    model, tokens = model_of(kind).double(), ids(3, 12)
    step = ids(6, 1, seed=3)
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 1, 4]))
    rows = torch.tensor([2, 2, 0])
    out = model(step[:3], past_key_values=cache).logits
    expected = model(torch.cat((tokens[rows], step[:3]), dim=1)).logits[:, -1:]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_reset_starts_over(model_of, ids):
    """Of Sid's own layers; what reset does to transformers' layers differs between its releases."""
    model = model_of("mixed", layer_types=["simplicial_attention"] * 3)
    cache = DynamicCache(config=model.config)
    model(ids(2, 12), past_key_values=cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    tokens = ids(2, 8, seed=1)
    torch.testing.assert_close(model(tokens, past_key_values=cache).logits, model(tokens).logits, rtol=0, atol=0)


def test_a_cache_without_the_config_is_refused(model_of, ids):
    with pytest.raises(ValueError, match=r"layer 1 is 2-simplicial.*DynamicCache\(config=model.config\)"):
        model_of("mixed")(ids(1, 4), past_key_values=DynamicCache())
    # plain layers need nothing from it
    model = model_of("sliding")
    cache = DynamicCache()
    tokens = ids(1, 20)
    model(tokens[:, :15], past_key_values=cache)
    out = model(tokens[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(out, model(tokens).logits[:, 15:], rtol=0, atol=1e-5)


def test_a_tuple_is_refused(model_of, ids):
    with pytest.raises(ValueError, match="past_key_values must be a transformers Cache, got tuple"):
        model_of()(ids(1, 4), past_key_values=())


def step(layer: SimplicialCacheLayer, position: int, n: int, window=(7, 4), batch=2):
    """n positions by way of ring buffers; the rings unrolled to what the n queries see, one list a tensor."""
    x = torch.arange(position, position + n, dtype=torch.float32).expand(batch, 3, 1, n).transpose(2, 3)
    (k, k2, lengths), (v, v2) = layer.update(x, x + 100, k2=x + 200, v2=x + 300, window=window, rings=True)
    assert lengths.tolist() == [position + n] * batch
    out = []
    for ring, w in ((k, window[0]), (v, window[0]), (k2, window[1]), (v2, window[1])):
        first = max(0, position - (w - 1))
        out.append([ring[0, 0, p % ring.shape[2], 0].item() for p in range(first, position + n)])
    return out


@pytest.mark.parametrize("window", [(7, 4), (4, 7), (1, 1), (3, 1)])
@pytest.mark.parametrize("prefill", [0, 3, 20])
def test_rings_hold_what_the_new_queries_see(window, prefill):
    """Steps of one token and of several, which make larger rings, with an update in order between them."""
    layer, position = SimplicialCacheLayer(), prefill
    if prefill:
        fill(layer, [prefill], window)
    for n in (1, 1, 1, 5, 1, 2, 9, 1, 0, 1, 1):
        if n == 0:  # an update in order leaves the rings, and the next step makes them again
            x = torch.full((2, 3, 1, 1), float(position))
            layer.update(x, x + 100, k2=x + 200, v2=x + 300, window=window)
            position += 1
            continue
        seen = step(layer, position, n, window)
        for w, x, offset in zip((window[0],) * 2 + (window[1],) * 2, seen, (0, 100, 200, 300), strict=True):
            assert x == [float(i + offset) for i in range(max(0, position - (w - 1)), position + n)]
        position += n
    assert layer.get_seq_length() == position
    for w, x in zip((window[0],) * 2 + (window[1],) * 2, layer._tensors(), strict=True):
        assert x.shape[2] == min(position, w - 1)


def test_steps_write_in_place():
    layer = SimplicialCacheLayer()
    fill(layer, [20])
    step(layer, 20, 1)
    rings = layer._stored()
    assert [x.shape[2] for x in rings] == [7, 7, 4, 4]
    for i in range(21, 40):
        step(layer, i, 1)
    assert all(a is b for a, b in zip(rings, layer._stored(), strict=True))


def test_no_rings_while_the_past_is_recorded():
    layer = SimplicialCacheLayer()
    fill(layer, [5])
    step(layer, 5, 1)
    layer.activate_past_recording()
    x = torch.full((2, 3, 4, 1), 6.0)
    keys, _ = layer.update(x, x, k2=x, v2=x, window=(7, 4), rings=True)
    assert len(keys) == 2 and keys[0].shape[2] == 10
    layer.crop(-4)
    assert layer.get_seq_length() == 6 and layer.keys[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_rings_survive_what_is_done_to_a_batch():
    layer = SimplicialCacheLayer()
    fill(layer, [20])
    step(layer, 20, 1)
    layer.batch_repeat_interleave(2)
    layer.reorder_cache(torch.tensor([3, 2, 1, 0]))
    layer.batch_select_indices(torch.tensor([0]))
    layer.offload()
    layer.prefetch()
    assert step(layer, 21, 1, batch=1)[0] == [15, 16, 17, 18, 19, 20, 21]
    layer.reset()
    assert step(layer, 0, 2)[0] == [0, 1]


def test_rings_made_in_inference_mode_serve_outside_it():
    layer = SimplicialCacheLayer()
    with torch.inference_mode():
        fill(layer, [20])
        step(layer, 20, 1)
    with torch.no_grad():
        assert step(layer, 21, 1)[2] == [218, 219, 220, 221]
