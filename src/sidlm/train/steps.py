"""A range of steps in a config. Imports no torch: a command's help reads it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepRange:
    """Some steps, counted from 1."""

    start: int = 1
    """first step"""
    steps: int = 0
    """how many; 0 = none"""

    def __contains__(self, step: int) -> bool:
        return self.start <= step < self.start + self.steps
