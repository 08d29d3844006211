"""Expert parallelism: each process of a group holds some experts of every layer, and tokens travel to their experts.

The processes are neighbours in dp_shard x cp, which see other tokens in the same layers: the other weights stay split
over all of them by FSDP, and no process is added that would have no tokens of its own. A layer exchanges the rows twice
by all-to-all, there and back, each one node to autograd; no token is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sidlm.errors import SidError
from sidlm.nn.moe import MoEFeedForward, feed_experts

if TYPE_CHECKING:
    from sidlm.models.config import SidConfig


def check_experts(config: SidConfig, ep: int) -> None:
    """Raise SidError, naming the numbers, unless a model has experts that `ep` processes can split."""
    if not config.num_local_experts:
        raise SidError(f"expert parallelism (ep {ep}) of a model without experts: num_local_experts is 0")
    if config.num_local_experts % ep:
        raise SidError(f"num_local_experts ({config.num_local_experts}) does not divide by ep ({ep})")


def split_experts(layer: Any, mesh: DeviceMesh) -> None:
    """Keep one part of a layer's experts on each process of a 1-D mesh, in place; names of parameters stay."""
    for name, weight in list(expert_weights(layer)):
        part = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        layer.register_parameter(name, nn.Parameter(part, requires_grad=weight.requires_grad))  # pyright: ignore

    def run_experts(rows: Tensor, counts: Tensor) -> Tensor:
        return _run_far_experts(layer, rows, counts, mesh)

    layer.run_experts = run_experts


def expert_weights(layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The stacked weights of a layer's experts, by name."""
    for name in ("up_proj", "gate_proj", "down_proj"):
        weight = getattr(layer, name)
        if weight is not None:
            yield name, weight


@torch.compiler.disable  # how many rows travel is known only when they do
def _run_far_experts(layer: MoEFeedForward, rows: Tensor, counts: Tensor, mesh: DeviceMesh) -> Tensor:
    """As `MoEFeedForward.run_experts`: rows (M, d) sorted by expert, counts (E,) of all experts -> (M, d)."""
    group, ep = mesh.get_group(), mesh.size()
    theirs = torch.empty_like(counts)
    dist.all_to_all_single(theirs, counts, group=group)
    theirs = theirs.view(ep, -1)  # of each process, rows for each expert here
    sent, received = counts.view(ep, -1).sum(dim=1).tolist(), theirs.sum(dim=1).tolist()
    arrived = _Exchange.apply(rows, received, sent, group)
    # sorted by process, then by expert: to be sorted by expert
    owner = torch.arange(theirs.shape[1], device=rows.device).repeat(ep).repeat_interleave(theirs.flatten())
    order = owner.argsort(stable=True)
    weights = {name: _local(weight) for name, weight in expert_weights(layer)}
    out = feed_experts(arrived[order], theirs.sum(dim=0), **weights)
    return _Exchange.apply(out[order.argsort()], sent, received, group)


def _local(weight: Any) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


class _Exchange(torch.autograd.Function):
    """Rows to other processes, and their gradients back."""

    @staticmethod
    def forward(ctx, rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.where = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        sent, received, group = ctx.where
        out = grad.new_empty(sum(sent), *grad.shape[1:])
        dist.all_to_all_single(out, grad.contiguous(), sent, received, group=group)
        return out, None, None, None
