"""How fast a run is."""

from __future__ import annotations

import functools
from typing import Any

from sidlm.train import hardware
from sidlm.train.config import RunConfig


class SpeedMeter:
    """Tokens per second and MFU (model FLOPs of the achieved tokens over the device's peak)."""

    def __init__(self, model: Any, cfg: RunConfig, peak: hardware.Peak, processes: int) -> None:
        from sidlm.models.flops import train_flops_per_token

        self.peak, self.processes = peak, processes
        self.flops = functools.cache(lambda length: train_flops_per_token(model.config, length))
        self.flops_per_token = self.flops(cfg.data.seq_len)
        self.steps = 0
        self.first = (0, 0.0)
        self.rest = (0, 0.0)

    def measure(self, tokens: int, seconds: float, length: int) -> dict[str, Any]:
        """The record's fields about the speed of one step in rows of `length` tokens."""
        self.steps += 1
        if self.steps == 1:  # compilation, first allocations
            self.first = (tokens, seconds)
        else:
            self.rest = (self.rest[0] + tokens, self.rest[1] + seconds)
        speed = tokens / seconds
        mfu = speed * self.flops(length) / (self.peak.flops * self.processes)
        return {"step_tokens": tokens, "seconds": seconds, "tokens_per_second": speed, "mfu": mfu}

    @property
    def tokens_per_second(self) -> float:
        """Over all steps but the first."""
        tokens, seconds = self.rest if self.rest[0] else self.first
        return tokens / seconds if seconds else 0.0

    def facts(self) -> dict[str, Any]:
        """For environment.json."""
        return {
            "peak_flops": self.peak.flops,
            "peak_flops_source": self.peak.source,
            "train_flops_per_token": self.flops_per_token,
        }
