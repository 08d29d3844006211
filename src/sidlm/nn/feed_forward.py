"""Dense feed-forward layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidlm import ops
from sidlm.nn.linear import residual_linear

SPARSITIES = (None, "2:4")
PRECISIONS = (None, "bf16", "fp8")


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
    """``down(relu(up(x))^2)`` (So et al. 2021): two matrices, and activations that are mostly zero.

    sparsity: None, or "2:4": of every four neighbouring activations of a token only the two largest count (arXiv
    2503.16672). precision: None for the dtype of x, "bf16" or "fp8". The other settings are those of
    `ops.squared_relu_ffn`. Parameters and their names are the same with any of them.

    enabled: bool () on the CPU, whether sparsity is on; change it in place (``layer.enabled.fill_(False)``) between
    steps: nothing is compiled or allocated anew. It is no buffer: no ``.to()`` moves it and no state dict holds it.
    statistics: None, or after `measure` float32 (5,), the statistics of `ops.squared_relu_ffn` of the newest pass.

    Raises ValueError for an unknown sparsity or precision, or a width that 2:4 sparsity cannot take.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        sparsity: str | None = None,
        precision: str | None = None,
        dense_features: float = 0.05,
        permute_tokens: bool = True,
        reuse_mask: bool = True,
    ):
        super().__init__()
        check_recipe(intermediate_size, sparsity, precision, dense_features)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = residual_linear(intermediate_size, hidden_size)
        self.sparsity = sparsity
        self.precision = precision
        self.dense_features = dense_features
        self.permute_tokens = permute_tokens
        self.reuse_mask = reuse_mask
        # the device is named: models are also built on the meta device
        self.enabled = torch.tensor(True, device="cpu")
        self.statistics: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., hidden_size) -> the same shape."""
        if self.sparsity is None and self.precision is None:
            return self.down_proj(F.relu(self.up_proj(x)).square())
        out = ops.squared_relu_ffn(
            x,
            plain_weight(self.up_proj, "up_proj"),
            plain_weight(self.down_proj, "down_proj"),
            sparsity=self.sparsity,
            precision=self.precision,
            enabled=self.enabled,
            dense_features=self.dense_features,
            permute_tokens=self.permute_tokens,
            reuse_mask=self.reuse_mask,
            stats=self.statistics,
        )
        assert isinstance(out, Tensor)  # no pair, for return_stats is not asked for
        return out

    def measure(self, on: bool = True) -> None:
        """Keep statistics from now on, or no longer. Where the weights are moved or compiled, call it in between."""
        self.statistics = torch.full((5,), torch.nan, device=self.up_proj.weight.device) if on else None

    def extra_repr(self) -> str:
        return f"sparsity={self.sparsity!r}, precision={self.precision!r}"


def check_recipe(intermediate_size: int, sparsity: str | None, precision: str | None, dense_features: float) -> None:
    """Raise ValueError, naming the setting and the number, unless `SquaredReLUFeedForward` can have these."""
    if sparsity not in SPARSITIES:
        raise ValueError(f"mlp_sparsity must be one of {SPARSITIES}, got {sparsity!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"mlp_precision must be one of {PRECISIONS}, got {precision!r}")
    if not 0 <= dense_features <= 1:
        raise ValueError(f"mlp_dense_features is a share of the features, from 0 to 1, got {dense_features}")
    if sparsity is not None and intermediate_size % 8:
        raise ValueError(f"intermediate_size must be a multiple of 8 for 2:4 sparsity, got {intermediate_size}")


def plain_weight(layer: nn.Module, name: str) -> Tensor:
    """The weight of an nn.Linear; of one that tensor parallelism split, the part that this process holds.

    Raises ValueError for anything else, an adapter or a quantised layer: what it does besides would be lost silently.
    """
    if type(layer) is not nn.Linear or layer.bias is not None:
        bias = " with a bias" if getattr(layer, "bias", None) is not None else ""
        raise ValueError(
            f"{name} is a {type(layer).__name__}{bias}: a sparse or low-precision feed-forward layer takes "
            "nn.Linear layers without bias, whose weights it multiplies itself"
        )
    # a DTensor is known by this method: importing torch's class of it would make every start slower. Of the type, since
    # a compiled block finds no method of the tensor itself (torch 2.13)
    weight: Any = layer.weight
    return weight.to_local() if hasattr(type(weight), "to_local") else weight


FEED_FORWARDS = {"swiglu": SwiGLUFeedForward, "squared_relu": SquaredReLUFeedForward}
