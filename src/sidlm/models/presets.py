"""Named model sizes, each as a Llama and as a Sid model with the same number of parameters."""

import dataclasses
import difflib
from typing import Any

from huggingface_hub.errors import StrictDataclassFieldValidationError

from sidlm.models.config import SidConfig
from sidlm.models.flops import num_parameters

PRESETS: dict[str, dict[str, Any]] = {
    "nano": {
        "vocab_size": 4096, "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "simplicial_window": [64, 8],
    },
    "micro": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "simplicial_window": [128, 16],
    },
    "mini": {
        "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 640, "num_hidden_layers": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False,
        "max_position_embeddings": 4096, "simplicial_window": [256, 16],
    },
    "small": {
        "vocab_size": 32768, "hidden_size": 768, "intermediate_size": 1920, "num_hidden_layers": 12,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "simplicial_window": [512, 32],
    },
    "1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "simplicial_window": [512, 32],
    },
    "3b": {
        "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "simplicial_window": [512, 32],
    },
    "8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "simplicial_window": [512, 32],
    },
    "70b": {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "simplicial_window": [512, 32],
    },
    "405b": {
        "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126,
        "num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "max_position_embeddings": 8192, "simplicial_window": [512, 32],
    },
}  # fmt: skip
"""Sizes by name. The small ones have an output head of their own, so that their embedding can start at unit scale;
tied, they stay at the entropy of single tokens for hundreds of steps (docs/LOG.md). intermediate_size is the Llama
arch's (8b, 70b, 405b: "The Llama 3 herd", table 3; 1b, 3b: Llama 3.2)."""

ARCHS = ("sid", "llama")


def preset(name: str, *, arch: str = "sid", vocab_size: int | None = None, **overrides: Any) -> SidConfig:
    """The config of a named size.

    Args:
        name: a key of PRESETS.
        arch: "llama", full attention and SwiGLU everywhere; or "sid", every fourth layer 2-simplicial and squared ReLU,
            with a width that gives the Llama arch's number of parameters.
        vocab_size: rows of the embedding; None for the preset's.
        overrides: any field of SidConfig. An overridden intermediate_size is taken as it is.

    Raises:
        ValueError: unknown name, arch or field, naming the nearest.
    """
    check_name("preset", name, PRESETS)
    check_name("arch", arch, ARCHS)
    fields = [f.name for f in dataclasses.fields(SidConfig)]
    for field in overrides:
        check_name("SidConfig field", field, fields)
    sizes = PRESETS[name] | ({} if vocab_size is None else {"vocab_size": vocab_size})
    # what changes the shape of both archs; the rest is the sid arch's own
    shape = sizes | {field: value for field, value in overrides.items() if field in sizes}
    llama = {"layer_types": ["full_attention"] * shape["num_hidden_layers"], "mlp_type": "swiglu"}
    if arch == "llama":
        return _build(shape | llama | overrides)
    fields = shape | {"mlp_type": "squared_relu"} | overrides
    if "intermediate_size" not in overrides:
        fields["intermediate_size"] = _matching_width(fields, num_parameters(_build(shape | llama)))
    return _build(fields)


def _matching_width(fields: dict[str, Any], target: int) -> int:
    """The feed-forward width at which a dense model of these fields has about ``target`` parameters.

    Rounded to a multiple of 128 (tensor-core tiles) from a hidden_size of 512 up, of 8 below.
    """
    # without what a width of one would not fit
    dense = fields | {"num_local_experts": 0, "num_shared_experts": 0, "mlp_sparsity": None}
    multiple = 128 if fields["hidden_size"] >= 512 else 8
    one, two = (num_parameters(_build(dense | {"intermediate_size": width})) for width in (1, 2))
    width = 1 + (target - one) / (two - one)
    return max(multiple, round(width / multiple) * multiple)


def _build(fields: dict[str, Any]) -> SidConfig:
    try:
        return SidConfig(**fields)
    except StrictDataclassFieldValidationError as error:
        # a value of the wrong type: transformers' error spans lines and is no ValueError
        raise ValueError(f"SidConfig: {' '.join(str(error.__cause__ or error).split())}") from error


def check_name(what: str, name: str, known) -> None:
    """Raise ValueError with the nearest known name for an unknown one."""
    if name in known:
        return
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {name!r}; {hint}")
