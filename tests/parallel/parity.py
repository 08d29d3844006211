"""Every plan against one process, in float64, in four gloo processes: FOLDER. test_parity.py starts it.

Two-way plans run as two copies in the halves of the four processes. Results are relative errors by case and tensor.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ranks import run
from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.mesh import ParallelConfig, batch_share, build_mesh, fsdp_mesh, sum_over_rows, sum_over_tokens
from sidlm.parallel.shard import ShardConfig, parallelize, shard
from sidlm.parallel.tensor import apply_tensor_parallel
from sidlm.train.config import OptimConfig
from sidlm.train.optim import clip_gradients, make_optimizer

RANKS = 4
ROWS, LENGTH, VOCABULARY = 4, 16, 131  # 131 divides by neither 2 nor 4
MIXED = ["full_attention", "simplicial_attention", "sliding_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2},
    "tied": {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2, "tie_word_embeddings": True},
    "trilinear": {"layer_types": MIXED, "mlp_type": "squared_relu"},
    "determinant": {
        "layer_types": MIXED, "simplicial_form": "determinant", "simplicial_position": "rotation",
        "simplicial_k2_bias": 0.0,
    },
    # the features that stay dense are chosen by each process among its own, so none here
    "sparse": {"layer_types": MIXED, "mlp_type": "squared_relu", "mlp_sparsity": "2:4", "mlp_dense_features": 0.0},
}  # fmt: skip


@functools.cache
def config_of(name: str) -> SidConfig:
    return SidConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=64, num_attention_heads=8, num_key_value_heads=4,
        head_dim=6, simplicial_window=[6, 3], sliding_window=5, initializer_range=0.2,
        **{"num_hidden_layers": 3, **MODELS[name]},
    )  # fmt: skip


def build(name: str) -> SidForCausalLM:
    torch.manual_seed(0)
    model = SidForCausalLM(config_of(name)).double().train()
    with torch.no_grad():
        for parameter in model.parameters():  # norms that start at one would hide a swap of two of them
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def batch(step: int) -> dict[str, Tensor]:
    """Packed rows; labels differ in number between rows, and the last row has few."""
    noise = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=noise)
    labels = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=noise)
    labels[torch.rand(ROWS, LENGTH, generator=noise) < 0.2] = -100
    labels[-1, 3:] = -100
    starts = torch.rand(ROWS, LENGTH, generator=noise) < 0.15
    starts[:, 0] = True
    here = torch.arange(LENGTH).expand(ROWS, -1)
    positions = here - torch.where(starts, here, 0).cummax(dim=1).values
    return {"input_ids": ids, "position_ids": positions, "doc_ids": starts.cumsum(dim=1), "shift_labels": labels}


def whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(model: SidForCausalLM, share: tuple[int, int], mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Loss, gradients and their norm of the first of two AdamW steps, and the weights after the second."""
    optimizer = make_optimizer(model, OptimConfig(lr=0.01, clip_norm=0.5))
    found: dict[str, Tensor] = {}
    for step in range(2):
        rows = {name: x.chunk(share[1])[share[0]] for name, x in batch(step).items()}
        labelled = (rows["shift_labels"] >= 0).sum()
        labelled = labelled if mesh is None else sum_over_rows(labelled, mesh)
        loss = model(**rows, num_items_in_batch=labelled, use_cache=False).loss
        loss.backward()
        if step == 0:
            found["loss"] = loss.detach() if mesh is None else sum_over_tokens(loss, mesh)
            found |= {f"grad {name}": whole(p.grad) for name, p in model.named_parameters()}
        norm = clip_gradients(model.parameters(), 0.5)
        found.setdefault("norm", whole(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found | {f"weight {name}": whole(p) for name, p in model.named_parameters()}


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """The same in one process."""
    return train(build(name), (0, 1), None)


def halves() -> DeviceMesh:
    """The mesh of one half of the processes."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "half"))["half"]


def tensor_parallel(name: str, ways: int, **settings: bool) -> dict[str, Tensor]:
    """Tensor parallelism by itself: the batch is the same everywhere."""
    model = build(name)
    mesh = halves() if ways == 2 else init_device_mesh("cpu", (4,))
    apply_tensor_parallel(model, mesh, **settings)
    return train(model, (0, 1), None)


def halves_sharded(name: str) -> dict[str, Tensor]:
    """FSDP over two processes."""
    model = build(name)
    names = ("copy", "dp_replicate", "dp_shard", "cp")
    mesh = init_device_mesh("cpu", (2, 1, 2, 1), mesh_dim_names=names)
    shard(model, fsdp_mesh(mesh), precision="fp32", reshard_after_forward=True)
    return train(model, batch_share(mesh), mesh)


def planned(name: str, sizes: dict[str, int], **settings: Any) -> dict[str, Tensor]:
    """`parallelize` over all processes."""
    mesh = build_mesh(ParallelConfig(**sizes), "cpu")
    model = build(name)
    parallelize(model, mesh, ShardConfig(**({"precision": "fp32"} | settings)))
    return train(model, batch_share(mesh), mesh)


CASES = {
    "tp2 llama": lambda: tensor_parallel("llama", 2),
    "tp4 llama, whole stream, gathered head": lambda: tensor_parallel(
        "llama", 4, sequence_parallel=False, loss_parallel=False
    ),
    "tp4 tied": lambda: tensor_parallel("tied", 4),
    "tp4 trilinear": lambda: tensor_parallel("trilinear", 4),
    "tp2 determinant, whole stream": lambda: tensor_parallel("determinant", 2, sequence_parallel=False),
    "tp2 sparse": lambda: tensor_parallel("sparse", 2),
    "tp4 sparse, whole stream": lambda: tensor_parallel("sparse", 4, sequence_parallel=False),
    "fsdp2 llama": lambda: halves_sharded("llama"),
    "fsdp4 trilinear": lambda: planned("trilinear", {}, reshard_after_forward=True),
    "fsdp4 determinant, recomputed": lambda: planned("determinant", {}, checkpoint_activations=True),
    "hsdp 2x2 tied": lambda: planned("tied", {"dp_replicate": 2}),
    "tp2 x fsdp2 tied": lambda: planned("tied", {"tp": 2}),
    "tp2 x fsdp2 trilinear, recomputed": lambda: planned("trilinear", {"tp": 2}, checkpoint_activations=True),
    "tp2 x replicate2 llama": lambda: planned("llama", {"tp": 2, "dp_replicate": 2}),
    "cp2 x fsdp2 trilinear": lambda: planned("trilinear", {"cp": 2}, reshard_after_forward=True),
    "cp2 x replicate2 determinant": lambda: planned("determinant", {"cp": 2, "dp_replicate": 2}),
    "cp4 llama": lambda: planned("llama", {"cp": 4}),
    "cp2 x tp2 trilinear": lambda: planned("trilinear", {"cp": 2, "tp": 2}),
    "cp2 x tp2 determinant, whole stream": lambda: planned("determinant", {"cp": 2, "tp": 2}, sequence_parallel=False),
    "cp2 x tp2 tied, recomputed": lambda: planned("tied", {"cp": 2, "tp": 2}, checkpoint_activations=True),
}


def main(rank: int, folder: Path) -> None:
    errors: dict[str, dict[str, float]] = {}
    for case, compute in CASES.items():
        t0=__import__("time").process_time(); found = compute(); print(rank, case, round(__import__("time").process_time()-t0,2)) if rank==0 else 0
        expected = alone(next(name for name in MODELS if name in case))
        assert found.keys() == expected.keys(), case
        errors[case] = {name: float((found[name] - x).norm() / x.norm()) for name, x in expected.items()}
    gathered: list[Any] = [None] * RANKS
    distributed.all_gather_object(gathered, errors)
    if rank == 0:
        worst = {case: {name: max(e[case][name] for e in gathered) for name in errors[case]} for case in errors}
        (folder / "errors.json").write_text(json.dumps(worst))


if __name__ == "__main__":
    for model in MODELS:
        alone(model)  # before the fork, so that it is done once
    sys.exit(run(main, RANKS, Path(sys.argv[1])))
