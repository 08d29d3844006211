"""safetensors files written tensor by tensor: the library's own writer takes all tensors of a file at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from sidlm.models.convert.source import DTYPES, Entry

ALIGNMENT = 64
"""The tensors start at such a multiple of bytes: mapped into memory they lie where torch would have put them."""
MAX_BYTES = 5 * 10**9
"""Of one file, unless told otherwise"""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, Entry],
    read: Callable[[str], Tensor],
    *,
    max_bytes: int = MAX_BYTES,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Write model.safetensors, or shards of at most max_bytes (one tensor at least) with their index.

    tensors: what there is, in the order in which it is read; one tensor is held at a time. share: (index, count), of
    several processes that write into one folder, which of them this one is; the first one has the index.
    Raises ValueError if a tensor is not the one that tensors announces.
    """
    shards = _shards(tensors, max_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    index, count = share
    for name, shard in list(zip(names, shards, strict=True))[index::count]:
        with (folder / name).open("wb") as file:
            _write_file(file, shard, read)
    if len(shards) > 1 and index == 0:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        metadata = {
            "total_parameters": sum(entry.nbytes // entry.dtype.itemsize for entry in tensors.values()),
            "total_size": sum(entry.nbytes for entry in tensors.values()),
        }
        text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _shards(tensors: Mapping[str, Entry], max_bytes: int) -> list[dict[str, Entry]]:
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for name, entry in tensors.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.nbytes
    return shards


def _write_file(file: BinaryIO, tensors: Mapping[str, Entry], read: Callable[[str], Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, entry in tensors.items():
        value = read(name)
        if (tuple(value.shape), value.dtype) != entry:
            raise ValueError(f"{name} {entry} was announced, got {tuple(value.shape)} {value.dtype}")
        file.write(raw(value))


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, copied only if it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
