"""A plain Llama as one GGUF file, the format of llama.cpp, written tensor by tensor; and read back.

Rotary pairs are neighbours there, as in Meta's layout. Needs the package ``gguf``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.models.convert import meta_layout
from sidlm.models.convert.source import Checkpoint
from sidlm.nn.rotary import inverse_frequencies

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    (LLAMA3_SPLIT, True): "llama-bpe",
    (LLAMA3_SPLIT, False): "smaug-bpe",
    (LLAMA3_SPLIT.replace("{1,3}", ""), False): "qwen2",
}
"""Split rule of the tokenizer and whether a whole word that is a token skips the merges -> llama.cpp's name for it."""

NAMES = {
    "tok_embeddings.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "output.weight": "output.weight",
    "attention_norm.weight": "attn_norm.weight",
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
}
"""Name in Meta's layout -> in GGUF, after ``layers.N.`` and ``blk.N.``."""


def gguf_name(meta_name: str) -> str:
    if not meta_name.startswith("layers."):
        return NAMES[meta_name]
    _, layer, rest = meta_name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest]}"


def write_gguf(path: Path, checkpoint: Checkpoint, name: str) -> None:
    """Write weights, settings and the tokenizer beside them.

    Matrices keep bf16, fp16 or fp32 (fp64 becomes fp32); norms are fp32, as llama.cpp wants them.
    Raises SidError without the package, without a tokenizer.json, or for a tokenizer that llama.cpp has no name for.
    """
    gguf = _package()
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "llama")
    try:
        _add_settings(writer, config, name)
        _add_tokenizer(writer, gguf, checkpoint.folder, config)
        factors = _rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype("float32"), factors.nbytes)
        kinds = {}
        for tensor, entry in checkpoint.tensors.items():
            kind = torch.float32 if len(entry.shape) == 1 or entry.dtype == torch.float64 else entry.dtype
            kinds[tensor] = kind
            writer.add_tensor_info(
                gguf_name(meta_layout.part_of(tensor).name), entry.shape, np.dtype("float16"),
                entry.nbytes // entry.dtype.itemsize * kind.itemsize, raw_dtype=_kind(gguf, kind),
            )  # fmt: skip
        writer.add_file_type(_file_type(gguf, set(kinds.values())))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for tensor, kind in kinds.items():
            part, weight = meta_layout.part_of(tensor), checkpoint.read(tensor)
            if part.rotary:
                assert config.head_dim is not None
                weight = meta_layout.to_neighbours(weight, weight.shape[0] // config.head_dim)
            writer.write_tensor_data(weight.to(kind).contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _package() -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError as error:
        raise SidError("GGUF files need the package gguf: pip install gguf") from error
    return gguf


def _kind(gguf: Any, dtype: torch.dtype) -> Any:
    kinds = gguf.GGMLQuantizationType
    return {torch.float32: kinds.F32, torch.float16: kinds.F16, torch.bfloat16: kinds.BF16}[dtype]


def _file_type(gguf: Any, dtypes: set[torch.dtype]) -> Any:
    types = gguf.LlamaFileType
    if torch.bfloat16 in dtypes:
        return types.MOSTLY_BF16
    return types.MOSTLY_F16 if torch.float16 in dtypes else types.ALL_F32


def _add_settings(writer: Any, config: SidConfig, name: str) -> None:
    assert config.rope_parameters is not None
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))


def _rope_factors(config: SidConfig) -> np.ndarray | None:
    """What llama.cpp divides each frequency by, (head_dim / 2,) float32; None for plain rotary embeddings."""
    assert config.rope_parameters is not None and config.head_dim is not None
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    plain = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    scaled = inverse_frequencies(config.head_dim, config.rope_parameters)
    return (inverse_frequencies(config.head_dim, plain) / scaled).numpy()


def _add_tokenizer(writer: Any, gguf: Any, folder: Path, config: SidConfig) -> None:
    """Vocabulary, merges and split rule of a byte-level BPE tokenizer.json, and its ends of text."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise SidError(f"a GGUF file holds its tokenizer: no tokenizer.json in {folder}")
    try:
        tokenizer, spec = Tokenizer.from_file(str(file)), json.loads(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise SidError(f"{file}: {' '.join(str(error).split())}") from error
    model = spec["model"]
    rules = [step.get("pattern", {}).get("Regex") for step in _steps(spec.get("pre_tokenizer"))]
    rule = next((pattern for pattern in rules if pattern), None)
    pre = PRE_TOKENIZERS.get((str(rule), bool(model.get("ignore_merges"))))
    if model.get("type") != "BPE" or pre is None:
        raise SidError(f"{file}: llama.cpp has no name for this {model.get('type')} tokenizer's split rule {rule!r}")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= config.vocab_size:
        raise SidError(f"{file} has id {max(vocabulary.values())}, but the model only {config.vocab_size} tokens")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    added = set(tokenizer.get_added_tokens_decoder())
    tokens = {i: token for token, i in vocabulary.items()}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens.get(i, f"[unused{i}]") for i in range(config.vocab_size)])
    writer.add_token_types(
        [
            kinds.UNUSED if i not in tokens
            else kinds.CONTROL if i in special
            else kinds.USER_DEFINED if i in added
            else kinds.NORMAL
            for i in range(config.vocab_size)
        ]
    )  # fmt: skip
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]])
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_add_bos_token(tokenizer.encode("a").ids[0] == config.bos_token_id)
    if ends[0] is not None:
        writer.add_eos_token_id(ends[0])
    if config.pad_token_id is not None:
        writer.add_pad_token_id(config.pad_token_id)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def gguf_tensors(path: Path) -> Callable[[str], Tensor]:
    """Reads a tensor of a GGUF file by its name in Meta's layout, in the convention of both."""
    gguf = _package()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

    def read(meta_name: str) -> Tensor:
        tensor = tensors[gguf_name(meta_name)]
        values = torch.from_numpy(np.array(tensor.data))
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            values = values.view(torch.bfloat16)
        return values.view(*(int(size) for size in reversed(tensor.shape)))

    return read
