"""Conversion of a checkpoint folder into another layout, with a check of the logits at its end."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.models.convert.check import LogitsCheck, compare, neighbour_logits, random_prompt, streamed_logits
from sidlm.models.convert.gguf_file import gguf_tensors, write_gguf
from sidlm.models.convert.meta_reader import MetaCheckpoint
from sidlm.models.convert.meta_writer import write_meta
from sidlm.models.convert.safetensors_writer import MAX_BYTES, write_safetensors
from sidlm.models.convert.source import Checkpoint, Entry, SafetensorsCheckpoint, read_json

LAYOUTS = ("sid", "llama", "meta", "gguf")
BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
"""Files that belong to a model in any layout, copied as they are."""
GGUF = "model.gguf"
PROMPT = 32
"""Tokens of the check."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a conversion did."""

    layout: str
    tensors: int
    parameters: int
    nbytes: int
    check: LogitsCheck


def open_checkpoint(folder: Path, *, rope_factor: float | None = None) -> SafetensorsCheckpoint | MetaCheckpoint:
    """The checkpoint in a folder of transformers or in Meta's layout. Raises SidError if it is none or bad."""
    if not folder.is_dir():
        raise SidError(f"no such folder: {folder}")
    if (folder / "config.json").is_file():
        return SafetensorsCheckpoint(folder)
    if (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth")):
        return MetaCheckpoint(folder, rope_factor)
    raise SidError(f"{folder} holds neither config.json nor params.json: no checkpoint of transformers or of Meta")


class Cast:
    """A checkpoint with its floating-point weights in another dtype."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.folder, self.config, self._checkpoint, self._dtype = (
            checkpoint.folder,
            checkpoint.config,
            checkpoint,
            dtype,
        )
        self.tensors: Mapping[str, Entry] = {
            name: entry._replace(dtype=dtype) if entry.dtype.is_floating_point else entry
            for name, entry in checkpoint.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self._checkpoint.read(name).to(self.tensors[name].dtype)


def convert(
    source: Checkpoint,
    target: Path,
    *,
    layout: str = "sid",
    ranks: int = 1,
    max_bytes: int = MAX_BYTES,
    reference: Checkpoint | None = None,
    exact: bool = True,
    portable: bool = False,
    prompt: Tensor | None = None,
) -> Report:
    """Write a checkpoint into the empty folder `target`, tensor by tensor, and compare logits with what was written.

    A GGUF file is written to `target` / model.gguf.

    Args:
        source: read once, in the order of its tensors.
        layout: "sid" or "llama", folders of transformers with that model_type; "meta"; or "gguf".
        ranks: model-parallel ranks, the number of files of Meta's layout.
        max_bytes: of one safetensors file.
        reference: the checkpoint whose logits the target must have, the source by default.
        exact: whether they must be the same but for rounding; the comparison is made in any case.
        portable: put a file with the model's code beside a "sid" folder's weights, which then loads with
            trust_remote_code where sidlm is not installed.
        prompt: (1, T) ids for the comparison; None for 32 random ones.

    Raises:
        SidError: the model cannot be written in this layout, or the logits differ by more than rounding.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if layout != "sid":
        check_is_llama(source.config, layout)
    ids = random_prompt(source.config.vocab_size, PROMPT) if prompt is None else prompt
    if layout == "gguf":
        write_gguf(target / GGUF, source, name=source.folder.absolute().name)
        written = neighbour_logits(gguf_tensors(target / GGUF), source.config, ids)
    else:
        _write_folder(target, source, layout, ranks, max_bytes)
        if portable:
            add_code(target)
        written = logits(open_checkpoint(target), ids)
    result = compare(logits(reference or source, ids), written)
    if exact and not result.ok:
        raise SidError(f"the converted model computes something else: {result}")
    return Report(
        layout=layout,
        tensors=len(source.tensors),
        parameters=sum(entry.nbytes // entry.dtype.itemsize for entry in source.tensors.values()),
        nbytes=sum(entry.nbytes for entry in source.tensors.values()),
        check=result,
    )


def _write_folder(target: Path, source: Checkpoint, layout: str, ranks: int, max_bytes: int) -> None:
    if layout == "meta":
        write_meta(target, source, ranks)
    else:
        write_safetensors(target, source.tensors, source.read, max_bytes=max_bytes)
        write_config(target, source, layout)
    for name in BESIDE:
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)


def add_code(folder: Path) -> None:
    """Make a Sid folder load with trust_remote_code where sidlm is not installed: its code, and config.json naming it.

    Raises SidError for a config that the code cannot run.
    """
    from sidlm.models.portable import modeling_sid

    path = folder / "config.json"
    config = read_json(path)
    if config.get("mlp_precision") is not None:
        raise SidError(f"the portable code has no mlp_precision, the model has {config['mlp_precision']!r}")
    file = Path(modeling_sid.__file__)
    shutil.copyfile(file, folder / file.name)
    classes = {"AutoConfig": "SidConfig", "AutoModel": "SidModel", "AutoModelForCausalLM": "SidForCausalLM"}
    config["auto_map"] = {auto: f"{file.stem}.{name}" for auto, name in classes.items()}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits (T, vocabulary) of a checkpoint; of Meta's layout in its own convention, without the permutation."""
    if isinstance(checkpoint, MetaCheckpoint):
        return neighbour_logits(checkpoint.whole, checkpoint.config, ids)
    return streamed_logits(checkpoint, ids)


def check_is_llama(config: SidConfig, layout: str) -> None:
    """Raise SidError, naming what is in the way, unless a Llama can be this model."""
    other = sorted(set(config.layer_types or ()) - {"full_attention"})
    reasons = [f"it has layers of type {', '.join(other)}"] if other else []
    if config.mlp_type != "swiglu":
        reasons.append(f"its mlp_type is {config.mlp_type}")
    if config.num_local_experts:
        reasons.append(f"it has {config.num_local_experts} experts")
    if reasons:
        raise SidError(f"the {layout} layout holds plain Llama models only, but {' and '.join(reasons)}")


def write_config(target: Path, source: Checkpoint, layout: str) -> None:
    """config.json of a transformers folder."""
    from transformers import LlamaConfig

    dtypes = {entry.dtype for entry in source.tensors.values() if entry.dtype.is_floating_point}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if layout == "sid":
        config: Any = copy.deepcopy(source.config)
        config.architectures = ["SidForCausalLM"]
    else:
        given = source.config
        names = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
        )  # fmt: skip
        config = LlamaConfig(**{name: getattr(given, name) for name in names}, architectures=["LlamaForCausalLM"])
    config.dtype = dtype
    config.save_pretrained(target)
