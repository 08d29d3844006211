"""Bytes that context parallelism moves in one layer, counted at its collectives: halos against gathering everything.

python benchmarks/context_traffic.py --json benchmarks/results/context_traffic.json

One row in bf16, 8 key/value heads of 16 dimensions (bytes go with that), windows 4,096 and (512, 32), forward and
backward, of the rank that receives most. The ranks are played one after the other in torch's fake process group:
what they would send is counted, not sent. `predicted` is sidlm.parallel.traffic, which `sid plan` uses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed

from sidlm.models import SidConfig
from sidlm.parallel import exchange
from sidlm.parallel.chunks import chunk_length
from sidlm.parallel.dry_run import fake_processes
from sidlm.parallel.traffic import kind_traffic
from sidlm.train.hardware import environment

HEADS, DIM = 8, 16
WINDOWS = {"full_attention": None, "sliding_attention": [4096], "simplicial_attention": [512, 32]}
LENGTHS, RANKS = (8192, 32768, 131072), (2, 4, 8, 16)


def counted(work: Any, rank: int, ranks: int) -> int:
    """Bytes that a rank receives from others in what `work` does."""
    total = 0

    def gather(out: Tensor, x: Tensor, **kwargs: Any) -> None:
        nonlocal total
        total += out.nbytes - x.nbytes
        out.zero_()

    def swap(out: Tensor, x: Tensor, sizes: list[int] | None = None, *args: Any, **kwargs: Any) -> None:
        nonlocal total
        total += out.nbytes // ranks * (ranks - 1) if sizes is None else (sum(sizes) - sizes[rank]) * out.itemsize
        out.zero_()

    with mock.patch.object(exchange, "_all_gather", gather), mock.patch.object(distributed, "all_to_all_single", swap):
        work()
    return total


def layer(kind: str, length: int, rank: int, ranks: int, *, halo: bool) -> int:
    """Forward and backward of one layer's exchange."""
    windows = WINDOWS[kind]
    group = distributed.group.WORLD
    assert group is not None
    where = (rank, ranks, group.group_name)
    shape = (2, chunk_length(length, ranks), HEADS, 2 * DIM)
    pairs = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for _ in windows or [None]]

    def work() -> None:
        if halo:
            assert windows is not None
            outs = exchange.fetch_halo(pairs, [window - 1 for window in windows], *where)
        else:
            outs = [exchange.gather_before(pair, *where) for pair in pairs]
        torch.autograd.backward(outs, [torch.zeros_like(out) for out in outs])

    return counted(work, rank, ranks)


def row_of(kind: str, length: int, ranks: int) -> dict[str, Any]:
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": DIM}
    config = SidConfig(sliding_window=4096, simplicial_window=[512, 32], **heads)
    busiest = predicted = gathered = 0
    for rank in range(ranks):
        with fake_processes(ranks, rank):
            windowed = WINDOWS[kind] is not None
            if not gathered:  # the same on all
                gathered = layer(kind, length, rank, ranks, halo=False)
            busiest = max(busiest, layer(kind, length, rank, ranks, halo=True) if windowed else gathered)
        found = kind_traffic(config, kind, batch=1, length=length, rank=rank, ranks=ranks)
        predicted = max(predicted, found.forward + found.backward)
    return {
        "kind": kind, "tokens": length, "ranks": ranks, "moved": busiest, "predicted": predicted,
        "all_gather": gathered, "ratio": gathered / busiest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row_of(kind, length, ranks) for kind in WINDOWS for length in LENGTHS for ranks in RANKS]
    for row in rows:
        print(row)
        assert row["moved"] == row["predicted"], row
    if arguments.json:
        result = {"environment": environment(torch.device("cpu")), "heads": HEADS, "head_dim": DIM, "rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
