"""A 2:4 sparse matrix as the two kept values of every four and where they were, in the plain layout.

The plain layout of the metadata is row-major, (M, K / 8) bytes: a byte holds two groups of four columns, the earlier
one in the low nibble; a nibble is ``first | second << 2``, the positions 0..3 of the two kept values, first < second.
Tensor cores and the libraries over them want other orders of the same nibbles: see layouts.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """A matrix (M, K) of which two of every four neighbours in a row may be other than zero."""

    values: Tensor
    """(M, K / 2), in the columns' order"""
    metadata: Tensor
    """uint8 (M, K / 8)"""
    scale: Tensor | None = None
    """float32 (M,): factor of each row of values; None for 1"""


def pack(x: Tensor, mask: Tensor) -> Packed:
    """x (M, K), K a multiple of 8, where mask (M, K) keeps two of every four (`select_2to4`)."""
    if x.shape[-1] % 8:
        raise ValueError(f"packing takes a multiple of 8 columns, got {x.shape[-1]}")
    # looked up: to sort groups of four is most of the time on a GPU
    bits = torch.arange(4, device=x.device)
    patterns = torch.arange(16, device=x.device).unsqueeze(-1) >> bits & 1
    kept = patterns.argsort(dim=-1, descending=True, stable=True)[:, :2]  # (16, 2)
    positions = kept[(mask.unflatten(-1, (-1, 4)) << bits).sum(-1)]
    values = x.unflatten(-1, (-1, 4)).gather(-1, positions).flatten(-2)
    nibbles = (positions[..., 0] | positions[..., 1] << 2).unflatten(-1, (-1, 2))
    return Packed(values, (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8))


def positions(metadata: Tensor) -> Tensor:
    """Where the kept values were: int64 (M, K / 4, 2) with entries 0..3, from plain metadata (M, K / 8)."""
    nibbles = torch.stack((metadata & 15, metadata >> 4), -1).flatten(-2).long()
    return torch.stack((nibbles & 3, nibbles >> 2), -1)


def unpack(packed: Packed) -> Tensor:
    """The dense matrix (M, K): in values' dtype, or float32, scaled, if there is a scale."""
    values = packed.values if packed.scale is None else packed.values.float() * packed.scale.unsqueeze(-1)
    pairs = values.unflatten(-1, (-1, 2))
    dense = pairs.new_zeros(*pairs.shape[:-1], 4)
    return dense.scatter_(-1, positions(packed.metadata), pairs).flatten(-2)
