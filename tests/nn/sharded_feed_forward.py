"""One process of a sparse feed-forward layer that FSDP2 and DDP spread: RANK RANKS FOLDER."""

import gc
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sidlm.nn import SquaredReLUFeedForward


def layer() -> SquaredReLUFeedForward:
    torch.manual_seed(0)
    return SquaredReLUFeedForward(24, 192, sparsity="2:4").double()


def loss_of(module: torch.nn.Module, rank: int, ranks: int) -> Tensor:
    """Of this rank's part of the tokens; which tokens are neighbours depends on the part."""
    x = torch.randn(4, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return module(x.chunk(ranks)[rank]).square().sum(dim=(1, 2)).mean()


def gradients(module: torch.nn.Module, rank: int, ranks: int) -> dict[str, Tensor]:
    """The mean over the ranks, whole."""
    loss_of(module, rank, ranks).backward()
    grads = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if isinstance(grad, distributed.tensor.DTensor):
            assert grad.to_local().shape[0] < parameter.shape[0], name  # really a shard
            grad = grad.full_tensor()
        grads[name.removeprefix("module.")] = grad
    return grads


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    sharded = layer()
    fully_shard(sharded, mesh=distributed.device_mesh.init_device_mesh("cpu", (ranks,)))
    for name, module in (("fsdp", sharded), ("ddp", DistributedDataParallel(layer()))):
        result = gradients(module, rank, ranks)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    gc.collect()  # what FSDP made holds on to the group, whose threads must end before the process does
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
