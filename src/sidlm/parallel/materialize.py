"""Memory and values for a model that was built on the meta device and then spread over processes.

No process ever holds more of the weights than its own parts and, while they are drawn, one block of one parameter: a
model that fits on no machine can be started. A parameter is drawn in blocks of rows, each with a generator of its own
that is seeded by the run's seed, the parameter's name and the number of the block, so every mesh starts from the same
weights, and a process draws little more than it keeps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from sidlm.models.initial import Normal

if TYPE_CHECKING:
    from sidlm.models.convert.source import SafetensorsCheckpoint

BLOCK = 1 << 22
"""Elements of a block, rounded down to whole rows but at least one: 16 MiB of float32"""


def allocate(roots: Sequence[Any], device: torch.device) -> None:
    """Memory, not yet values, for the parameters of these modules: what this process holds of them. Buffers are zero.

    roots: a model, or what FSDP wraps of it outermost, the stages of a pipeline.
    """
    for root in roots:
        root.to_empty(device=device)  # FSDP's: it finds its shards again
        if hasattr(root, "tie_weights"):  # of plain tensors each of the two names got memory of its own
            root.tie_weights()
        for buffer in root.buffers():
            buffer.zero_()


@torch.no_grad()
def draw_weights(model: nn.Module, distributions: Mapping[str, Normal], seed: int) -> None:
    """Give every parameter its initial values, by `distributions` of its name.

    Values depend on the seed, the name, the shape and the type of the device, on nothing else.
    """
    for name, parameter in model.named_parameters():
        part, first = local_part(parameter)
        found = distributions[name]
        if found.std == 0:
            part.fill_(found.mean)
        elif part.numel():
            _draw(part, first, parameter.shape, found, f"{seed}/{name}")


def _draw(part: Tensor, first: tuple[int, ...], shape: torch.Size, normal: Normal, key: str) -> None:
    """Fill the part that begins at index `first` of a parameter of `shape`."""
    rows = max(1, BLOCK // math.prod(shape[1:]))
    top, bottom = first[0], first[0] + part.shape[0]
    columns = [slice(begin, begin + size) for begin, size in zip(first[1:], part.shape[1:], strict=True)]
    generator = torch.Generator(part.device)
    for block in range(top // rows, -(-bottom // rows)):
        above, below = block * rows, min((block + 1) * rows, shape[0])
        # a generator on the CPU takes 32 bits of it
        digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little"))
        drawn = torch.empty((below - above, *shape[1:]), dtype=torch.float32, device=part.device)
        drawn.normal_(normal.mean, normal.std, generator=generator)
        here, end = max(above, top), min(below, bottom)
        part[here - top : end - top] = drawn[(slice(here - above, end - above), *columns)]


@torch.no_grad()
def read_weights(model: nn.Module, checkpoint: SafetensorsCheckpoint) -> None:
    """Read every parameter and persistent buffer from a checkpoint of this model, of each the part held here."""
    for name, tensor in model.state_dict().items():
        if name in checkpoint.tensors:  # not the second name of a tied weight
            part, first = local_part(tensor)
            if part.numel():
                part.copy_(checkpoint.read_part(name, first, part.shape))


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a tensor, sharing its memory, and the index of its first element in the whole."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    part = tensor.to_local()
    shape, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert tuple(part.shape) == tuple(shape), (part.shape, shape)
    return part, tuple(first)
