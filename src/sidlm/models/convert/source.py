"""Checkpoints as named tensors that are read one at a time: what every conversion starts from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.models.presets import check_name

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
"""safetensors' names of the dtypes that a model here can have."""
IGNORED = "rotary_emb.inv_freq"
"""A buffer in old files, computed from the config."""


class Entry(NamedTuple):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


class Checkpoint(Protocol):
    """Weights under Llama's names in safetensors, rotary halves apart. With tied embeddings there is no lm_head."""

    @property
    def folder(self) -> Path: ...

    @property
    def config(self) -> SidConfig: ...

    @property
    def tensors(self) -> Mapping[str, Entry]: ...

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, perhaps a view of a mapped file."""
        ...


class SafetensorsCheckpoint:
    """A folder of transformers: config.json, and model.safetensors or its shards with their index.

    overrides: fields of the config that shall differ from the folder's.
    Raises SidError for a config or files that are missing, broken, or do not fit together. Weights stay on disk.
    """

    def __init__(self, folder: Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder, overrides)
        self._files: dict[str, Path] = {}
        self.tensors: dict[str, Entry] = {}
        for path in weight_files(folder):
            self._add(path)
        check_tensors(self.folder, self.config, self.tensors)

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118, a handle is no dictionary
                    info = file.get_slice(name)
                    if info.get_dtype() not in DTYPES:
                        raise SidError(f"{path}: {name} is {info.get_dtype()}, which is none of {', '.join(DTYPES)}")
                    self.tensors[name] = Entry(tuple(info.get_shape()), DTYPES[info.get_dtype()])
                    self._files[name] = path
        except (SafetensorError, OSError) as error:
            raise SidError(f"{path}: not a whole safetensors file: {one_line(error)}") from error

    def read(self, name: str) -> Tensor:
        # opened anew for each tensor: what was read of a mapped file stays in memory until the mapping goes
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def read_part(self, name: str, first: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of a tensor (1-D or more) of `shape` from the index `first` on; nothing else is read."""
        with safe_open(self._files[name], framework="pt") as file:
            where = tuple(slice(begin, begin + size) for begin, size in zip(first, shape, strict=True))
            return file.get_slice(name)[where]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by its index if there is one. Raises SidError naming what is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors first" if pickled else ""
        raise SidError(f"no model.safetensors in {folder}{hint}")
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise SidError(f"{index}: weight_map must map the name of each weight to a file")
    names = sorted(set(found.values()))
    for name in names:
        if Path(name).name != name:
            raise SidError(f"{index}: {name!r} is no file name")
        if not (folder / name).is_file():
            raise SidError(f"{folder}: {name} is missing, one of the {len(names)} files that {index.name} names")
    return [folder / name for name in names]


def read_config(folder: Path, overrides: Mapping[str, Any] | None = None) -> SidConfig:
    """The folder's config as Sid's, with some fields changed. Raises SidError for a bad one and for another kind."""
    path = folder / "config.json"
    if not path.is_file():
        raise SidError(f"no config.json in {folder}")
    kind = read_json(path).get("model_type")
    if kind not in ("llama", "sid"):
        raise SidError(f"{path}: model_type must be 'llama' or 'sid', got {kind!r}")
    try:
        config = SidConfig.from_pretrained(folder)
        for name in overrides or {}:
            check_name("SidConfig field", name, [f.name for f in dataclasses.fields(SidConfig)])
        return SidConfig.from_dict(config.to_dict() | dict(overrides)) if overrides else config
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise SidError(f"{path}: {one_line(error)}") from error


def expected_tensors(config: SidConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint with this config, in the order of the layers."""
    from sidlm.models.modeling import SidForCausalLM

    with torch.device("meta"):
        state = SidForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def check_tensors(folder: Path, config: SidConfig, tensors: dict[str, Entry]) -> None:
    """Raise SidError unless these are the config's tensors; drop those that it does not need."""
    expected = expected_tensors(config)
    for name in [name for name in tensors if name.endswith(IGNORED)]:
        del tensors[name]
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise SidError(f"{folder}: {len(missing)} weights are missing, the first is {missing[0]}")
    more = [name for name in tensors if name not in expected]
    if more:
        raise SidError(f"{folder}: {len(more)} weights that config.json has no place for, the first is {more[0]}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise SidError(f"{folder}: {name} has shape {tensors[name].shape}, but {shape} by its config")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SidError naming the file."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SidError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SidError(f"{path} is not valid JSON: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise SidError(f"{path} must hold a JSON object, got {type(loaded).__name__}")
    return loaded


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
