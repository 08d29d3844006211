"""Learning-rate schedule: linear warm-up, cosine down to a floor, linear annealing to zero (Llama 3, section 3.4)."""

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
    cosine_steps: int = 0
    """step at which the cosine reaches the floor, which then stays; 0: where annealing begins, or the run ends"""
    anneal_tokens: int = 0
    """tokens at the end of the run over which the learning rate falls linearly to zero; 0: no annealing"""
    average_every: int = 0
    """steps between the weights of the annealing whose mean is validated, sampled and exported (Polyak averaging); 0:
    the last weights are"""


def warmup_steps(cfg: ScheduleConfig, total_steps: int) -> int:
    """Steps of warm-up of a run of `total_steps`, with -1 resolved."""
    if cfg.warmup_steps >= 0:
        return cfg.warmup_steps
    return max(1, round(0.02 * total_steps))


def learning_rate(step: int, cfg: ScheduleConfig, *, peak: float, total_steps: int, anneal_steps: int = 0) -> float:
    """Learning rate of `step` (0-based, < total_steps); anneal_steps: those of the annealing at the end.

    The annealing falls from the rate that the cosine has at its first step to zero, reached right after the last one.

    The warm-up never uses a rate of zero: step s takes peak * (s + 1) / warmup. The cosine starts at the peak on the
    first step after the warm-up and ends at floor * peak on the last step. It depends on total_steps, so a run that
    is resumed with another train.steps follows the new curve from there on.
    """
    warmup, first = warmup_steps(cfg, total_steps), total_steps - anneal_steps
    if anneal_steps and step >= first:
        top = learning_rate(first, cfg, peak=peak, total_steps=first + 1)
        return top * (total_steps - step) / anneal_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    end = cfg.cosine_steps or (first if anneal_steps else total_steps - 1)
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    low = cfg.floor * peak
    return low + (peak - low) * 0.5 * (1.0 + math.cos(math.pi * progress))
