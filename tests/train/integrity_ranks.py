"""Bits flipped in one of four gloo processes, on several meshes: FOLDER. test_integrity.py starts it.

FOLDER/RANK.json gets {case: the message of the Corruption that was raised, or None}.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from ranks import run

from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.config import ParallelConfig
from sidlm.parallel.mesh import batch_share, build_mesh
from sidlm.parallel.pipeline import Pipeline
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.train import integrity
from sidlm.train.config import OptimConfig
from sidlm.train.integrity import Corruption, Integrity, local
from sidlm.train.optim import clip_gradients, make_optimizer, optimizer_tensors
from sidlm.train.processes import Processes

FAULTY = 2
Fault = Callable[[str, int, Any], None]


def flip(t: Tensor, bit: int) -> None:
    """Flip a bit of the first number that is not 0."""
    flat = local(t).view(-1)
    flat.view(torch.int32)[flat.nonzero()[0, 0]] ^= 1 << bit


def trained(sizes: dict[str, int], fault: Fault, rank: int, **settings: int) -> tuple[str | None, list[str]]:
    """Three steps; a fault is called with ("before" the reduction, "after" it or "state", step, what it may change)."""
    torch.manual_seed(0)
    config = SidConfig(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, layer_types=["full_attention"] * 2, num_local_experts=0 if "tp" in sizes else 2,
        num_experts_per_tok=1, moe_intermediate_size=16,
    )  # fmt: skip
    mesh = build_mesh(ParallelConfig(**sizes), "cpu")
    model, group = SidForCausalLM(config).train(), Processes(mesh)
    pipeline = parallelize(model, mesh, ShardConfig(precision="fp32"))
    optimizer, said = make_optimizer(model, OptimConfig(lr=0.01)), []
    tensors = dict(model.state_dict()) | optimizer_tensors(model, optimizer)
    stages = [] if pipeline is None else pipeline.stages
    checks = Integrity(model, stages, group, say=said.append, **{"every": 1, "recompute_every": 0, **settings})
    see, now = checks.see, 0
    checks.see = lambda name, flat: (fault("before", now, flat) if rank == FAULTY else None, see(name, flat))[1]
    try:
        for now in (1, 2, 3):
            rows = torch.randint(67, (4, 8), generator=torch.Generator().manual_seed(now + batch_share(mesh)[0]))
            checks.begin(now)

            def compute(rows=rows, now=now):
                backward(model, pipeline, rows)
                if rank == FAULTY:
                    fault("after", now, next(p.grad for p in model.parameters() if p.grad is not None and p.ndim == 2))

            compute()
            checks.gradients(now, compute)
            norm = clip_gradients(model.parameters(), 1.0, pipeline)
            if not bool(norm.isfinite()):
                checks.not_finite(now, compute)
            optimizer.step()
            model.zero_grad()
            if rank == FAULTY:
                fault("state", now, next(model.parameters()).detach())
            checks.state(tensors, now, saving=now == 3)
    except Corruption as error:
        return str(error), said
    return None, said


def backward(model: Any, pipeline: Pipeline | None, rows: Tensor) -> None:
    positions, documents = torch.arange(8).expand(4, -1), torch.zeros_like(rows)
    part = {"input_ids": rows, "position_ids": positions, "doc_ids": documents, "shift_labels": rows}
    if pipeline is not None:
        pipeline.step(part, num_items=128, micro_batch_size=2)
    else:
        model(**part, num_items_in_batch=128, use_cache=False).loss.backward()


def once(where: str, bit: int, step: int = 2) -> Fault:
    """One flip, on its first chance."""
    left = [bit]

    def fault(place: str, now: int, t: Tensor) -> None:
        if place == where and now == step and left:
            flip(t, left.pop())

    return fault


def huge(place: str, now: int, t: Tensor) -> None:
    """Once, a number far above the others."""
    if place == "before" and now == 2 and not huge.done:
        t[0], huge.done = 1000.0, True


def noise(place: str, now: int, t: Tensor) -> None:
    """Kernels that add up in another order each time."""
    if place == "before":
        t += 1e-6 * torch.randn(len(t), generator=noise.generator)


huge.done = False
noise.generator = torch.Generator().manual_seed(0)


def cases(rank: int, folder: Path) -> None:
    pairs, four, shards = {"dp_replicate": 2}, {"dp_replicate": 4}, {"dp_replicate": 1}
    never, found = once("never", 0), {}
    for name, sizes, fault, settings in (
        ("clean", pairs, never, {"recompute_every": 1}),
        ("clean-tp", {"dp_replicate": 2, "tp": 2}, never, {"recompute_every": 1}),
        ("clean-pp", {"dp_replicate": 2, "pp": 2}, never, {"recompute_every": 1}),
        ("gradient", pairs, once("after", 3), {}),
        ("gradient-pp", {"dp_replicate": 2, "pp": 2}, once("after", 3), {}),
        ("gradient-between", pairs, once("after", 3, step=1), {"every": 2}),
        ("parameter", pairs, once("state", 0), {}),
        ("majority", four, once("state", 0), {"every": 100}),
        ("own", shards, once("before", 2), {"recompute_every": 1}),
        ("far", shards, huge, {}),
        ("infinite", shards, once("before", 30), {"every": 100}),
        ("unseen", shards, once("before", 2), {}),
        ("noise", shards, noise, {"recompute_every": 1}),
    ):
        found[name] = trained(sizes, fault, rank, **settings)
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    integrity.socket.gethostname = lambda: "here"
    sys.exit(run(cases, 4, Path(sys.argv[1])))
