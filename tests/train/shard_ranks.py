"""Checkpoints and exports of models that are spread over four gloo processes: FOLDER. test_shards.py starts it.

FOLDER/CASE gets checkpoints, an export of the second, and whole-STEP.safetensors with every tensor as it was;
FOLDER/damage.json what is said of damaged copies, and whether the one before was loaded as it had been.
"""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from ranks import run

from sidlm.errors import SidError
from sidlm.models import SidConfig, SidForCausalLM
from sidlm.parallel.config import ParallelConfig
from sidlm.parallel.mesh import build_mesh
from sidlm.parallel.shard import ShardConfig, parallelize
from sidlm.train import checkpoint
from sidlm.train.config import CheckpointConfig, OptimConfig
from sidlm.train.export import describe_model, export_model
from sidlm.train.optim import make_optimizer, optimizer_tensors
from sidlm.train.processes import Processes
from sidlm.train.saving import Saver

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "fsdp4": ({}, {}, {}),
    "hsdp-2x2": ({}, {"dp_replicate": 2}, {}),
    "fsdp2-tp2": ({}, {"tp": 2}, {}),
    "pp2-fsdp2-tied": ({"tie_word_embeddings": True}, {"pp": 2}, {}),
    "ep2-fsdp2": (EXPERTS, {}, {"ep": 2}),
    "cp2-tp2": ({}, {"cp": 2, "tp": 2}, {}),
}
HARMS = ("torn", "one bit", "missing")
TOKENIZER: Any = SimpleNamespace(save=lambda folder: (folder / "tokenizer.json").write_text("{}"))


def config_of(case: str) -> SidConfig:
    return SidConfig(
        vocab_size=67, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=2, layer_types=["full_attention", "simplicial_attention"], simplicial_window=[6, 3],
        **CASES[case][0],
    )  # fmt: skip


def state_of(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """As in the loop."""
    tensors = {f"model.{name}": t for name, t in model.state_dict().items()}
    return tensors | {f"optimizer.{name}": t for name, t in optimizer_tensors(model, optimizer).items()}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of all processes, in one place, which is what nothing under test does."""
    own = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in sorted(tensors.items())
    }
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, own)
    return {name: t for found in everyone for name, t in found.items()}


def harm(newest: Path, kind: str) -> str:
    """Damage what the last process has written; the file's name."""
    path = sorted((newest / "tensors").glob("*.distcp"))[-1]
    if kind == "torn":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    return path.name


def damaged(place: Path, group: Processes, tensors: dict[str, Tensor], first: dict[str, Tensor]) -> dict[str, Any]:
    """What is said of each kind of damage, by the name of the file, and whether the first checkpoint came back."""
    found = {}
    for kind in HARMS:
        copy, said, name = place.with_name(kind), [], ""
        if group.first:
            shutil.copytree(place, copy)
            name = harm(copy / "step-00000002", kind)
        good = group.told(checkpoint.newest_good(copy, warn=said.append) if group.first else None)
        for t in tensors.values():
            (t.to_local() if isinstance(t, DTensor) else t).detach().zero_()
        assert good is not None
        checkpoint.load(good, tensors)
        same = all(torch.equal(t, first[key]) for key, t in whole(tensors).items())
        found[kind] = {"file": name, "said": said, "step": good.step, "same": same}
    return found


def failed_export(place: Path, group: Processes, tensors: dict[str, Tensor], problem: str) -> str:
    """What every process is told of an export that fails on one that is not the first."""

    def write(source: Path, out: Path, share: tuple[int, int]) -> None:
        (out / f"{share[0]}.safetensors").touch()
        if share == (2, 4):
            raise OSError(problem)

    with Saver(place.with_name("failing"), CheckpointConfig(), group, print) as saver:
        saver.save(tensors, {"step": 1})
        saver.export(1, place.parent / "model", 1, write)
        try:
            saver.finish(last=True)
        except SidError as error:
            return str(error)
    return ""


def main(rank: int, folder: Path) -> None:
    damage: dict[str, Any] = {}
    for case, (_, sizes, settings) in CASES.items():
        torch.manual_seed(0)
        config, mesh = config_of(case), build_mesh(ParallelConfig(**sizes), "cpu")
        model, group = SidForCausalLM(config).train(), Processes(mesh)
        pipeline = parallelize(model, mesh, ShardConfig(precision="fp32", **settings))
        optimizer = make_optimizer(model, OptimConfig(lr=0.01), mesh)
        tensors, kept = state_of(model, optimizer), {}
        place = folder / case / "checkpoints"
        with Saver(place, CheckpointConfig(), group, print) as saver:
            for step in (1, 2):
                ids = torch.randint(67, (2, 17), generator=torch.Generator().manual_seed(step))
                rows = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:]}
                if pipeline is None:
                    model(**rows, num_items_in_batch=64, use_cache=False).loss.backward()
                else:
                    pipeline.step(rows, num_items=64, micro_batch_size=1)
                optimizer.step()
                optimizer.zero_grad()
                kept[step] = whole(tensors)
                saver.save(tensors, {"step": step, "tokens": 64 * step, "model": describe_model(config)})
            write = partial(export_model, generation=model.generation_config, tokenizer=TOKENIZER)
            saver.export(2, folder / case / "model", 10_000, write)
            saver.finish(last=True)
        if rank == 0:
            for step, found in kept.items():
                save_file(found, folder / case / f"whole-{step}.safetensors")
        if case == "fsdp4":
            damage["export"] = group.everyone(failed_export(place, group, tensors, "No space left on device"))
        if case in ("fsdp4", "hsdp-2x2"):
            damage[case] = damaged(place, group, tensors, kept[1])
    if rank == 0:
        (folder / "damage.json").write_text(json.dumps(damage))


if __name__ == "__main__":
    sys.exit(run(main, 4, Path(sys.argv[1])))
