"""float8 (e4m3) rows with one scale each, a power of two.

A power of two loses nothing in a floating-point format but up to one bit of range, and it makes scaling exact: kernels
and their emulation agree to the last bit, and a value that is scaled anew is not rounded anew.
"""

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
FP8 = torch.float8_e4m3fn


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The smallest power of two s with amax / s <= 448, float32, for amax >= 0 (any shape, float32).

    1 for amax = 0, NaN where amax is not finite, never below 2^-126.
    """
    bits = amax.float().contiguous().view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # 448 = 1.75 * 2^8
    biased = (exponent - 8 + (mantissa > 0x600000).int()).clamp_min(1)
    scale = (biased << 23).view(torch.float32)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(exponent == 255, torch.nan, scale)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) -> e4m3 (..., K) and scale (...), float32, with x about equal to e4m3 * scale."""
    x = x.float()
    scale = power_of_two_scale(x.abs().amax(-1))
    return (x / scale.unsqueeze(-1)).to(FP8), scale
