"""Rotary position embeddings: the tables of one forward pass, shared by all its layers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sidlm import ops


class Positions(NamedTuple):
    """Cosines and sines for the positions of one forward pass; each (B, T, frequencies), float32."""

    cos: Tensor
    """(B, T, head_dim // 2) for ops.apply_rope"""
    sin: Tensor
    """(B, T, head_dim // 2)"""
    cos3: Tensor | None = None
    """(B, T, head_dim // 3) for ops.apply_rope3; None unless some layer rotates 3-chunks"""
    sin3: Tensor | None = None
    """(B, T, head_dim // 3)"""


LLAMA3_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def inverse_frequencies(head_dim: int, parameters: Mapping[str, Any], device: torch.device | None = None) -> Tensor:
    """Angular frequencies (head_dim // 2,) in float32 for a transformers-style ``rope_parameters`` mapping.

    rope_type "default" needs rope_theta; "llama3" (Llama 3.1 and later) also the LLAMA3_FIELDS.

    Raises ValueError for a ``rope_type`` that is not implemented: running it as another type would be silently wrong;
    and for a field that is missing or makes no sense.
    """
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"rope_parameters: rope_type {rope_type!r} is not implemented; known: 'default', 'llama3'")
    needed = ("rope_theta", *LLAMA3_FIELDS) if rope_type == "llama3" else ("rope_theta",)
    for name in needed:
        value = parameters.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            given = "is missing" if value is None else f"must be a number above 0, got {value!r}"
            raise ValueError(f"rope_parameters: {name} {given} (rope_type {rope_type!r})")
    frequencies = ops.rope_frequencies(head_dim, float(parameters["rope_theta"]), device=device)
    if rope_type == "default":
        return frequencies
    scaling = {name: float(parameters[name]) for name in LLAMA3_FIELDS}
    if not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
        raise ValueError(
            f"rope_parameters: high_freq_factor ({parameters['high_freq_factor']}) must be above "
            f"low_freq_factor ({parameters['low_freq_factor']})"
        )
    return ops.llama3_frequencies(frequencies, **scaling)


class Rotary(nn.Module):
    """Builds the Positions of a forward pass.

    The frequencies are deliberately no buffer: ``model.to(torch.bfloat16)`` would round them, and they would be lost
    when a checkpoint is loaded onto meta tensors.
    """

    def __init__(self, head_dim: int, rope_parameters: Mapping[str, Any], *, three_chunks: bool = False):
        super().__init__()
        # an unknown type fails here, not in the first forward pass
        inverse_frequencies(2, rope_parameters, device=torch.device("meta"))
        self.head_dim = head_dim
        self.rope_parameters = dict(rope_parameters)
        self.three_chunks = three_chunks
        self._frequencies: dict[torch.device, tuple[Tensor, Tensor | None]] = {}

    def frequencies(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The frequencies on a device: (head_dim // 2,) and, when asked for, (head_dim // 3,), float32."""
        if device not in self._frequencies:
            three = None
            if self.three_chunks:
                three = ops.rope3_frequencies(self.head_dim, float(self.rope_parameters["rope_theta"]), device=device)
            self._frequencies[device] = (inverse_frequencies(self.head_dim, self.rope_parameters, device), three)
        return self._frequencies[device]

    @torch.no_grad()
    def forward(self, position_ids: Tensor, batch: int) -> Positions:
        """position_ids: (B or 1, T) integers; one row serves the whole batch without being copied."""
        plane, three = self.frequencies(position_ids.device)
        tables = ops.rope_cos_sin(position_ids, plane)
        if three is not None:
            tables += ops.rope_cos_sin(position_ids, three)
        return Positions(*(table.expand(batch, -1, -1) for table in tables))

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, {self.rope_parameters}"
