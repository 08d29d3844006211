"""2:4 activation sparsity during training: dense at first, and what it drops (arXiv 2503.16672, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sidlm.nn.feed_forward import SquaredReLUFeedForward
from sidlm.train.config import SparsityConfig
from sidlm.train.metrics import finite
from sidlm.train.processes import Processes

STATISTICS = ("zeros", "dropped", "dropped_act_t", "dropped_dact_t", "threshold")
"""What a layer measures, in the order of its ``statistics``"""


def sparse_layers(model: nn.Module) -> list[SquaredReLUFeedForward]:
    """The layers with 2:4 sparsity, in their order, told to measure from now on.

    They measure in every step, because to start and to stop would compile them anew; only reading waits for the device.
    """
    layers = [m for m in model.modules() if isinstance(m, SquaredReLUFeedForward) and m.sparsity is not None]
    for layer in layers:
        layer.measure()
    return layers


def present(model: Any) -> bool:
    """Whether the model's layers are such ones, on whatever process."""
    return model.config.mlp_sparsity is not None and not model.config.num_local_experts


def switch(layers: list[SquaredReLUFeedForward], step: int, cfg: SparsityConfig) -> None:
    """Make the layers dense or sparse for `step` (0-based); a pure function of the step, so resuming is exact."""
    for layer in layers:
        layer.enabled.fill_(step >= cfg.warmup_steps)


def measured(model: Any, layers: list[SquaredReLUFeedForward], group: Processes) -> dict[str, list[float | None]]:
    """Statistics of the newest forward and backward pass, a number for each layer; None where there is none. Of several
    processes those of the first one that has the layer: of a model in stages other processes have others.

    zeros: share of activations that are zero. dropped: share of the others that the forward pass dropped;
    dropped_act_t and dropped_dact_t: that the weight gradients' operands dropped besides. threshold: share of tokens
    at which the sparsest of the features that stay dense is active.
    """
    kept = [layer.statistics for layer in layers if layer.statistics is not None]
    rows: list[Any] = torch.stack(kept).tolist() if kept else []  # waits for the device once
    if group.mesh is not None and group.mesh["pp"].size() > 1:
        places = [i for i, block in enumerate(model.model.layers) if any(m in layers for m in block.modules())]
        found: dict[int, Any] = {}
        for ranks in group.everyone(list(zip(places, rows, strict=True))):
            found = dict(ranks) | found
        rows = [row for _, row in sorted(found.items())]
    return {name: [finite(row[i]) for row in rows] for i, name in enumerate(STATISTICS)}


def announcement(layers: int, cfg: SparsityConfig, steps: int) -> str:
    """One line on when the model's layers become sparse. layers: how many it has, on whatever process."""
    if cfg.warmup_steps >= steps:
        return f"2:4 sparsity never starts: sparsity.warmup_steps={cfg.warmup_steps}, train.steps={steps}"
    return f"2:4 sparsity in {layers} layers from step {cfg.warmup_steps + 1} on"
