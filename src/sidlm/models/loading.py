"""Weights of a loaded model in memory of their own, read once from their file at the speed of the disk."""

from __future__ import annotations

from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 64
"""Bytes at whose multiples torch allocates, and at which a CPU's matrix products round as they did when saved."""
PIECE = 1 << 24
"""Bytes read at once."""
THREADS = 4
"""Tensors read at once: a disk and the making of new pages both want more than one at work."""


class Mapping(NamedTuple):
    """A range of addresses that shows a file."""

    start: int
    end: int
    offset: int  # of `start` in the file
    path: str


def own_memory(model: nn.Module) -> None:
    """Give parameters on the CPU that lie at odd addresses aligned memory of their own, in place.

    safetensors maps files, whose tensors may lie anywhere. At odd addresses matrix products round differently, so a
    loaded model would not be bit-equal to the saved one. Copying through the mapping would leave the file's pages in
    memory beside the copy, up to twice the weights, and read them in small pieces; so where the system tells which
    file an address belongs to (Linux) the bytes are read from there, a few tensors at a time.
    """
    odd = [p for p in model.parameters() if p.device.type == "cpu" and p.data_ptr() % ALIGNMENT]
    if not odd:
        return
    mappings = _file_mappings()
    with ThreadPoolExecutor(THREADS, thread_name_prefix="weights") as pool:
        for parameter, copy in zip(odd, pool.map(lambda p: _read_again(p.data, mappings), odd), strict=True):
            parameter.data = copy


def _file_mappings() -> list[Mapping]:
    """Safetensors files mapped into this process, by address; none where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(".safetensors"):
            start, end = (int(word, 16) for word in fields[0].split("-"))
            found.append(Mapping(start, end, int(fields[2], 16), fields[5]))
    return sorted(found)


def _read_again(tensor: Tensor, mappings: list[Mapping]) -> Tensor:
    """A copy of a tensor: from its file if it is a whole piece of one, else from memory."""
    address, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    index = bisect_right([m.start for m in mappings], address) - 1
    if index < 0 or address + size > mappings[index].end or not tensor.is_contiguous():
        return tensor.clone()
    mapping = mappings[index]
    copy = torch.empty_like(tensor)
    target = copy.view(-1).view(torch.uint8).numpy().data
    try:
        with open(mapping.path, "rb", buffering=0) as file:
            file.seek(mapping.offset + address - mapping.start)
            done = 0
            while done < size:
                read = file.readinto(target[done : done + PIECE])
                if not read:
                    return tensor.clone()
                done += read
    except OSError:  # the file was moved or deleted; its mapping lives on
        return tensor.clone()
    return copy
