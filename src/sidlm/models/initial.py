"""How the weights of a new model are distributed, said once for `SidForCausalLM(config)` and for `sid train`."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from sidlm.models.config import SidConfig
from sidlm.nn.moe import MoEFeedForward
from sidlm.nn.norm import RMSNorm


class Normal(NamedTuple):
    """A normal distribution, or with std 0 a constant."""

    mean: float
    std: float


def own_distributions(module: nn.Module, config: SidConfig) -> dict[str, Normal]:
    """The random or constant weights that a module has itself, by their name in it.

    Normal(initializer_range); what feeds the residual stream divided by sqrt(2 * layers); norms one. An embedding that
    is not the output head too starts at unit scale, the scale at which the blocks see it after their norm: small models
    leave the entropy of single tokens much sooner (docs/LOG.md).
    """
    std = config.initializer_range
    assert std is not None  # filled in by SidConfig
    residual_std = std / (2 * config.num_hidden_layers) ** 0.5
    if isinstance(module, nn.Embedding):
        return {"weight": Normal(0.0, std if config.tie_word_embeddings else 1.0)}
    if isinstance(module, nn.Linear):
        return {"weight": Normal(0.0, residual_std if getattr(module, "to_residual", False) else std)}
    if isinstance(module, RMSNorm):
        return {"weight": Normal(1.0, 0.0)}
    if isinstance(module, MoEFeedForward):
        gate = {} if module.gate_proj is None else {"gate_proj": Normal(0.0, std)}
        return {"up_proj": Normal(0.0, std), **gate, "down_proj": Normal(0.0, residual_std)}
    return {}


def distributions(model: nn.Module, config: SidConfig) -> dict[str, Normal]:
    """The same of every parameter of a model, by its name there."""
    return {
        f"{path}.{name}" if path else name: found
        for path, module in model.named_modules()
        for name, found in own_distributions(module, config).items()
    }
