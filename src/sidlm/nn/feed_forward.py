"""Dense feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from sidlm.nn.linear import residual_linear


class SwiGLUFeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``, Llama's feed-forward layer (Shazeer 2020; Llama 3, table 3)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = residual_linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SquaredReLUFeedForward(nn.Module):
    """``down(relu(up(x))^2)`` (So et al. 2021): two matrices, and activations that are mostly zero."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = residual_linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


FEED_FORWARDS = {"swiglu": SwiGLUFeedForward, "squared_relu": SquaredReLUFeedForward}
