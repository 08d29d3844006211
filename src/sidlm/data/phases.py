"""Batches whose number of rows, row length and mix of sources change over a run: still a function of (seed, step).

A run is a row of phases, each with one batch size, row length and mix, which begin after a number of tokens (Llama 3,
arXiv 2407.21783, sections 3.1.2 and 3.4.1). Within a phase samples are numbered from 0; every source's text goes on
where the phase before left it, so no token is read twice in an epoch or left out.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidlm.data.loader import Batch, Loader, TrainDataset


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps with one kind of batch."""

    first_step: int
    tokens: int
    """seen before first_step"""
    batch_size: int
    """rows"""
    seq_len: int
    weights: tuple[float, ...] | None = None
    """of the sources, in their order; None: those that the sources came with"""

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_len


def plan_phases(first: Phase, changes: Sequence[tuple[int, dict]]) -> tuple[Phase, ...]:
    """The phases of a run that begins with `first` and changes fields of Phase after so many tokens.

    changes: (tokens, {"batch_size": ..., ...}) in any order. A change holds from the first step before which at least
    that many tokens were seen.
    """
    phases = [first]
    for tokens, fields in sorted(changes, key=lambda change: change[0]):
        last = phases[-1]
        steps = max(0, math.ceil((tokens - last.tokens) / last.step_tokens))
        seen = last.tokens + steps * last.step_tokens
        new = replace(last, first_step=last.first_step + steps, tokens=seen, **fields)
        phases[len(phases) - (steps == 0) :] = [new]
    return tuple(phases)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """The phase of a step (0-based)."""
    return phases[bisect.bisect_right([phase.first_step for phase in phases], step) - 1]


def tokens_before(phases: Sequence[Phase], step: int) -> int:
    """Tokens seen in the steps before `step`."""
    phase = phase_at(phases, step)
    return phase.tokens + (step - phase.first_step) * phase.step_tokens


def last_steps(phases: Sequence[Phase], total_steps: int, tokens: int) -> int:
    """How many of the last steps hold at least `tokens` tokens together, at most all."""
    wanted = max(0, tokens_before(phases, total_steps) - tokens)
    for phase in reversed(phases):
        if phase.first_step <= total_steps and phase.tokens <= wanted:
            return total_steps - min(total_steps, phase.first_step + (wanted - phase.tokens) // phase.step_tokens)
    return total_steps


class PhasedLoader:
    """The batches of one rank over all phases; see `Loader` for rank and world."""

    def __init__(
        self, dataset: TrainDataset, phases: Sequence[Phase], *, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        self.phases, self.loaders = tuple(phases), []
        offsets = [0] * len(dataset.streams)
        for i, phase in enumerate(self.phases):
            part = dataset.part(phase.seq_len, phase.weights, offsets)
            self.loaders.append(Loader(part, batch_size=phase.batch_size, seed=seed, rank=rank, world=world))
            if i + 1 < len(self.phases):
                rows = (self.phases[i + 1].first_step - phase.first_step) * phase.batch_size
                read = part.mixture.rows_before(rows, seed)
                offsets = [at + count * phase.seq_len for at, count in zip(offsets, read, strict=True)]

    def batch(self, step: int) -> Batch:
        """This rank's rows of the step's batch, steps from 0."""
        phase = phase_at(self.phases, step)
        return self.loaders[self.phases.index(phase)].batch(step - phase.first_step)
