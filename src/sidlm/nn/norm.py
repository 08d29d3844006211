"""RMS normalisation with a learned weight."""

import torch
from torch import Tensor, nn

from sidlm import ops


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension of size ``dim``, in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
