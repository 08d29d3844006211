"""Polyak averaging: the mean of the weights over the annealing at the end of a run (Llama 3, section 3.4.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Average:
    """The running mean of a model's parameters, sampled every `every` steps from `first` (0-based) on.

    Which steps are sampled follows from the step alone; the mean itself lies in `tensors`, which a checkpoint holds.
    """

    def __init__(self, model: nn.Module, first: int, every: int) -> None:
        self.first, self.every = first, every
        self.pairs = [(name, p.detach(), p.detach().clone()) for name, p in model.named_parameters()]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """ "average.NAME" -> mean, not copies."""
        return {f"average.{name}": mean for name, _, mean in self.pairs}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step` into the mean if it is one to sample."""
        count, rest = divmod(step - self.first, self.every)
        if rest:
            return
        for _, weight, mean in self.pairs:
            own, into = _local(weight), _local(mean)
            into.lerp_(own, 1 / (count + 1)) if count else into.copy_(own)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """The model has the mean as its weights while the body runs, and its own again afterwards, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for _, weight, mean in self.pairs:
            own, other = _local(weight), _local(mean)
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)


def _local(x: Tensor) -> Tensor:
    """The tensor, or the part of a sharded one that this process holds."""
    to_local = getattr(x, "to_local", None)
    return x if to_local is None else to_local()
