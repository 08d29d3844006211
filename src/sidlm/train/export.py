"""A checkpoint of a run as safetensors, read tensor by tensor: nobody holds the model, whatever mesh has written it.

Several processes share the files: each reads from the checkpoint what it writes, and nothing is sent between them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sidlm.errors import SidError
from sidlm.models.config import SidConfig
from sidlm.models.convert.run import write_config
from sidlm.models.convert.safetensors_writer import write_safetensors
from sidlm.models.convert.source import Entry, expected_tensors
from sidlm.train import checkpoint, folder
from sidlm.train.checkpoint import Checkpoint, SafeReader

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from sidlm.data.tokenizer import Tokenizer


class RunCheckpoint:
    """The model in a checkpoint folder, as conversions read one: the mean of the weights once there is one."""

    def __init__(self, found: Checkpoint) -> None:
        """Raises SidError for a checkpoint that holds no model, or another one than it says."""
        self.path = found.path
        self.folder = found.path.parent.parent / "tokenizer"
        """what goes along with the weights"""
        if "model" not in found.state:
            raise SidError(f"{found.path} does not say what model it holds: it is of an older version; resume the run")
        self.config = SidConfig.from_dict(found.state["model"])
        self._reader = SafeReader(found.path / "tensors")
        stored = self._reader.read_metadata().state_dict_metadata
        self._names: dict[str, str] = {}
        self.tensors: dict[str, Entry] = {}
        for name, shape in expected_tensors(self.config).items():
            mean = f"average.{name}"  # which buffers do not have
            self._names[name] = mean if mean in stored else f"model.{name}"
            meta = stored.get(self._names[name])
            if not isinstance(meta, TensorStorageMetadata) or tuple(meta.size) != shape:
                size = tuple(meta.size) if isinstance(meta, TensorStorageMetadata) else "missing"
                raise SidError(f"{found.path}: {name} is {size}, and {shape} by the model that it says it holds")
            self.tensors[name] = Entry(shape, meta.properties.dtype)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU."""
        shape, dtype = self.tensors[name]
        tensor = torch.empty(shape, dtype=dtype)
        dcp.load({self._names[name]: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


def open_run_checkpoint(path: Path) -> RunCheckpoint:
    """The model in a checkpoint folder, or in the newest that is intact of a folder of checkpoints; files are compared
    with their checksums. Raises SidError if damaged, or if there is none."""
    warnings.filterwarnings("ignore", message=checkpoint.ONE_PROCESS)
    if not checkpoint.numbered(path):
        return RunCheckpoint(checkpoint.open_checkpoint(path))
    found = checkpoint.newest_good(path, warn=folder.warn)
    if found is None:
        raise SidError(f"no checkpoint in {path} is intact")
    return RunCheckpoint(found)


def describe_model(config: SidConfig) -> dict[str, Any]:
    """What a checkpoint keeps of a model besides its tensors, as JSON."""
    return json.loads(config.to_json_string(use_diff=False))


def export_model(
    source: Path, out: Path, share: tuple[int, int], *, generation: GenerationConfig, tokenizer: Tokenizer
) -> None:
    """This process's part of a folder of transformers: safetensors files of the model in a checkpoint that this run has
    just written; and, from the first process, config.json, the tokenizer and how the model is to be sampled.

    share: (index, count), which of the processes that share the files this one is.
    """
    state = json.loads((source / "state.json").read_text(encoding="utf-8"))
    found = RunCheckpoint(Checkpoint(source, state))
    write_safetensors(out, found.tensors, found.read, share=share)
    if share[0] == 0:
        write_config(out, found, "sid")
        generation.save_pretrained(out)
        tokenizer.save(out)
