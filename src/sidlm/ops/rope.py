"""Rotary position embeddings: Llama's planar form, and the one that leaves a 3x3 determinant relative."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rope_frequencies(head_dim: int, theta: float, device: torch.device | str | None = None) -> Float[Tensor, "half"]:
    """Angular frequencies (radians per position) ``theta^(-2i/head_dim)``, float32 (RoFormer, section 3.2.2)."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / theta**exponent


def llama3_frequencies(
    inv_freq: Float[Tensor, "half"],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> Float[Tensor, "half"]:
    """Llama 3.1's frequencies for long contexts: slow ones are divided by ``factor``, fast ones stay.

    With L = original_max_position_embeddings, a frequency f turns L f / (2 pi) times within the original context:
    at most low_freq_factor times is slow, at least high_freq_factor times fast, and between the two
    ``s = (turns - low) / (high - low)`` mixes ``(1 - s) f / factor + s f`` ("The Llama 3 herd", section 3.4.2).
    """
    # in this order of operations the float32 results are those of transformers, bit by bit
    wavelength = 2 * math.pi / inv_freq
    smooth = (original_max_position_embeddings / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    slow, fast = original_max_position_embeddings / low_freq_factor, original_max_position_embeddings / high_freq_factor
    divided = torch.where(wavelength > slow, inv_freq / factor, inv_freq)
    between = (wavelength >= fast) & (wavelength <= slow)
    return torch.where(between, (1 - smooth) * divided / factor + smooth * divided, divided)


def rope3_frequencies(head_dim: int, theta: float, device: torch.device | str | None = None) -> Float[Tensor, "third"]:
    """One angular frequency per chunk of three dimensions: the geometric ladder of RoPE over head_dim // 3 chunks."""
    chunks = head_dim // 3
    return 1.0 / theta ** (torch.arange(chunks, dtype=torch.float32, device=device) / max(chunks, 1))


def rope_cos_sin(
    positions: Int[Tensor, "b t"], inv_freq: Float[Tensor, "f"]
) -> tuple[Float[Tensor, "b t f"], Float[Tensor, "b t f"]]:
    """Cosines and sines of ``position * frequency``, float32 whatever the model's dtype: positions need 17 bits."""
    angles = positions[..., None].float() * inv_freq.float()
    return angles.cos(), angles.sin()


def apply_rope(
    x: Float[Tensor, "b t h d"], cos: Float[Tensor, "b t half"], sin: Float[Tensor, "b t half"]
) -> Float[Tensor, "b t h d"]:
    """Rotate dimensions (i, i + D/2) by the angle of position t: the pairing of Llama checkpoints in safetensors."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x.chunk(2, dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat(turned, dim=-1).to(x.dtype)


def apply_rope3(
    x: Float[Tensor, "b t h d"], cos: Float[Tensor, "b t third"], sin: Float[Tensor, "b t third"]
) -> Float[Tensor, "b t h d"]:
    """Rotate every chunk of three dimensions about its third axis; the last D mod 3 dimensions stay.

    All rotations share the axis, so they commute, and ``det(R_i q, R_j k, R_m k2)`` depends on i - j and i - m only
    ("Fast and Simplex", section 5: the determinant is invariant under a common rotation).
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    chunks = x.shape[-1] // 3
    a, b, c = x[..., : 3 * chunks].unflatten(-1, (chunks, 3)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin, c.to(cos.dtype)), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), x[..., 3 * chunks :]), dim=-1)
