"""Muon over matrices that are split over processes: each matrix is orthogonalised whole, by one of them.

Momentum is elementwise, so it stays split as the weights are, and a checkpoint holds it like any other state. The
Newton-Schulz iteration is not: in rounds of as many matrices as there are processes, every process is sent the parts of
one matrix, orthogonalises it, and sends everyone their part of the result. A round is two all-to-all exchanges of its
matrices, its work is shared, and no process ever holds more than one whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def orthogonalised(matrix: Tensor) -> Tensor:
    """The step that torch's Muon takes against a matrix (m, n) of Nesterov momentum at a learning rate of 1.

    It is -0.2 sqrt(max(m, n)) times the orthogonalised matrix: the size of AdamW's steps (arXiv 2502.16982, section
    2.2).
    """
    step = torch.zeros_like(matrix)
    step.grad = matrix
    settings: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([step], lr=1.0, weight_decay=0.0, **settings).step()
    return step


class ShardedMuon(torch.optim.Optimizer):
    """torch.optim.Muon with Nesterov momentum and steps of AdamW's size, over matrices that are DTensors.

    line: the processes that hold the parts of the matrices. Each of them makes it with the same matrices in the same
    order, and calls `step` alike.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], line: dist.ProcessGroup, *,
        lr: float, weight_decay: float, momentum: float,
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        matrices = [p for group in self.param_groups for p in group["params"]]
        for p in matrices:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}
        self.party = Party(line, matrices)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step on the gradients that there are; a matrix without one stays as it is, on all processes."""
        settings = {p: group for group in self.param_groups for p in group["params"]}
        for matrices in self.party.rounds():
            momenta = [self._momentum(p, settings[p]["momentum"]) for p in matrices]
            for p, step in zip(matrices, self.party.orthogonalise(matrices, momenta), strict=True):
                lr = settings[p]["lr"]
                p.to_local().mul_(1 - lr * settings[p]["weight_decay"]).add_(step, alpha=lr)

    def _momentum(self, p: DTensor, momentum: float) -> Tensor:
        """This process's part of the Nesterov momentum."""
        assert isinstance(p.grad, DTensor)
        gradient, buffer = p.grad.to_local(), self.state[p]["momentum_buffer"].to_local()
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum)


class Block(NamedTuple):
    """The part of a matrix that a process holds: a rectangle of it, maybe empty."""

    top: int
    left: int
    height: int
    width: int

    def of(self, matrix: Tensor) -> Tensor:
        """A view of the part."""
        return matrix[self.top : self.top + self.height, self.left : self.left + self.width]


class Party:
    """The processes that hold the parts of some matrices, and work on them."""

    def __init__(self, group: dist.ProcessGroup, matrices: Sequence[DTensor]) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        # like sizes in one round: its slowest process is the one with the largest matrix
        self.matrices = sorted(matrices, key=lambda p: -p.numel())
        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, [_block(p) for p in self.matrices], group=self.group)
        self.blocks = {p: [blocks[i] for blocks in held] for i, p in enumerate(self.matrices)}
        """what each process holds of a matrix"""

    def rounds(self) -> Iterator[Sequence[DTensor]]:
        """The matrices that have gradients, at most one for each process at a time."""
        ready = [p for p in self.matrices if p.grad is not None]
        for first in range(0, len(ready), self.size):
            yield ready[first : first + self.size]

    def orthogonalise(self, matrices: Sequence[DTensor], parts: Sequence[Tensor]) -> list[Tensor]:
        """This process's parts of the steps for some matrices, from its `parts` of their momenta.

        The i-th matrix is the i-th process's work.
        """
        blocks, works = [self.blocks[p] for p in matrices], self.rank < len(matrices)
        senders = [self._senders(held, worker) for worker, held in enumerate(blocks)]
        sent = [part if self.rank in senders[i] else part[:0] for i, part in enumerate(parts)]
        own = blocks[self.rank] if works else []
        sizes = [block.height * block.width * (rank in senders[self.rank]) for rank, block in enumerate(own)]
        came, results = self._exchange(sent, sizes, parts[0]), []
        if works:
            whole = parts[0].new_empty(matrices[self.rank].shape)
            for block, piece in zip(own, came, strict=True):
                if piece.numel():
                    block.of(whole).copy_(piece.view(block.height, block.width))
            step = orthogonalised(whole)
            results = [block.of(step) for block in own]
        back = self._exchange(results, [part.numel() for part in parts], parts[0])
        return [piece.view_as(part) for piece, part in zip(back, parts, strict=True)]

    def _senders(self, held: Sequence[Block], worker: int) -> set[int]:
        """One process for each different part, of those that hold it the next one from the worker on."""
        found: dict[Block, int] = {}
        for rank in range(worker, worker + self.size):
            found.setdefault(held[rank % self.size], rank % self.size)
        return set(found.values())

    def _exchange(self, sent: Sequence[Tensor], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Send the i-th tensor to the i-th process and take sizes[i] numbers from it, none where the lists end."""
        out = torch.cat([like.new_empty(0), *(x.reshape(-1) for x in sent)])
        into = like.new_empty(sum(sizes))
        counts = [[*n, *[0] * (self.size - len(n))] for n in (sizes, [x.numel() for x in sent])]
        dist.all_to_all_single(into, out, *counts, group=self.group)
        return list(into.split(list(sizes)))


def _block(p: DTensor) -> Block:
    (height, width), (top, left) = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return Block(top, left, height, width)
