import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sidlm import ops
from sidlm.nn import Attention, Block, Rotary, SwiGLUFeedForward

ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def positions(length: int, batch: int = 2, head_dim: int = 8):
    return Rotary(head_dim, ROPE)(torch.arange(length)[None], batch)


def oracle(layer: Attention, x: torch.Tensor, pos, heads: int, groups: int, docs: torch.Tensor) -> torch.Tensor:
    """One query and one head at a time."""
    b, t, _ = x.shape
    q, k, v = (p(x).view(b, t, -1, layer.head_dim) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (ops.apply_rope(z, pos.cos, pos.sin) for z in (q, k))
    out = torch.zeros_like(q)
    for row in range(b):
        for i in range(t):
            lo = 0 if layer.window is None else max(0, i - layer.window + 1)
            seen = [j for j in range(lo, i + 1) if docs[row, j] == docs[row, i]]
            for h in range(heads):
                g = h // (heads // groups)
                logits = torch.stack([q[row, i, h] @ k[row, j, g] for j in seen]) / layer.head_dim**0.5
                out[row, i, h] = logits.softmax(0) @ torch.stack([v[row, j, g] for j in seen])
    return layer.o_proj(out.flatten(2))


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_its_definition(window, heads, groups, packed):
    torch.manual_seed(0)
    layer = Attention(20, heads, groups, 8, window=window).double()
    x, pos = torch.randn(2, 11, 20, dtype=torch.float64), positions(11)
    docs = torch.tensor([[0] * 4 + [1] * 7, [0] * 9 + [1] * 2]) if packed else torch.zeros(2, 11, dtype=torch.long)
    expected = oracle(layer, x, pos, heads, groups, docs)
    torch.testing.assert_close(layer(x, pos, doc_ids=docs if packed else None), expected, rtol=0, atol=1e-6)
    mask = ops.attention_mask(11, 11, window=window, doc_ids=docs if packed else None)
    torch.testing.assert_close(layer(x, pos, mask=mask), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 300])
def test_rotary_tables_are_llamas(length):
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16, rope_parameters=dict(ROPE))
    ids = torch.arange(length)[None] + 1000
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), ids)
    ours = Rotary(16, ROPE)(ids, 3)
    assert ours.cos.shape == (3, length, 8) and ours.cos3 is None
    torch.testing.assert_close(ours.cos[0], cos[0, :, :8], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sin[2], sin[0, :, :8], rtol=0, atol=1e-6)


def test_rotary_survives_bf16_and_has_no_state():
    rotary = Rotary(16, ROPE, three_chunks=True)
    before = rotary(torch.tensor([[100_001]]), 1)
    after = rotary.to(torch.bfloat16)(torch.tensor([[100_001]]), 1)
    assert not rotary.state_dict() and after.cos.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before.cos3.shape == (1, 1, 5)


def test_unknown_rope_type():
    with pytest.raises(ValueError, match="rope_type 'llama4' is not implemented; known: 'default', 'llama3'"):
        Rotary(16, {"rope_type": "llama4", "rope_theta": 1.0})


def test_block_is_pre_norm():
    torch.manual_seed(0)
    attention, mlp = Attention(20, 4, 2, 8), SwiGLUFeedForward(20, 24)
    block = Block(20, attention, mlp, norm_eps=1e-3)
    x, pos = torch.randn(2, 5, 20), positions(5)
    with torch.no_grad():
        block.input_layernorm.weight.uniform_(0.5, 2)
        block.post_attention_layernorm.weight.uniform_(0.5, 2)

    def norm(z, weight):
        return z / (z.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    y = x + attention(norm(x, block.input_layernorm.weight), pos)
    z = norm(y, block.post_attention_layernorm.weight)
    expected = y + mlp.down_proj(F.silu(mlp.gate_proj(z)) * mlp.up_proj(z))
    torch.testing.assert_close(block(x, pos), expected)
