"""The mesh of all processes and its parts, in the paper's order [TP, CP, PP, DP] from the innermost out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sidlm.errors import SidError
from sidlm.parallel.config import DIMENSIONS, ParallelConfig

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""Device type -> the backend of torch.distributed for it"""


def build_mesh(config: ParallelConfig, device_type: str) -> DeviceMesh:
    """The mesh of all processes with the dimensions DIMENSIONS, those of size 1 too; every process calls it.

    The default process group must exist: gloo, NCCL, or torch's fake one, under which one process plans for thousands.
    Raises SidError for sizes that do not multiply to the number of processes, or a device type that is not known.
    """
    if device_type not in BACKENDS:
        raise SidError(f"device type must be one of {', '.join(BACKENDS)}, got {device_type!r}")
    if not dist.is_initialized():
        raise SidError("there is no process group: start the processes with torchrun")
    sizes = config.sizes(dist.get_world_size())
    return init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=DIMENSIONS)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What `fully_shard` takes: dp_shard and cp as one dimension, and dp_replicate outside it if that is above 1."""
    shard = mesh["dp_shard", "cp"]._flatten("fsdp")
    # slicing the root by a flattened name is deprecated; FSDP itself joins meshes like this
    return shard if mesh["dp_replicate"].size() == 1 else DeviceMesh._concatenate([mesh["dp_replicate"], shard])


class ExpertMeshes(NamedTuple):
    """The mesh of dp_shard x cp, and dp_replicate outside it, as experts see it."""

    split: DeviceMesh
    """the processes that split the experts of a layer"""
    fsdp: DeviceMesh
    """those that hold the same experts, for `fully_shard`"""


def expert_meshes(mesh: DeviceMesh, ep: int) -> ExpertMeshes:
    """Of `ep` neighbours in dp_shard x cp each; ep must divide their number."""
    shard = mesh["dp_shard", "cp"]._flatten("fsdp")
    both = shard._unflatten("fsdp", (shard.size() // ep, ep), ("expert_shard", "ep"))
    rest = both["expert_shard"]
    fsdp = rest if mesh["dp_replicate"].size() == 1 else DeviceMesh._concatenate([mesh["dp_replicate"], rest])
    return ExpertMeshes(both["ep"], fsdp)


def batch_share(mesh: DeviceMesh) -> tuple[int, int]:
    """(index, count): which of how many parts of the rows of a batch this process reads."""
    count = mesh["dp_shard"].size()
    return (
        mesh.get_local_rank("dp_replicate") * count + mesh.get_local_rank("dp_shard"),
        mesh["dp_replicate"].size() * count,
    )


@torch.no_grad()
def sum_over_rows(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A copy of x summed over the processes that read other rows, those of dp_replicate and dp_shard.

    For the number of labelled tokens of a batch, before the forward pass.
    """
    return _sum(x, mesh["dp_replicate", "dp_shard"]._flatten("rows"))


@torch.no_grad()
def sum_over_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """A copy of x summed over the processes that see other tokens, those of dp_replicate, dp_shard and cp.

    For the loss of a batch: each process has that of its tokens, divided by the labelled tokens of all.
    """
    return _sum(x, tokens_mesh(mesh))


@torch.no_grad()
def largest_of_rows(number: int, mesh: DeviceMesh) -> int:
    """The largest that the processes which read other rows give."""
    found = torch.tensor(number, device=mesh.device_type)
    dist.all_reduce(found, dist.ReduceOp.MAX, mesh["dp_replicate", "dp_shard"]._flatten("rows").get_group())
    return int(found)


def tokens_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The processes that see other tokens in the same layers, as one dimension."""
    return mesh["dp_replicate", "dp_shard", "cp"]._flatten("tokens")


def stage_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The processes that hold the same layers, or parts of them, as one dimension: all but for pp."""
    return mesh["dp_replicate", "dp_shard", "cp", "tp"]._flatten("stage")


def _sum(x: Tensor, line: DeviceMesh) -> Tensor:
    total = x.detach().clone()
    dist.all_reduce(total, group=line.get_group())
    return total
