"""FLOPs of the squared-ReLU feed-forward function, registered with torch's counter.

The convention: those of the dense function, 2 T F (d + d_out) forward and twice that backward, whatever the sparsity
leaves out and the warm-up computes again.
"""

from math import prod

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def forward_flops(tokens: int, d: int, features: int, d_out: int) -> int:
    return 2 * tokens * features * (d + d_out)


def backward_flops(tokens: int, d: int, features: int, d_out: int) -> int:
    return 2 * forward_flops(tokens, d, features, d_out)


def _forward_formula(x, w_up, w_down, *others, out_shape=None, **named) -> int:
    return forward_flops(prod(x[:-1]), x[-1], w_up[0], w_down[0])


def _backward_formula(g, x, w_up, w_down, *others, out_shape=None, **named) -> int:
    return backward_flops(prod(x[:-1]), x[-1], w_up[0], w_down[0])


def register_flop_formulas() -> None:
    """Teach torch.utils.flop_counter.FlopCounterMode the two ops; they must exist. A second call does nothing."""
    if torch.ops.sidlm.squared_relu_ffn not in flop_registry:
        register_flop_formula(torch.ops.sidlm.squared_relu_ffn)(_forward_formula)
        register_flop_formula(torch.ops.sidlm.squared_relu_ffn_backward)(_backward_formula)
