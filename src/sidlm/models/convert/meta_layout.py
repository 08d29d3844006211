"""Meta's checkpoint layout: names, how tensors are cut over the model-parallel ranks, rotary pairs, params.json.

    consolidated.00.pth ... consolidated.NN.pth    a pickled dictionary of tensors for each model-parallel rank
    params.json                                    sizes

A rank of n holds the n-th part of the output rows of wq, wk, wv, w1, w3, the embedding and the head ("rows"), of the
input columns of wo and w2 ("columns"), and the norms whole. Rotary pairs are neighbours (2i, 2i+1) there, and
(i, i + head_dim/2) in safetensors, so the rows of wq and wk are permuted within each head. Where there are more ranks
than key/value heads (Llama 3.1 405B on 16), each head is repeated on neighbouring ranks and counted in n_kv_heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from sidlm.errors import SidError
from sidlm.models.config import SidConfig


class Part(NamedTuple):
    """Where a weight is in Meta's layout."""

    name: str
    cut: str
    """rows, columns or whole"""
    heads: str = ""
    """"q" or "kv" for what is made of attention heads"""
    rotary: bool = False


OUTER = {
    "model.embed_tokens.weight": Part("tok_embeddings.weight", "rows"),
    "model.norm.weight": Part("norm.weight", "whole"),
    "lm_head.weight": Part("output.weight", "rows"),
}
LAYER = {
    "input_layernorm.weight": Part("attention_norm.weight", "whole"),
    "self_attn.q_proj.weight": Part("attention.wq.weight", "rows", "q", rotary=True),
    "self_attn.k_proj.weight": Part("attention.wk.weight", "rows", "kv", rotary=True),
    "self_attn.v_proj.weight": Part("attention.wv.weight", "rows", "kv"),
    "self_attn.o_proj.weight": Part("attention.wo.weight", "columns"),
    "post_attention_layernorm.weight": Part("ffn_norm.weight", "whole"),
    "mlp.gate_proj.weight": Part("feed_forward.w1.weight", "rows"),
    "mlp.up_proj.weight": Part("feed_forward.w3.weight", "rows"),
    "mlp.down_proj.weight": Part("feed_forward.w2.weight", "columns"),
}
PARTS = {part.name: part for part in (*OUTER.values(), *LAYER.values())}


def part_of(name: str) -> Part:
    """Where the weight with this name in safetensors is; the name is Meta's whole one."""
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    part = LAYER[rest]
    return part._replace(name=f"layers.{layer}.{part.name}")


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) with rotary pairs (i, i + D/2) -> pairs (2i, 2i+1)."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * D, ...) with rotary pairs (2i, 2i+1) -> pairs (i, i + D/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SPECIAL_IDS = {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
"""Of the Llama 3 vocabulary with 128,256 entries: begin_of_text; end_of_text, eom, eot."""


def config_of(
    params: dict[str, Any], where: str, *, shapes: dict[str, tuple[int, ...]], tied: bool, rope_factor: float | None
) -> SidConfig:
    """The config of a model from params.json and the shapes of the whole embedding and first w1, by Meta's names.

    rope_factor: of use_scaled_rope. None: rope_scaling_factor of params.json, or else Llama 3.2's 32 with tied
    embeddings and Llama 3.1's 8 without, for the published files do not say.
    Raises SidError naming a key that is missing or makes no sense.
    """
    for name in ("dim", "n_layers", "n_heads", "norm_eps", "rope_theta"):
        value = params.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            said = "is missing" if name not in params else f"must be a number above 0, got {value!r}"
            raise SidError(f"{where}: {name} {said}")
    if params.get("quantization_args") or params.get("vision_chunk_size", -1) > 0:
        raise SidError(f"{where}: quantised and vision checkpoints are not read, only plain Llama text models")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(params["rope_theta"])}
    if params.get("use_scaled_rope"):
        factor = rope_factor or params.get("rope_scaling_factor") or (32.0 if tied else 8.0)
        rope |= {"rope_type": "llama3", "factor": float(factor), **LLAMA3}
    vocab_size = shapes["tok_embeddings.weight"][0]
    try:
        return SidConfig(
            vocab_size=vocab_size,
            hidden_size=params["dim"],
            intermediate_size=shapes["layers.0.feed_forward.w1.weight"][0],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
            max_position_embeddings=131_072 if params.get("use_scaled_rope") else 8192,
            rms_norm_eps=float(params["norm_eps"]),
            rope_parameters=rope,
            tie_word_embeddings=tied,
            layer_types=["full_attention"] * params["n_layers"],
            mlp_type="swiglu",
            **(SPECIAL_IDS if vocab_size == 128_256 else {}),
        )
    except (ValueError, TypeError) as error:
        raise SidError(f"{where}: {' '.join(str(error).split())}") from error


def params_of(config: SidConfig, ranks: int) -> dict[str, Any]:
    """params.json of a plain Llama. Raises SidError for what Meta's layout cannot say."""
    assert config.num_key_value_heads is not None and config.head_dim is not None and config.rope_parameters is not None
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if config.head_dim * heads != config.hidden_size:
        raise SidError(
            f"Meta's layout has head_dim = hidden_size / heads, but head_dim is {config.head_dim}, "
            f"hidden_size {config.hidden_size} and num_attention_heads {heads}"
        )
    if ranks > kv_heads and ranks % kv_heads == 0:
        kv_heads = ranks  # each head is repeated
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": width,
             "vocab_size": config.vocab_size}  # fmt: skip
    for name, size in sizes.items():
        if size % ranks:
            raise SidError(f"{name} {size} cannot be cut over {ranks} ranks")
    multiplier, multiple = ffn_rule(config.hidden_size, width)
    params = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": heads, "n_kv_heads": kv_heads,
        "vocab_size": config.vocab_size, "multiple_of": multiple, "ffn_dim_multiplier": multiplier,
        "norm_eps": config.rms_norm_eps, "rope_theta": config.rope_parameters["rope_theta"], "use_scaled_rope": False,
    }  # fmt: skip
    if config.rope_parameters.get("rope_type") == "llama3":
        others = {name: config.rope_parameters[name] for name in LLAMA3}
        if others != LLAMA3:
            raise SidError(f"Meta's layout knows RoPE scaling with {LLAMA3} only, the model has {others}")
        # the factor is no key of Meta's own files; its reader passes over it
        params |= {"use_scaled_rope": True, "rope_scaling_factor": config.rope_parameters["factor"]}
    return params


def ffn_rule(dim: int, width: int) -> tuple[float, int]:
    """(ffn_dim_multiplier, multiple_of) with width = round_up(int(multiplier * int(8 dim / 3)), multiple_of)."""
    base = int(8 * dim / 3)
    for multiple in (1024, 4096, 256):
        for multiplier in (1.3, 1.2, 1.5, 1.0):
            if -(-int(multiplier * base) // multiple) * multiple == width:
                return multiplier, multiple
    # half a unit above the width, so that rounding of the product does no harm
    return (width + 0.5) / base, 1
