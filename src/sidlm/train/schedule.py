"""Learning-rate schedule: linear warm-up, then a cosine down to a floor (Llama 3, section 3.4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over the run."""

    warmup_steps: int = -1
    """steps of linear warm-up from 0; -1 means 2 % of train.steps (at least one)"""
    floor: float = 0.1
    """last learning rate of the cosine, as a fraction of optim.lr"""


def warmup_steps(cfg: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up of a run of `total_steps`, with -1 resolved."""
    if cfg.warmup_steps >= 0:
        return cfg.warmup_steps
    return max(1, round(0.02 * total_steps))


def learning_rate(step: int, cfg: ScheduleConfig, *, peak: float, total_steps: int) -> float:
    """Learning rate of `step` (0-based, < total_steps).

    The warm-up never uses a rate of zero: step s takes peak * (s + 1) / warmup. The cosine starts at the peak on the
    first step after the warm-up and ends at floor * peak on the last step. It depends on total_steps, so a run that
    is resumed with another train.steps follows the new curve from there on.
    """
    warmup = warmup_steps(cfg, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    low = cfg.floor * peak
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
