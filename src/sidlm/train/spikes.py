"""Loss spikes: a step whose loss or gradient norm lies far above the recent ones is left out.

Loss and norm are known before the optimizer moves, so the weights never see such a batch and nothing has to be rolled
back. What was accepted lately is in the checkpoint, so a run that goes on decides as it would have.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

LEAST = 16
"""Accepted steps before anything is judged"""
FLOOR = 0.01
"""Least spread, as a share of the median: a flat loss must not make every ripple a spike"""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """Leave out steps of a sudden loss or gradient."""

    threshold: float = 0.0
    """a step whose loss, or logarithm of the gradient norm, is this many robust standard deviations (1.4826 times the
    median distance from the median) above the median of the window changes nothing; 0: no step is left out"""
    window: int = 128
    """accepted steps that a step is compared with"""
    max_in_a_row: int = 5
    """after so many in a row the loss has a new level: the window is forgotten and the run goes on"""
    max_total: int = 100
    """after so many in all no step is left out any more"""


@dataclass
class SpikeGuard:
    """Judges steps. `state` is JSON, and all there is to keep."""

    config: SpikeConfig
    state: dict[str, Any] = field(default_factory=lambda: {"recent": [], "in_a_row": 0, "total": 0})

    def judge(self, loss: float, norm: float) -> str | None:
        """Why a step of this finite loss and gradient norm must not be done; None: it may, and is remembered."""
        cfg, state = self.config, self.state
        if not cfg.threshold:
            return None
        why = None
        if len(state["recent"]) >= min(LEAST, cfg.window) and state["total"] < cfg.max_total:
            why = self._far("loss", loss, 0) or self._far("gradient norm", norm, 1)
        if why is not None:
            state["in_a_row"] += 1
            state["total"] += 1
            if state["in_a_row"] <= cfg.max_in_a_row:
                return why
            state["recent"] = []
        state["in_a_row"] = 0
        state["recent"] = [*state["recent"], [loss, norm]][-cfg.window :]
        return None

    def _far(self, name: str, value: float, column: int) -> str | None:
        scale = math.log if column else float
        seen = [scale(max(row[column], 1e-300)) for row in self.state["recent"]]
        middle = statistics.median(seen)
        spread = max(1.4826 * statistics.median(abs(x - middle) for x in seen), FLOOR * abs(middle), 1e-6)
        far = (scale(max(value, 1e-300)) - middle) / spread
        if far <= self.config.threshold:
            return None
        usual = math.exp(middle) if column else middle
        return f"spike: the {name} is {value:.4g}, {far:.1f} robust deviations above {usual:.4g}"
