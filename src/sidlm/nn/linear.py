"""The linear layers whose output is added to the residual stream."""

from torch import nn


def residual_linear(in_features: int, out_features: int) -> nn.Linear:
    """A bias-free nn.Linear with the attribute ``to_residual``, for an init that scales such layers by depth."""
    layer = nn.Linear(in_features, out_features, bias=False)
    # nn.Module's annotations admit only tensors and modules as attributes; its code admits anything
    layer.to_residual = True  # pyright: ignore[reportArgumentType]
    return layer
