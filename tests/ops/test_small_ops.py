"""Loss, rotary embeddings and normalisation against torch or against what defines them."""

import pytest
import torch
from torch.nn import functional as F

from sidlm.ops import (
    apply_rope,
    apply_rope3,
    linear_cross_entropy,
    rms_norm,
    rope3_frequencies,
    rope_cos_sin,
    rope_frequencies,
    two_simplicial_attention,
)


def loss_inputs(dtype=torch.float64):
    torch.manual_seed(5)
    hidden, weight = torch.randn(50, 8, dtype=dtype), torch.randn(33, 8, dtype=dtype)
    labels = torch.randint(0, 33, (50,))
    labels[::7] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 16, 50, None])
def test_loss_and_gradients_equal_the_unfused_ones(chunk):
    hidden, weight, labels = loss_inputs()
    mine = linear_cross_entropy(hidden, weight, labels, chunk=chunk) / 3
    theirs = F.cross_entropy(hidden @ weight.T, labels, reduction="sum") / 3
    torch.testing.assert_close(mine, theirs)
    grads = torch.autograd.grad(mine, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    each = linear_cross_entropy(hidden, weight, labels, reduction="none", chunk=chunk)
    torch.testing.assert_close(each.sum() / 3, mine.detach())
    assert (each[::7] == 0).all()


def test_loss_under_autocast_runs_its_products_in_bfloat16():
    hidden, weight, labels = loss_inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine = linear_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy((hidden.bfloat16() @ weight.bfloat16().T).float(), labels, reduction="sum")
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0.0)
    for grad in torch.autograd.grad(mine, (hidden, weight)):
        assert grad.dtype == torch.float32 and grad.isfinite().all()


def test_loss_never_reuses_freed_gradients():
    hidden, weight, labels = loss_inputs()
    loss = linear_cross_entropy(hidden, weight, labels)
    torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="freed after one backward"):
        torch.autograd.grad(loss, (hidden, weight))


def test_loss_names_bad_shapes(unchecked):
    hidden, weight, labels = loss_inputs()
    with pytest.raises(ValueError, match=r"\(50, 8\), weight \(33, 7\) and labels \(50,\)"):
        unchecked(linear_cross_entropy)(hidden, weight[:, :7], labels)
    with pytest.raises(ValueError, match="reduction is 'mean'"):
        linear_cross_entropy(hidden, weight, labels, reduction="mean")


def test_rope_makes_dot_products_relative():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    freq = rope_frequencies(8, 10000.0)

    def score(i, j):
        at = [rope_cos_sin(torch.tensor([[p]]), freq) for p in (i, j)]
        return (apply_rope(q, *at[0]) * apply_rope(k, *at[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), rtol=1e-5, atol=1e-5)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_rope_equals_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    positions = torch.tensor([[0, 1, 5, 4000], [3, 2, 1, 0]])
    q, k = torch.randn(2, 2, 4, 4, 16)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)[0].transpose(1, 2)
    theta = config.rope_parameters["rope_theta"]
    mine = apply_rope(q, *rope_cos_sin(positions, rope_frequencies(16, theta)))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_rotation_makes_the_determinant_form_relative():
    """Shifting every position leaves the output as it is; not so for the trilinear form."""
    torch.manual_seed(0)
    q, k, v, k2, v2 = (torch.randn(1, 12, 2, 9, dtype=torch.float64) for _ in range(5))
    freq = rope3_frequencies(9, 100.0)

    def out(shift, form):
        at = rope_cos_sin(torch.arange(12)[None] + shift, freq)
        q_, k_, k2_ = (apply_rope3(x, *at) for x in (q, k, k2))
        return two_simplicial_attention(q_, k_, v, k2_, v2, window=(6, 4), form=form)

    torch.testing.assert_close(out(0, "determinant"), out(50, "determinant"), rtol=1e-4, atol=1e-4)
    assert (out(0, "trilinear") - out(50, "trilinear")).abs().max() > 1e-2


def test_rms_norm():
    x, weight = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected)
    assert rms_norm(x.bfloat16(), weight.float(), 1e-5).dtype == torch.bfloat16
