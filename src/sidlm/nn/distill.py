"""A SwiGLU layer replaced by a squared-ReLU layer that is fitted to its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SwiGLUWeights(NamedTuple):
    """gate, up: (I, d); down: (d, I)."""

    gate: Tensor
    up: Tensor
    down: Tensor


class SquaredReLUWeights(NamedTuple):
    """up: (W, d); down: (d, W)."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Relative errors, norm of (fitted - former output) / norm of the former, on tokens that were not fitted to."""

    start: float
    """of the weights that `paired` gives"""
    end: float


def paired(former: SwiGLUWeights, x: Tensor, width: int) -> SquaredReLUWeights:
    """Squared-ReLU weights that are close to a SwiGLU layer before any training.

    For |u| <= |g|, ``relu(g) u = (relu(g + u)^2 - relu(g - u)^2) / 4`` exactly, and silu(g) is near relu(g): a pair of
    squared-ReLU features does what a gated one did. There is room for width / 2 pairs; those features get it that
    contribute most to the outputs on the inputs x (N, d).
    """
    hidden = F.silu(F.linear(x, former.gate)) * F.linear(x, former.up)
    size = hidden.square().mean(0) * former.down.square().sum(0)
    best = size.topk(width // 2).indices.sort().values
    gate, up, down = former.gate[best], former.up[best], former.down[:, best] / 4
    return SquaredReLUWeights(torch.cat((gate + up, gate - up)), torch.cat((down, -down), dim=1))


def squared_relu(x: Tensor, weights: SquaredReLUWeights) -> Tensor:
    return F.linear(F.relu(F.linear(x, weights.up)).square(), weights.down)


def relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).detach().norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def fit_squared_relu(
    former: SwiGLUWeights,
    x: Tensor,
    *,
    width: int,
    steps: int,
    lr: float = 1e-2,
    batch_size: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
) -> tuple[SquaredReLUWeights, FitReport]:
    """Fit a squared-ReLU layer to the outputs of a SwiGLU layer on inputs x (N, d), by AdamW on the squared error.

    width: of the new layer, even and at most 2 I. steps: of batch_size inputs each, with a learning rate that falls
    from lr to 0 along a half cosine; lr is relative to the root mean square of each matrix. held_out: share of x, its
    end, that only measures; the weights of the least error there are kept, the starting ones included.

    Raises ValueError for a width that has no pairs or more than there are features, and for too few inputs.
    """
    features = former.gate.shape[0]
    if width % 2 or not 2 <= width <= 2 * features:
        raise ValueError(f"width must be even and between 2 and {2 * features}, got {width}")
    measured = int(len(x) * held_out)
    if measured < 1 or measured >= len(x):
        raise ValueError(f"{len(x)} inputs are too few to hold out a share of {held_out}")
    with torch.no_grad():
        y = F.linear(F.silu(F.linear(x, former.gate)) * F.linear(x, former.up), former.down)
        x, x_measured = x[:-measured], x[-measured:]
        y, y_measured = y[:-measured], y[-measured:]
        start = paired(former, x, width)
        errors = [relative_error(squared_relu(x_measured, start), y_measured)]
    weights = SquaredReLUWeights(*(w.clone().requires_grad_() for w in start))
    groups = [{"params": [w], "scale": float(w.detach().square().mean().sqrt())} for w in weights]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    best = start
    norm = y.square().mean()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"] * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())
        rows = torch.randint(len(x), (min(batch_size, len(x)),), generator=generator)
        with torch.enable_grad():
            loss = (squared_relu(x[rows], weights) - y[rows]).square().mean() / norm
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            with torch.no_grad():
                errors.append(relative_error(squared_relu(x_measured, weights), y_measured))
                if errors[-1] == min(errors):
                    best = SquaredReLUWeights(*(w.detach().clone() for w in weights))
    return best, FitReport(start=errors[0], end=min(errors))
