"""Statistics of each layer's output and each parameter's gradient, in the steps in which they are wanted.

Each process adds up what it holds, at places that are the same on all of them; one sum and one maximum over all
processes then are those of the whole model: shards are parts of it, replicas count equally often above and below.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sidlm.nn.block import Block
from sidlm.train.integrity import local
from sidlm.train.metrics import finite
from sidlm.train.processes import Processes

NAMES = ("rms", "max", "zeros", "nonfinite")
"""Root mean square and largest absolute value, of what is finite; shares of zeros and of what is not finite"""


class LayerStatistics:
    """Every process makes one and calls it alike; nothing is computed outside of the steps that `begin` is told."""

    def __init__(self, model: Any, group: Processes) -> None:
        self.model, self.group, self.on = model, group, False
        self.count = len(model.model.layers)
        self.outputs: dict[int, list[Tensor]] = {}
        self.gradients_seen: dict[str, Tensor] = {}
        self.names: list[str] = []
        for index, layer in enumerate(model.model.layers):
            if isinstance(layer, Block):
                layer.register_forward_hook(partial(self._see, index))

    def _see(self, index: int, _: Any, args: Any, out: Tensor) -> None:
        if self.on:
            self.outputs.setdefault(index, []).append(sums(local(out)))

    def begin(self, on: bool) -> None:
        """The next step begins; on: whether it is measured."""
        self.on = on
        self.outputs, self.gradients_seen = {}, {}

    def gradients(self) -> None:
        """Look at the gradients: after the backward pass, before they are clipped."""
        if self.on:
            self.gradients_seen = {
                name: sums(local(p.grad)) for name, p in self.model.named_parameters() if p.grad is not None
            }
            self.on = False

    def result(self) -> dict[str, Any]:
        """{"output": {statistic: [of each layer]}, "gradient": {statistic: {parameter: value}}}."""
        if not self.names:  # of a model in stages each process has some
            everyone = self.group.everyone([name for name, _ in self.model.named_parameters()])
            self.names = list(dict.fromkeys(name for names in everyone for name in names))
        device = next(self.model.parameters()).device
        table = torch.zeros(self.count + len(self.names), 5, dtype=torch.float64, device=device)
        for index, found in self.outputs.items():
            table[index, :4] = torch.stack(found)[:, :4].sum(0)
            table[index, 4] = torch.stack(found)[:, 4].amax()
        for row, name in enumerate(self.names, self.count):
            if name in self.gradients_seen:
                table[row] = self.gradients_seen[name]
        if self.group.mesh is not None:
            largest = table[:, 4].contiguous()
            dist.all_reduce(table)
            dist.all_reduce(largest, dist.ReduceOp.MAX)
            table[:, 4] = largest
        rows = [_row(values) for values in table.tolist()]
        layers, parameters = rows[: self.count], dict(zip(self.names, rows[self.count :], strict=True))
        return {
            "output": {key: [row[i] for row in layers] for i, key in enumerate(NAMES)},
            "gradient": {key: {name: row[i] for name, row in parameters.items()} for i, key in enumerate(NAMES)},
        }


@torch.no_grad()
def sums(x: Tensor) -> Tensor:
    """float64 (5,): squares of the finite elements, elements, zeros, not finite ones, the largest finite magnitude."""
    x = x.detach()
    good = x.isfinite()
    kept = torch.where(good, x, 0).float() if x.dtype != torch.float64 else torch.where(good, x, 0)
    largest = kept.abs().amax() if x.numel() else torch.zeros((), device=x.device)
    parts = (kept.square().sum(dtype=torch.float64), torch.tensor(float(x.numel()), device=x.device),
             (x == 0).sum(), (~good).sum(), largest)  # fmt: skip
    return torch.stack([part.double() for part in parts])


def _row(values: list[float]) -> list[float | None]:
    squares, count, zeros, bad, largest = values
    if not count:  # experts without a token
        return [None] * len(NAMES)
    return [finite((squares / max(1.0, count - bad)) ** 0.5), finite(largest), zeros / count, bad / count]
