"""One process of a layer that FSDP2 shards: RANK RANKS FOLDER. test_simplicial_operator.py starts them."""

import gc
import sys
from pathlib import Path

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sidlm.nn import Rotary, SimplicialAttention


def layer() -> SimplicialAttention:
    torch.manual_seed(0)
    return SimplicialAttention(24, 4, 2, 6, window=(9, 4), k2_bias=1.0, v2_bias=1.0, qk_norm=True).double()


def loss_of(module: torch.nn.Module, rank: int = 0, ranks: int = 1) -> Tensor:
    """Of this rank's part of a batch of four rows, with documents and padding."""
    x = torch.randn(4, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0] * 20, [0] * 7 + [1] * 13, [-1] * 5 + [0] * 15, [0] * 19 + [1]])
    x, ids = x.chunk(ranks)[rank], ids.chunk(ranks)[rank]
    positions = Rotary(6, {"rope_type": "default", "rope_theta": 10000.0})(torch.arange(20)[None], len(x))
    return module(x, positions, doc_ids=ids).double().square().sum(dim=(1, 2)).mean()


def train(rank: int, ranks: int, policy: MixedPrecisionPolicy) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss of all ranks and the gradients, whole."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (ranks,))
    module = layer()
    fully_shard(module, mesh=mesh, mp_policy=policy)
    loss = loss_of(module, rank, ranks)
    loss.backward()
    mean = loss.detach() / ranks
    distributed.all_reduce(mean)
    grads = {}
    for name, parameter in module.named_parameters():
        assert isinstance(parameter.grad, distributed.tensor.DTensor), name
        assert parameter.grad.to_local().shape[0] < parameter.shape[0], name  # really a shard
        grads[name] = parameter.grad.full_tensor()
    return mean, grads


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    policies = {"same": MixedPrecisionPolicy(), "bfloat16": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}
    for name, policy in policies.items():
        result = train(rank, ranks, policy)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    gc.collect()  # what FSDP made holds on to the group, whose threads must end before the process does
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
