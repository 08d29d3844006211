"""Muon on several meshes against torch's on one process, in float64: FOLDER [more]. test_recipe_processes.py starts it.

Models, batches and steps are those of tests/parallel/parity.py. results.json: relative errors by mesh and tensor.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

import parity
from ranks import run
from torch import distributed

from sidlm.train.config import OptimConfig

CASES = {
    "fsdp4 trilinear": lambda: parity.planned("trilinear", {}),
    "hsdp 2x2 tied": lambda: parity.planned("tied", {"dp_replicate": 2}),
    "tp2 x fsdp2 trilinear": lambda: parity.planned("trilinear", {"tp": 2}),
    "pp4 determinant": lambda: parity.staged("determinant", {"pp": 4}),  # its first stage has no matrix
}
MORE = {
    "pp2 x fsdp2 tied, interleaved": lambda: parity.staged("tied", {"pp": 2}, virtual_stages=2),
    "tp2 x replicate2 llama": lambda: parity.planned("llama", {"tp": 2, "dp_replicate": 2}),
    "cp2 x tp2 determinant": lambda: parity.planned("determinant", {"cp": 2, "tp": 2}),
    "pp2 x tp2 trilinear": lambda: parity.staged("trilinear", {"pp": 2, "tp": 2}),
    "ep2 x fsdp2 experts": lambda: parity.planned("experts", {}, ep=2),
}
NAMES = ("llama", "tied", "trilinear", "determinant", "experts")


def main(rank: int, folder: Path) -> None:
    errors: dict[str, dict[str, float]] = {}
    for case, compute in (MORE if sys.argv[2:] else CASES).items():
        found = compute()
        name = next(name for name in NAMES if name in case)
        expected = parity.alone(name)
        errors[case] = {key: parity.relative(found[key], x) for key, x in expected.items() if key in found}
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, errors)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(gathered))


if __name__ == "__main__":
    muon = functools.partial(OptimConfig, name="muon")
    with mock.patch.object(parity, "OptimConfig", muon):
        for model in NAMES:
            parity.alone(model)  # before the fork, so that it is done once
        sys.exit(run(main, parity.RANKS, Path(sys.argv[1]), seconds=280.0))
