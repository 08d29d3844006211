"""A checkpoint in Meta's layout, written tensor by tensor: torch.save takes all tensors of a file at once.

A file of torch.save is an uncompressed zip archive: data.pkl, a pickle that names the storages, and one member with
the bytes of each.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from sidlm.models.convert import meta_layout
from sidlm.models.convert.safetensors_writer import raw
from sidlm.models.convert.source import Checkpoint

ALIGNMENT = 64
STORAGES = {torch.bfloat16: torch.BFloat16Storage, torch.float16: torch.HalfStorage, torch.float32: torch.FloatStorage,
            torch.float64: torch.DoubleStorage}  # fmt: skip


def write_meta(folder: Path, checkpoint: Checkpoint, ranks: int) -> None:
    """consolidated.00.pth ... and params.json, one tensor of the checkpoint in memory at a time.

    Raises SidError if the model is no plain Llama or cannot be cut over so many ranks.
    """
    params = meta_layout.params_of(checkpoint.config, ranks)
    with ExitStack() as stack:
        files = [stack.enter_context(TorchFile(folder / f"consolidated.{rank:02d}.pth")) for rank in range(ranks)]
        for name in checkpoint.tensors:
            part = meta_layout.part_of(name)
            for file, piece in zip(files, _pieces(checkpoint, name, part, ranks), strict=True):
                file.add(part.name, piece)
        if checkpoint.config.tie_word_embeddings:
            for file in files:
                file.same("output.weight", "tok_embeddings.weight")
    (folder / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")


def _pieces(checkpoint: Checkpoint, name: str, part: meta_layout.Part, ranks: int) -> tuple[Tensor, ...]:
    """What each rank holds of one tensor."""
    config, weight = checkpoint.config, checkpoint.read(name)
    assert config.num_key_value_heads is not None and config.head_dim is not None
    if part.rotary:
        weight = meta_layout.to_neighbours(weight, weight.shape[0] // config.head_dim)
    if part.heads == "kv" and ranks > config.num_key_value_heads:
        heads = weight.unflatten(0, (config.num_key_value_heads, -1))
        weight = heads.repeat_interleave(ranks // config.num_key_value_heads, dim=0).flatten(0, 1)
    if part.cut == "whole":
        return (weight,) * ranks
    return weight.chunk(ranks, dim=0 if part.cut == "rows" else 1)


class Storage(NamedTuple):
    """The bytes of a tensor, member data/KEY of the archive."""

    key: str
    dtype: torch.dtype
    numel: int


class Rebuilt:
    """Pickles as a contiguous tensor over a storage, the way torch.save writes one."""

    def __init__(self, storage: Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= size
        arguments = (self.storage, 0, self.shape, tuple(reversed(strides)), False, OrderedDict())
        return _rebuild_tensor_v2, arguments


class Pickler(pickle.Pickler):
    """Writes a Storage as torch.save's reference to one."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Storage):
            return "storage", STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None


class TorchFile:
    """A file that torch.load reads, mapped too, as a dictionary of tensors; filled one tensor at a time."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._top = path.stem
        self._tensors: dict[str, Rebuilt] = {}

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            pickled = io.BytesIO()
            Pickler(pickled, protocol=2).dump(dict(self._tensors))
            self._member("data.pkl", memoryview(pickled.getvalue()))
            self._member("byteorder", memoryview(b"little"))
            self._member("version", memoryview(b"3\n"))
        self._zip.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        storage = Storage(str(len(self._tensors)), tensor.dtype, tensor.numel())
        self._member(f"data/{storage.key}", raw(tensor))
        self._tensors[name] = Rebuilt(storage, tuple(tensor.shape))

    def same(self, name: str, other: str) -> None:
        """Another name for a tensor that is there, sharing its storage."""
        self._tensors[name] = self._tensors[other]

    def _member(self, name: str, content: memoryview) -> None:
        info = zipfile.ZipInfo(f"{self._top}/{name}")
        info.file_size = content.nbytes
        assert self._zip.fp is not None
        # a local header takes 30 bytes, the name, 20 of zip64 and this padding of at least 4
        start = self._zip.fp.tell() + 30 + len(info.filename) + 20 + 4
        padding = -start % ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        with self._zip.open(info, "w", force_zip64=True) as member:
            member.write(content)
