"""The largest tensor that the loss makes at Llama 3's vocabulary, forward and backward, plain and split over 2 and 8.

python benchmarks/loss_memory.py --json benchmarks/results/loss_memory.json
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sidlm.ops import linear_cross_entropy
from sidlm.parallel.dry_run import fake_processes
from sidlm.parallel.loss import vocab_parallel_cross_entropy
from sidlm.train.hardware import environment

VOCABULARY, WIDTH = 128256, 32


class Largest(TorchDispatchMode):
    """The largest tensor of two dimensions that any operator made, by elements."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = (0,)
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if type(x) is torch.Tensor and x.untyped_storage().nbytes() > self.bytes:
                self.shape, self.bytes = tuple(x.shape), x.untyped_storage().nbytes()
        return out


def measure(tokens: int, ways: int) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(VOCABULARY, (tokens,))
    if ways == 1:
        with Largest() as largest:
            linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), labels).backward()
    else:
        with fake_processes(ways):
            mesh = init_device_mesh("cpu", (ways,))
            parts = [
                distribute_tensor(x, mesh, [placement], src_data_rank=None).requires_grad_()
                for x, placement in ((hidden, Replicate()), (weight, Shard(0)))
            ]
            with Largest() as largest:
                vocab_parallel_cross_entropy(*parts, labels).backward()
    return {
        "tokens": tokens,
        "vocabulary_split_by": ways,
        "largest_tensor": largest.shape,
        "megabytes": largest.bytes / 1e6,
        "all_logits_megabytes": tokens * VOCABULARY * 4 / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    rows = [measure(tokens, ways) for tokens in (1024, 4096) for ways in (1, 2, 8)]
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump({"facts": environment(torch.device("cpu")), "rows": rows}, file, indent=2)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
