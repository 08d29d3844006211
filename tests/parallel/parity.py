"""Every plan against one process, in float64, in gloo processes: FOLDER [SET of cases]. test_parity.py starts it.

Plans over two processes run as two copies. Results are relative errors by case and tensor.
"""

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ranks import run
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from sidlm import ops
from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.config import ParallelConfig, PipelineConfig
from sidlm.parallel.loss import vocab_parallel_cross_entropy
from sidlm.parallel.mesh import batch_share, build_mesh, sum_over_rows, sum_over_tokens
from sidlm.parallel.pipeline import Pipeline
from sidlm.parallel.shard import ShardConfig, parallelize
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
    "sliding": {"layer_types": ["sliding_attention"] * 2, "num_hidden_layers": 2},
    "simplicial": {"layer_types": ["simplicial_attention"] * 2, "mlp_type": "squared_relu", "num_hidden_layers": 2},
    "experts": {"layer_types": ["full_attention"] * 2, "num_local_experts": 4, "num_hidden_layers": 2},
    "routed": {"layer_types": MIXED, "mlp_type": "squared_relu", "num_local_experts": 4, "num_shared_experts": 1},
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


def whole_of(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def train(
    model: SidForCausalLM, share: tuple[int, int], mesh: DeviceMesh | None, pipeline: Pipeline | None = None,
    micro_batch_size: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    """Loss, gradients and their norm of the first of two AdamW steps, and the weights after the second.

    Of pipeline stages only what this process holds.
    """
    optimizer = make_optimizer(model, OptimConfig(lr=0.01, clip_norm=0.5), mesh)
    found: dict[str, Tensor] = {}
    for step in range(2):
        rows = {name: x.chunk(share[1])[share[0]] for name, x in batch(step).items()}
        labelled = (rows["shift_labels"] >= 0).sum()
        labelled = labelled if mesh is None else sum_over_rows(labelled, mesh)
        if pipeline is None:
            loss = model(**rows, num_items_in_batch=labelled, use_cache=False).loss
            loss.backward()
        else:
            loss = pipeline.step(rows, num_items=labelled, micro_batch_size=micro_batch_size)
        if step == 0:
            found["loss"] = loss.detach() if mesh is None else sum_over_tokens(loss, mesh)
            found |= {f"grad {name}": whole_of(p.grad) for name, p in model.named_parameters()}
        norm = clip_gradients(model.parameters(), 0.5, pipeline)
        found.setdefault("norm", whole_of(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found | {f"weight {name}": whole_of(p) for name, p in model.named_parameters()}


@functools.cache
def alone(name: str) -> dict[str, Tensor]:
    """The same in one process."""
    return train(build(name), (0, 1), None)


def tensor_parallel(name: str, ways: int, **settings: bool) -> dict[str, Tensor]:
    """Tensor parallelism by itself: the batch is the same everywhere."""
    model = build(name)
    whole, half = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "half"))
    apply_tensor_parallel(model, half["half"] if ways == 2 else whole, **settings)
    # one that is still on its way takes the gradient from the embedding where blocks are compiled
    assert type(model.model.embed_tokens(batch(0)["input_ids"])) is Tensor
    return train(model, (0, 1), None)


def planned(name: str, sizes: dict[str, int], *, rows: int = 1, **settings: Any) -> dict[str, Tensor]:
    """`parallelize` over all processes. rows: of a micro-batch, with pipeline stages."""
    mesh = build_mesh(ParallelConfig(**sizes), "cpu")
    model = build(name)
    pipeline = parallelize(model, mesh, ShardConfig(**({"precision": "fp32"} | settings)))
    return train(model, batch_share(mesh), mesh, pipeline, rows)


def staged(name: str, sizes: dict[str, int], *, rows: int = 1, **pipeline: Any) -> dict[str, Tensor]:
    """The same with settings of the pipeline."""
    return planned(name, sizes, rows=rows, pipeline=PipelineConfig(**pipeline))


def compiled(name: str, sizes: dict[str, int], **settings: Any) -> dict[str, Tensor]:
    """The same with compiled blocks; the compiler's own code generator would take most of a test's time."""
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        return planned(name, sizes, compile=True, **settings)


def from_meta(name: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Plans over a model without memory, which gets its weights afterwards."""
    mesh = build_mesh(ParallelConfig(**sizes), "cpu")
    weights = build(name).state_dict()
    with torch.device("meta"):
        model = SidForCausalLM(config_of(name)).double().train()
    pipeline = parallelize(model, mesh, ShardConfig(precision="fp32", recompute="blocks"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for key, x in model.state_dict().items():
            x.copy_(distribute_tensor(weights[key], x.device_mesh, x.placements, src_data_rank=None))
    return train(model, batch_share(mesh), mesh, pipeline)


HALF = {
    "tp2 x fsdp2 trilinear": ("trilinear", {"tp": 2}, {}),
    "pp2 x fsdp2 trilinear": ("trilinear", {"pp": 2}, {}),
    "ep2 x pp2 experts": ("experts", {"pp": 2}, {"ep": 2}),
}


def half_precision(case: str) -> dict[str, tuple[float, float]]:
    """Relative errors of a step in bf16 over float32 weights, and of torch's own in one process, by tensor."""
    name, sizes, settings = HALF[case]
    mesh = build_mesh(ParallelConfig(**sizes), "cpu")
    model = build(name).float()
    pipeline = parallelize(model, mesh, ShardConfig(precision="bf16", **settings))
    own = train(build(name).bfloat16(), (0, 1), None)
    found = train(model, batch_share(mesh), mesh, pipeline)
    assert {x.dtype for x in found.values()} == {torch.float32}
    return {
        f"{case}: {key}": (relative(found[key], x), relative(own[key], x))
        for key, x in alone(name).items()
        if not key.startswith("weight") and key in found
    }


def relative(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


def loss_of_rows(vocabulary: int) -> dict[str, float]:
    """`vocab_parallel_cross_entropy` over four processes, tokens in chunks; some processes may hold no row."""
    draw = torch.Generator().manual_seed(vocabulary)
    whole = [torch.randn(n, 6, dtype=torch.float64, generator=draw).requires_grad_() for n in (17, vocabulary)]
    labels = torch.randint(-1, vocabulary, (17,), generator=draw)
    expected = ops.linear_cross_entropy(*whole, labels)
    mesh = init_device_mesh("cpu", (RANKS,))
    parts = [
        distribute_tensor(x.detach(), mesh, [placement]).requires_grad_()
        for x, placement in zip(whole, (Replicate(), Shard(0)), strict=True)
    ]
    found = vocab_parallel_cross_entropy(*parts, labels, chunk=5)
    gradients = torch.autograd.grad(3 * found, parts)
    names = ("hidden", "weight")
    return {"loss": relative(found.detach(), expected.detach())} | {
        name: relative(whole_of(grad), x)
        for name, grad, x in zip(names, gradients, torch.autograd.grad(3 * expected, whole), strict=True)
    }


CASES = {
    "tp2 llama": lambda: tensor_parallel("llama", 2),
    "tp4 trilinear": lambda: tensor_parallel("trilinear", 4),
    "tp2 determinant, whole stream, gathered head": lambda: tensor_parallel(
        "determinant", 2, sequence_parallel=False, loss_parallel=False
    ),
    "tp2 sparse": lambda: tensor_parallel("sparse", 2),
    "fsdp4 determinant, recomputed": lambda: planned("determinant", {}, recompute="blocks"),
    "hsdp 2x2 tied": lambda: planned("tied", {"dp_replicate": 2}),
    "tp2 x fsdp2 tied": lambda: planned("tied", {"tp": 2}),
    "tp2 x fsdp2 trilinear, from meta, recomputed": lambda: from_meta("trilinear", {"tp": 2}),
    "tp2 x replicate2 llama": lambda: planned("llama", {"tp": 2, "dp_replicate": 2}),
    "cp2 x fsdp2 trilinear": lambda: planned("trilinear", {"cp": 2}, reshard_after_forward=True),
    "cp2 x tp2 trilinear": lambda: planned("trilinear", {"cp": 2, "tp": 2}),
    "cp2 x tp2 llama, cheap recomputation": lambda: planned("llama", {"cp": 2, "tp": 2}, recompute="cheap"),
    "cp2 x tp2 determinant, whole stream": lambda: planned("determinant", {"cp": 2, "tp": 2}, sequence_parallel=False),
    "pp2 x fsdp2 tied, interleaved": lambda: staged("tied", {"pp": 2}, virtual_stages=2),
    "pp2 x tp2 trilinear": lambda: staged("trilinear", {"pp": 2, "tp": 2}),
    "pp4 determinant, gpipe": lambda: staged("determinant", {"pp": 4}, schedule="gpipe"),
    "ep2 x fsdp2 experts": lambda: planned("experts", {}, ep=2),
    "tp4 sparse, compiled": lambda: compiled("sparse", {"tp": 4}),
    "ep2 x pp2 experts, compiled": lambda: compiled("experts", {"pp": 2}, ep=2),
}
TWO = {
    "replicate2 llama": lambda: planned("llama", {"dp_replicate": 2}),
    "replicate2 trilinear": lambda: planned("trilinear", {"dp_replicate": 2}),
    "fsdp2 llama": lambda: planned("llama", {}),
    "fsdp2 determinant": lambda: planned("determinant", {}),
    "tp2 llama": lambda: planned("llama", {"tp": 2}),
    "tp2 trilinear": lambda: planned("trilinear", {"tp": 2}),
    "cp2 llama": lambda: planned("llama", {"cp": 2}),
    "cp2 sliding": lambda: planned("sliding", {"cp": 2}),
    "cp2 simplicial": lambda: planned("simplicial", {"cp": 2}),
    "pp2 llama, 1f1b": lambda: staged("llama", {"pp": 2}),
    "pp2 trilinear, 1f1b": lambda: staged("trilinear", {"pp": 2}),
    "pp2 llama, gpipe": lambda: staged("llama", {"pp": 2}, schedule="gpipe"),
    "pp2 trilinear, interleaved": lambda: staged("trilinear", {"pp": 2}, virtual_stages=2),
    "ep2 experts": lambda: planned("experts", {}, ep=2),
    "ep2 routed": lambda: planned("routed", {}, ep=2),
}
MORE = {
    "replicate4 llama": lambda: planned("llama", {"dp_replicate": 4}),
    "replicate4 trilinear": lambda: planned("trilinear", {"dp_replicate": 4}),
    "hsdp 2x2 llama": lambda: planned("llama", {"dp_replicate": 2}),
    "cp4 sliding": lambda: planned("sliding", {"cp": 4}),
    "cp4 simplicial": lambda: planned("simplicial", {"cp": 4}),
    "pp2 x fsdp2 trilinear, interleaved": lambda: staged("trilinear", {"pp": 2}, virtual_stages=2),
    "pp2 x fsdp2 determinant, breadth first": lambda: staged("determinant", {"pp": 2}, virtual_stages=2, contiguous=2),
    "ep2 x fsdp2 routed": lambda: planned("routed", {}, ep=2),
    "ep2 x pp2 routed": lambda: planned("routed", {"pp": 2}, ep=2),
    "pp2 x fsdp2 determinant, compiled": lambda: compiled("determinant", {"pp": 2}),
    "pp2 x tp2 trilinear, compiled and recomputed": lambda: compiled(
        "trilinear", {"pp": 2, "tp": 2}, recompute="blocks"
    ),
    "ep4 experts, compiled": lambda: compiled("experts", {}, ep=4),
    "ep4 experts": lambda: planned("experts", {}, ep=4),
    "ep2 x replicate2 experts": lambda: planned("experts", {"dp_replicate": 2}, ep=2),
    "ep2 x pp2 experts": lambda: planned("experts", {"pp": 2}, ep=2),
    "ep4 x cp2 experts, recomputed": lambda: planned("experts", {"cp": 2}, ep=4, recompute="blocks"),
    "tp4 tied": lambda: tensor_parallel("tied", 4),
    "tp4 sparse, whole stream": lambda: tensor_parallel("sparse", 4, sequence_parallel=False),
    "fsdp4 llama": lambda: planned("llama", {}),
    "fsdp4 tied, from meta, recomputed": lambda: from_meta("tied", {}),
    "fsdp4 trilinear": lambda: planned("trilinear", {}, reshard_after_forward=True),
    "hsdp 2x2 trilinear": lambda: planned("trilinear", {"dp_replicate": 2}),
    "tp2 x fsdp2 llama": lambda: planned("llama", {"tp": 2}),
    "tp2 x fsdp2 determinant, whole stream": lambda: planned("determinant", {"tp": 2}, sequence_parallel=False),
    "cp2 x fsdp2 experts": lambda: planned("experts", {"cp": 2}),
    "cp2 x replicate2 determinant": lambda: planned("determinant", {"cp": 2, "dp_replicate": 2}),
    "cp4 llama": lambda: planned("llama", {"cp": 4}),
    "cp2 x tp2 tied, recomputed": lambda: planned("tied", {"cp": 2, "tp": 2}, recompute="blocks"),
    "tp2 x fsdp2 llama, compiled": lambda: compiled("llama", {"tp": 2}),
    "cp2 x fsdp2 experts, cheap recomputation": lambda: planned("experts", {"cp": 2}, recompute="cheap"),
    "cp2 x tp2 trilinear, cheap recomputation, compiled": lambda: compiled(
        "trilinear", {"cp": 2, "tp": 2}, recompute="cheap"
    ),
    "cp2 x tp2 trilinear, compiled and recomputed": lambda: compiled(
        "trilinear", {"cp": 2, "tp": 2}, recompute="blocks"
    ),
    "pp2 x fsdp2 trilinear": lambda: staged("trilinear", {"pp": 2}, rows=2),
    "pp2 x cp2 trilinear": lambda: staged("trilinear", {"pp": 2, "cp": 2}),
    "pp2 x replicate2 llama, gpipe interleaved": lambda: staged(
        "llama", {"pp": 2, "dp_replicate": 2}, schedule="gpipe", virtual_stages=2
    ),
    "pp4 llama": lambda: staged("llama", {"pp": 4}),
    "pp4 tied": lambda: staged("tied", {"pp": 4}),
    "pp2 x tp2 tied, breadth first": lambda: staged("tied", {"pp": 2, "tp": 2}, virtual_stages=2, contiguous=4),
    "pp2 x fsdp2 tied, from meta, recomputed": lambda: from_meta("tied", {"pp": 2}),
    "pp2 x fsdp2 experts": lambda: staged("experts", {"pp": 2}),
}
EIGHT = {
    "ep4 x cp2 experts": lambda: planned("experts", {"cp": 2}, ep=4),
    "ep2 x cp2 x pp2 experts": lambda: planned("experts", {"cp": 2, "pp": 2}, ep=2),
    "pp2 x tp2 x fsdp2 llama": lambda: staged("llama", {"pp": 2, "tp": 2}, virtual_stages=2),
    "pp2 x tp2 x fsdp2 trilinear": lambda: staged("trilinear", {"pp": 2, "tp": 2}),
    "pp2 x cp2 x fsdp2 llama": lambda: staged("llama", {"pp": 2, "cp": 2}),
    "pp2 x cp2 x fsdp2 determinant": lambda: staged("determinant", {"pp": 2, "cp": 2}),
    "pp2 x tp2 x cp2 trilinear": lambda: staged("trilinear", {"pp": 2, "tp": 2, "cp": 2}, schedule="gpipe"),
    "tp2 x cp2 x fsdp2 llama": lambda: planned("llama", {"cp": 2, "tp": 2}),
    "tp2 x cp2 x fsdp2 trilinear": lambda: planned("trilinear", {"cp": 2, "tp": 2}, recompute="cheap"),
    "tp2 x cp2 x replicate2 determinant": lambda: planned("determinant", {"cp": 2, "tp": 2, "dp_replicate": 2}),
    "tp2 x fsdp2 x replicate2 tied": lambda: planned("tied", {"tp": 2, "dp_replicate": 2}),
    "cp2 x fsdp2 x replicate2 trilinear": lambda: planned("trilinear", {"cp": 2, "dp_replicate": 2}),
}
SETS = {"two": (TWO, 2), "four": (CASES, RANKS), "more": (MORE, RANKS), "eight": (EIGHT, 8)}
"""Name -> cases, and the number of processes"""


AT_ONCE = 20
"""Cases in one start of the processes: each keeps its groups and their threads, since DTensor's caches refer to them"""


def results_of(rank: int, folder: Path, cases: dict[str, Callable[[], dict[str, Tensor]]], others: bool) -> None:
    """Writes results.json: of each case and tensor the largest error of any process. others: of `HALF`, too."""
    errors: dict[str, dict[str, float]] = {}
    for case, compute in cases.items():
        found = compute()
        expected = alone(next(name for name in MODELS if name in case))
        names: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(names, list(found))
        assert set().union(*names) == expected.keys(), case  # of stages each process has some
        errors[case] = {name: relative(found[name], x) for name, x in expected.items() if name in found}
    half = {}
    if others:
        errors |= {f"loss of {rows} rows": loss_of_rows(rows) for rows in (131, 5)}
        half = {name: errors for case in HALF for name, errors in half_precision(case).items()}
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (errors, half))
    if rank == 0:
        worst = {
            case: {
                name: max(e[case][name] for e, _ in gathered if name in e[case])
                for e, _ in gathered
                for name in e[case]
            }
            for case in errors
        }
        results = {"errors": worst, "half": [x for _, x in gathered]}
        (folder / "results.json").write_text(json.dumps(results))


def main(folder: Path, chosen: str = "four") -> int:
    for model in MODELS:
        alone(model)  # before the fork, so that it is done once
    cases, ranks = SETS[chosen]
    results: dict[str, Any] = {"errors": {}, "half": []}
    for start in range(0, len(cases), AT_ONCE):
        part = folder / str(start)
        part.mkdir()
        some = dict(list(cases.items())[start : start + AT_ONCE])
        program = functools.partial(results_of, cases=some, others=cases is CASES)
        if run(program, ranks, part, seconds=float(os.environ.get("SECONDS", 280))):
            return 1
        of_part = json.loads((part / "results.json").read_text())
        results = {"errors": results["errors"] | of_part["errors"], "half": results["half"] + of_part["half"]}
        (folder / "results.json").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
