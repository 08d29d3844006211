"""Llama -> Sid: 2-simplicial layers that change nothing at first, squared ReLU fitted to SwiGLU."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sidlm.errors import SidError
from sidlm.models import SidForCausalLM
from sidlm.models.convert.check import text_loss
from sidlm.models.convert.run import convert, open_checkpoint
from sidlm.models.convert.upcycle import Distilled, Upcycled

WINDOW = 24


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, initializer_range=0.15,
        rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    return model


def upcycled(tmp_path, window=(WINDOW, 5), every=2, name="sid", **kwargs) -> SidForCausalLM:
    (tmp_path / name).mkdir()
    source = open_checkpoint(tmp_path / "llama")
    prompt = torch.randint(0, 96, (1, window[0]))
    convert(Upcycled(source, every, window), tmp_path / name, reference=source, prompt=prompt, **kwargs)
    return SidForCausalLM.from_pretrained(tmp_path / name)


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, 96, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("w2", [1, 5, 24, 40])
@torch.no_grad()
def test_logits_are_unchanged_within_the_first_window(tmp_path, llama, w2):
    model = upcycled(tmp_path, (WINDOW, w2))
    assert model.config.layer_types == ["full_attention", "simplicial_attention"] * 2
    ids = tokens(2, WINDOW)
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=0, atol=1e-5)
    # beyond it, for the positions that still see everything; and it is the window that decides
    longer = tokens(1, 2 * WINDOW)
    ours, theirs = model(longer).logits, llama(longer).logits
    torch.testing.assert_close(ours[:, :WINDOW], theirs[:, :WINDOW], rtol=0, atol=1e-5)
    assert (ours[:, WINDOW + 1 :] - theirs[:, WINDOW + 1 :]).abs().max() > 1e-3


@torch.no_grad()
def test_packed_documents_padding_and_generation_are_unchanged(tmp_path, llama):
    model = upcycled(tmp_path)
    ids, positions = tokens(1, 50), torch.cat((torch.arange(WINDOW), torch.arange(9), torch.arange(17)))[None]
    expected = llama(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-5)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": WINDOW - 12, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), llama.generate(ids, **options))


def test_all_new_weights_learn_from_the_first_step(tmp_path, llama):
    model = upcycled(tmp_path)
    ids = tokens(2, 20)
    model.train()(ids, labels=ids).loss.backward()
    for layer in (1, 3):
        for name in ("k2_proj", "v2_proj"):
            weight = getattr(model.model.layers[layer].self_attn, name).weight
            assert not weight.any() and weight.grad.abs().max() > 1e-6
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in llama.named_parameters()}
    assert len(names) == 4 and all("2_proj" in name for name in names)


def test_a_model_that_cannot_be_upcycled(tmp_path, llama, model_of):
    source = open_checkpoint(tmp_path / "llama")
    for every in (0, 5):
        with pytest.raises(SidError, match=f"every {every}th layer cannot be 2-simplicial in a model with 4 layers"):
            Upcycled(source, every, (8, 2))
    with pytest.raises(SidError, match="simplicial_window must be two positive numbers"):
        Upcycled(source, 2, (8, 0))
    for kind, message in (("trilinear", "2-simplicial layers already"), ("sliding", "layer 0 is sliding_attention")):
        model_of(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(SidError, match=message):
            Upcycled(open_checkpoint(tmp_path / kind), 1, (8, 2))


def test_squared_relu_layers_are_close_and_reported(tmp_path, llama):
    source = open_checkpoint(tmp_path / "llama")
    text = tokens(24, 64)
    lines: list[str] = []
    new = Distilled(Upcycled(source, 4, (64, 4)), text, steps=120, log=lines.append)
    (tmp_path / "out").mkdir()
    convert(new, tmp_path / "out", reference=source, exact=False)
    model = SidForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.mlp_type, model.config.intermediate_size) == ("squared_relu", 96)
    assert sum(p.numel() for p in model.model.layers[0].parameters()) == sum(
        p.numel() for p in llama.model.layers[0].parameters()
    )
    assert len(lines) == 4 and all(0 < r.end < 0.8 * r.start < 0.6 for r in new.reports), new.reports
    # the reported error is that of the layer in the saved model, on the tokens that were not fitted to
    inputs: list[torch.Tensor] = []
    llama.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        llama(text)
        held_out = inputs[0].flatten(0, 1)[-int(0.1 * text.numel()) :]
        expected, got = llama.model.layers[2].mlp(held_out), model.model.layers[2].mlp(held_out)
    assert (got - expected).norm() / expected.norm() == pytest.approx(new.reports[2].end, rel=1e-3)
    with torch.no_grad():
        theirs = torch.nn.functional.cross_entropy(llama(text[:4]).logits[:, :-1].flatten(0, 1), text[:4, 1:].flatten())
    assert text_loss(source, text[:4]) == pytest.approx(theirs.item(), rel=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["mlp_type"] == "squared_relu"


def test_layers_that_cannot_be_distilled(tmp_path, llama, model_of):
    source = open_checkpoint(tmp_path / "llama")
    for width in (130, 9):
        with pytest.raises(SidError, match=f"must be even and at most 128 .* got {width}"):
            Distilled(source, tokens(2, 8), width=width)
    model_of("full", mlp_type="squared_relu").save_pretrained(tmp_path / "sid")
    with pytest.raises(SidError, match="only dense SwiGLU"):
        Distilled(open_checkpoint(tmp_path / "sid"), tokens(2, 8))
