"""Exact counts from a config alone: parameters, visible positions, FLOPs. Nothing is instantiated.

A multiply-add is 2 FLOPs. Counted are the matrix products and the attention cores; not the embedding lookup, norms,
softmax and activations. Attention counts what a query sees, not the tiles a kernel computes.
The asserts below tell the type checker which fields SidConfig has filled in when it was built.
"""

from sidlm.models.config import SidConfig
from sidlm.ops.simplicial.flops import visible_pairs


def visible_keys(seq_len: int, window: int | None = None) -> int:
    """Sum over the queries of a row of seq_len tokens of the keys each sees: sum_i min(i + 1, window)."""
    full = seq_len if window is None else min(seq_len, window)
    return full * (full + 1) // 2 + (seq_len - full) * full


def _mixer_weights(config: SidConfig, layer_type: str) -> int:
    """Weights of one layer's projections."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    projections = 2 * config.num_attention_heads  # q and o
    projections += (4 if layer_type == "simplicial_attention" else 2) * config.num_key_value_heads
    return projections * config.head_dim * config.hidden_size


def _mlp_weights(config: SidConfig, active_only: bool) -> int:
    """Weights of one layer's feed-forward matrices, router included; with active_only, those one token meets."""
    matrices = 3 if config.mlp_type == "swiglu" else 2
    if not config.num_local_experts:
        return matrices * config.hidden_size * config.intermediate_size
    experts = config.num_experts_per_tok if active_only else config.num_local_experts
    experts += config.num_shared_experts
    router = config.hidden_size * config.num_local_experts
    return router + matrices * config.hidden_size * config.expert_intermediate_size * experts


def num_parameters(config: SidConfig, non_embedding: bool = False, active_only: bool = False) -> int:
    """Parameters of a SidForCausalLM: tied embeddings count once.

    non_embedding: without the embedding and the output head. active_only: of the experts, those one token runs.
    """
    assert config.layer_types is not None and config.head_dim is not None
    total = config.hidden_size  # final norm
    for layer_type in config.layer_types:
        total += 2 * config.hidden_size + _mixer_weights(config, layer_type) + _mlp_weights(config, active_only)
        if layer_type == "simplicial_attention" and config.simplicial_qk_norm:
            total += 3 * config.head_dim
    if non_embedding:
        return total
    return total + config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)


def _matmul_flops(config: SidConfig) -> int:
    """Forward FLOPs a token spends in matrix products with weights, the output head included."""
    assert config.layer_types is not None
    weights = sum(_mixer_weights(config, t) + _mlp_weights(config, active_only=True) for t in config.layer_types)
    return 2 * (weights + config.vocab_size * config.hidden_size)


def _core_flops(config: SidConfig, seq_len: int) -> tuple[float, float]:
    """Forward FLOPs per token of the (ordinary, simplicial) attention cores, averaged over a row of seq_len tokens.

    Two products of head_dim per visible key or pair and query head: 4 * head_dim (arXiv 2507.02754, section 4; the
    elementwise product that joins two keys is not counted).
    """
    assert config.layer_types is not None and config.head_dim is not None
    per_visible = 4 * config.head_dim * config.num_attention_heads
    seen = {
        "full_attention": visible_keys(seq_len),
        "sliding_attention": visible_keys(seq_len, config.sliding_window),
        "simplicial_attention": visible_pairs(seq_len, (config.simplicial_window[0], config.simplicial_window[1])),
    }
    simplicial = config.layer_types.count("simplicial_attention") * seen["simplicial_attention"]
    ordinary = sum(seen[t] for t in config.layer_types) - simplicial
    return per_visible * ordinary / seq_len, per_visible * simplicial / seq_len


def forward_flops_per_token(config: SidConfig, seq_len: int) -> float:
    """FLOPs of a forward pass per token, averaged over rows of seq_len tokens of one document."""
    return _matmul_flops(config) + sum(_core_flops(config, seq_len))


def train_flops_per_token(config: SidConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: the backward pass costs twice the forward, and three times it in a
    simplicial core (six products per pair, 12 * head_dim). Recomputation is not counted."""
    ordinary, simplicial = _core_flops(config, seq_len)
    return 3 * (_matmul_flops(config) + ordinary) + 4 * simplicial
