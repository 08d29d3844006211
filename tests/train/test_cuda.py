"""`sid train` on the GPUs of a machine: NCCL, sharded and asynchronous checkpoints from CUDA, against one process
without a process group. One GPU makes a mesh of ones; two or more also run the plans that split a model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.train import main
from sidlm.train.metrics import read_json_lines

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).with_name("process_runs.py")
COUNT = next((n for n in (4, 2) if torch.cuda.device_count() >= n), 1)
MODEL = [
    "hidden_size=64", "num_attention_heads=4", "num_key_value_heads=4", "head_dim=16", "num_hidden_layers=4",
    "intermediate_size=96", "layer_types=[full_attention,sliding_attention,sliding_attention,full_attention]",
    "sliding_window=8",
]  # fmt: skip
CHANGES = {
    "train.steps": 6, "schedule.warmup_steps": 0, "validation.every": 3, "validation.documents": 4, "optim.lr": 1e-3,
    "train.device": "cuda", "train.compile": "off", "data.vocab_size": 521, "model.set": MODEL,
}  # fmt: skip
HALF = {"train.precision": "bf16"}
EXPERTS = {"model.set": [*MODEL, "num_local_experts=4", "num_experts_per_tok=2", "moe_intermediate_size=32"]}
MESHES = {"fsdp": {}, "resumed": {}, "half": HALF}
if COUNT > 1:
    MESHES |= {
        "tp": {"parallel.tp": 2}, "cp": {"parallel.cp": 2}, "pp": {"parallel.pp": 2, "train.micro_batch_size": 2},
        "replicas": {"parallel.dp_replicate": COUNT}, "experts": {"parallel.ep": 2} | EXPERTS,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, argv):
    """Folder of all runs."""
    place = tmp_path_factory.mktemp("runs")

    def line(name, **changes):
        return argv(place / name, **CHANGES | changes)

    for name, changes in {"one": {}, "one-half": HALF, "one-experts": EXPERTS if COUNT > 1 else None}.items():
        if changes is not None:
            assert main(line(name, **changes)) == 0
    shutil.copytree(place / "one", place / "resumed")
    for path in (place / "resumed/checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    commands = [(name, ["train", *line(name, **changes)]) for name, changes in MESHES.items()]
    program = [sys.executable, PROGRAM, place, str(COUNT)]
    done = subprocess.run(program, input=json.dumps(commands), text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return place, json.loads((place / "statuses.json").read_text())


@pytest.mark.parametrize("name", MESHES)
def test_the_run_over_nccl_is_that_of_one_process(runs, name):
    place, statuses = runs
    assert statuses[name] == [0] * COUNT, (place / f"{name}.0.err").read_text()[-4000:]
    one = {"half": "one-half", "experts": "one-experts"}.get(name, "one")
    bound = 2e-2 if name == "half" else 1e-4
    expected, found = (read_json_lines(place / run / "metrics.jsonl") for run in (one, name))
    assert len(expected) == len(found) == 6
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=bound)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=5 * bound)
        if "valid" in a:
            assert b["valid"]["all"] == pytest.approx(a["valid"]["all"], rel=bound)
    expected, found = (load_file(place / run / "model/model.safetensors") for run in (one, name))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # AdamW's first steps turn rounding of small gradients into whole steps, of at most the learning rate each
        assert (found[key] - value).norm() <= 10 * bound * value.norm(), key


@pytest.mark.parametrize("name", ["one", "fsdp"])
def test_checkpoints_staged_from_the_gpu_are_whole(runs, name, argv):
    """Each was written while training went on: the run from the one in the middle ends as the whole run did."""
    place, _ = runs
    found = sorted(path.name for path in (place / name / "checkpoints").iterdir())
    assert found == ["step-00000004", "step-00000006"]  # every 2, the newest 2
    again = place / f"{name}-again"
    shutil.copytree(place / name, again)
    shutil.rmtree(again / "checkpoints/step-00000006")
    assert main(argv(again, **CHANGES)) == 0
    expected, found = (read_json_lines(place / run / "metrics.jsonl")[-1] for run in (name, again.name))
    assert found["step"] == 6 and found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
