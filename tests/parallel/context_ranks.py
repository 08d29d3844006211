"""Four gloo processes of context parallelism: FOLDER. test_context.py starts them and compares with one process."""

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.context import ContextParallel, context_parallel

RANKS = 4
SID = {
    "layer_types": ["simplicial_attention", "full_attention", "sliding_attention"],
    "mlp_type": "squared_relu",
    "simplicial_window": [7, 4],
    "sliding_window": 6,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"layer_types": ["full_attention"] * 3, "num_key_value_heads": 2},
    "sid": SID,
    "determinant": SID | {
        "simplicial_form": "determinant", "simplicial_position": "rotation", "simplicial_k2_bias": 0.0, "head_dim": 12,
        "simplicial_window": [3, 9],
    },
    "windows": SID | {"layer_types": ["sliding_attention", "simplicial_attention"], "num_hidden_layers": 2},
}  # fmt: skip
# model, layout, length: 64 divides, 61 does not, chunks of 24 are shorter than the halos
CASES = [
    ("llama", "packed", 64),
    ("llama", "one", 61),
    ("sid", "packed", 64),
    ("sid", "padded", 61),
    ("sid", "packed", 24),
    ("sid", "one", 5),
    ("determinant", "packed", 64),
    ("determinant", "inside", 61),
    ("windows", "packed", 24),
    ("windows", "padded", 64),
]


def model_of(name: str) -> SidForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "initializer_range": 0.2,
    }  # fmt: skip
    return SidForCausalLM(SidConfig(**(config | MODELS[name]))).double().train()


def batch_of(layout: str, length: int) -> dict[str, Tensor]:
    """Two rows; "packed" documents cross the chunks' borders, those of "inside" do not."""
    draw = torch.Generator().manual_seed(length)
    ids, labels = torch.randint(97, (2, 2, length), generator=draw)
    doc_ids = torch.zeros(2, length, dtype=torch.int64)
    if layout == "packed":
        starts = torch.rand(2, length, generator=draw) < 5 / length
        doc_ids = starts.cumsum(dim=1)
    elif layout == "inside":  # the chunks of two ranks are 16 long, those of four 8
        doc_ids = (torch.arange(length) // 4).expand(2, -1)
    elif layout == "padded":
        doc_ids = (torch.arange(length) // 25).repeat(2, 1)
        doc_ids[0, -7:] = -1
        doc_ids[1, length // 3 :] = -1
    column = torch.arange(length).expand(2, -1)
    fresh = torch.nn.functional.pad(doc_ids[:, 1:] != doc_ids[:, :-1], (1, 0), value=True)
    positions = column - torch.where(fresh, column, 0).cummax(dim=1).values
    labels = labels.masked_fill((torch.rand(2, length, generator=draw) < 0.1) | (doc_ids < 0), -100)
    return {"input_ids": ids, "position_ids": positions, "doc_ids": doc_ids, "shift_labels": labels}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(model: SidForCausalLM, cp: ContextParallel, batch: dict[str, Tensor], world: Any = None) -> dict[str, Any]:
    """Loss, gradients and logits of a batch that these processes hold a row or all of, summed over the world."""
    labelled = int((batch["shift_labels"] >= 0).sum())
    if cp.ranks < RANKS:  # the other processes have the other row
        row = distributed.get_rank() // cp.ranks
        batch = {name: x[row : row + 1] for name, x in batch.items()}
    model.zero_grad()
    local = cp.shard(batch | {"num_items_in_batch": labelled})
    loss = model(**local).loss
    loss.backward()
    loss = loss.detach()
    found = gradients(model)
    for x in (loss, *found.values()):
        distributed.all_reduce(x)
    with torch.no_grad():
        inputs = {name: x for name, x in local.items() if name not in ("shift_labels", "num_items_in_batch")}
        logits = cp.join(model(**inputs).logits, batch["input_ids"].shape[1])
    return {"loss": loss, "gradients": found, "logits": logits}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"]
    groups = {2: halves, 4: init_device_mesh("cpu", (4,), mesh_dim_names=("cp",))}
    results: dict[Any, Any] = {}
    for name, layout, length in CASES:
        model = model_of(name)
        for ranks, group in groups.items():
            cp = context_parallel(model.config, group)
            assert (cp.rank, cp.ranks) == (rank % ranks, ranks)
            results[name, layout, length, ranks] = run(model, cp, batch_of(layout, length))
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    # forked after the imports, which take longer than the work
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=main, args=(rank, Path(sys.argv[1]))) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
