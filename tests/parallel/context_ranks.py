"""Four gloo processes of context parallelism: FOLDER. test_context.py starts them and compares with one process."""

import gc
import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel import exchange
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
    "experts": {"layer_types": ["full_attention"] * 3, "num_local_experts": 4, "num_experts_per_tok": 2},
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
    ("experts", "packed", 64),
]
COUNTED = [("llama", 64), ("windows", 64), ("windows", 24)]
HOW = ("checkpointed", "reentrant", "compiled", "sharded")


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
    """Of this process, whole where a parameter is sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def step(
    model: SidForCausalLM, cp: ContextParallel, batch: dict[str, Tensor], *, summed: bool = True
) -> dict[str, Any]:
    """Loss and gradients of a batch that every process of the group has whole, summed over all processes."""
    model.zero_grad()
    loss = model(**cp.shard(batch)).loss
    loss.backward()
    loss = loss.detach()
    found = gradients(model)
    for x in (loss, *(found.values() if summed else ())):
        distributed.all_reduce(x)
    return {"loss": loss, "gradients": found}


def logits(model: SidForCausalLM, cp: ContextParallel, batch: dict[str, Tensor]) -> Tensor:
    """(B, T, vocab_size), the same on every rank."""
    inputs = {name: x for name, x in batch.items() if name != "shift_labels"}
    with torch.no_grad():
        return cp.join(model(**cp.shard(inputs)).logits, batch["input_ids"].shape[1])


def parity(halves: Any, whole: Any) -> dict[Any, Any]:
    """Every case over four processes, and over two with each pair holding one row: data parallel beside it."""
    results = {}
    for case in CASES:
        name, layout, length = case
        model, batch = model_of(name), batch_of(layout, length)
        labelled = int((batch["shift_labels"] >= 0).sum())
        for ranks, group in ((2, halves), (4, whole)):
            cp = context_parallel(model.config, group)
            assert (cp.rank, cp.ranks) == (distributed.get_rank() % ranks, ranks)
            rows = [distributed.get_rank() // 2] if ranks == 2 else [0, 1]
            part = {key: x[rows] for key, x in batch.items()}
            results[*case, ranks] = step(model, cp, part | {"num_items_in_batch": labelled})
            results[*case, ranks] |= {"logits": logits(model, cp, part), "rows": rows}
    return results


def how(name: str, group: Any) -> dict[str, Any]:
    """One step of the packed case whose blocks are recomputed, compiled, or sharded over the ranks of the group."""
    model, batch = model_of("sid"), batch_of("packed", 64)
    cp = context_parallel(model.config, group)
    if name == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    elif name == "reentrant":
        model.gradient_checkpointing_enable({"use_reentrant": True})
    elif name == "compiled" and cp.rank % 2:  # the others are not, and both understand each other
        for block in model.model.layers[:2]:
            block.compile(backend="aot_eager", fullgraph=True)
    elif name == "sharded":
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=group)
            module.set_gradient_divide_factor(1.0)  # the ranks' losses add up
    return step(model, cp, batch, summed=name != "sharded")


def interleaved(group: Any) -> dict[str, Tensor]:
    """Gradients where a second micro-batch of another length runs forward before the first runs backward."""
    model = model_of("sid")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cp = context_parallel(model.config, group)
    losses = [model(**cp.shard(batch_of(*layout))).loss for layout in (("packed", 64), ("padded", 24))]
    for loss in losses:
        loss.backward()
    found = gradients(model)
    for x in found.values():
        distributed.all_reduce(x)
    return found


def counted(group: Any) -> dict[tuple[str, int, int], Any]:
    """(model, length, ranks) -> bytes this rank got from others in the forward and the backward pass."""
    received = 0
    gather, swap = exchange._all_gather, distributed.all_to_all_single

    def counting_gather(out: Tensor, x: Tensor, **kwargs: Any):
        nonlocal received
        received += (out.numel() - x.numel()) * x.itemsize
        return gather(out, x, **kwargs)

    def counting_swap(out: Tensor, x: Tensor, sizes: Any = None, sent: Any = None, **kwargs: Any):
        nonlocal received
        own = out.numel() // group.size() if sizes is None else sizes[group.get_local_rank()]
        received += (out.numel() - own) * x.itemsize
        return swap(out, x, sizes, sent, **kwargs)

    found = {}
    with mock.patch.object(exchange, "_all_gather", counting_gather):
        with mock.patch.object(distributed, "all_to_all_single", counting_swap):
            for name, length in COUNTED:
                model = model_of(name).float()
                cp = context_parallel(model.config, group)
                received = 0
                loss = model(**cp.shard(batch_of("packed", length))).loss
                forward, received = received, 0
                loss.backward()
                found[name, length, cp.ranks] = (forward, received)
    return found


def half_precision(group: Any) -> dict[str, Tensor]:
    """The gradients of what each rank gathered and fetched in bfloat16, and what they must add up to."""
    rank, ranks = group.get_local_rank(), group.size()
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(2, 3, 5, generator=draw).bfloat16().requires_grad_()
    where = (rank, ranks, group.get_group().group_name)
    before = exchange.gather_before(x, *where)
    (halo,) = exchange.fetch_halo([x], [7], *where)
    weights = [torch.randn(y.shape, generator=draw).bfloat16() for y in (before, halo)]
    results = {"x": x.detach(), "before": before.detach(), "halo": halo.detach()}
    for name, y, weight in zip(("gathered", "fetched"), (before, halo), weights, strict=True):
        (results[f"{name}_gradient"],) = torch.autograd.grad(y, x, weight)
        results[f"{name}_weight"] = weight
    return results


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))["cp"]
    whole = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    results = {
        "parity": parity(halves, whole),
        "how": {name: how(name, whole) for name in HOW},
        "interleaved": interleaved(whole),
        "counted": counted(halves) | counted(whole),
        "half": half_precision(whole),
    }
    torch.save(results, folder / f"rank{rank}.pt")
    gc.collect()  # what FSDP made holds on to the group, whose threads must end before the process does
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
