"""RMS normalisation (Zhang and Sennrich, 2019)."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Float[Tensor, "*batch d"], weight: Float[Tensor, "d"], eps: float) -> Float[Tensor, "*batch d"]:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, in x's dtype.

    torch's fused kernel accumulates in float32. Under autocast a float32 weight would lift the result to float32,
    so the weight follows x.
    """
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
