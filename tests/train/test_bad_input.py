"""`sid train` in several processes with what cannot work: one line, of the first process, an exit code, no hang."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sidlm.cli.train import main

SIZES = {"data.vocab_size": 521, "train.steps": 4, "schedule.warmup_steps": 0, "samples.prompts": "", "model.set": [
    "hidden_size=32", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=8", "num_hidden_layers=2",
    "intermediate_size=48", "simplicial_window=[8,4]", "layer_types=[full_attention,simplicial_attention]",
]}  # fmt: skip
WIDE = [*SIZES["model.set"][:-2], "simplicial_window=[64,4]", SIZES["model.set"][-1]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, argv):
    """A run with checkpoints of steps 2 and 4, to be copied."""
    place = tmp_path_factory.mktemp("trained")
    assert main(argv(place / "run", **SIZES)) == 0
    assert sorted(path.name for path in (place / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    return place / "run"


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sidlm.cli.main"]
SID_LAUNCH = ["sidlm.cli.main", "launch", "--nproc-per-node", "2"]


def launch(argv, launcher=TORCHRUN) -> tuple[int, list[str], str, str]:
    """Exit code, Sid's lines on stderr, all of stderr, stdout."""
    command = [sys.executable, "-m", *launcher, "train", *argv]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, [x for x in done.stderr.splitlines() if x.startswith("sid: ")], done.stderr, done.stdout


def tensor_file(checkpoint: Path) -> Path:
    return next(path for path in (checkpoint / "tensors").iterdir() if path.name.startswith("__"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_past(run: Path) -> dict:
    """The folder says the same run, the checkpoint in it is another model's."""
    config = run / "config.yaml"
    assert "intermediate_size: 48" in config.read_text()
    config.write_text(config.read_text().replace("intermediate_size: 48", "intermediate_size: 64"))
    return {"model.set": [x.replace("=48", "=64") for x in SIZES["model.set"]], "train.steps": 6}


def damage_all(run: Path) -> dict:
    flip(tensor_file(run / "checkpoints/step-00000004"))
    tensor_file(run / "checkpoints/step-00000002").unlink()
    return {"train.steps": 6}


def start_from(run: Path, change) -> dict:
    """A new run that starts from this one's exported model."""
    change(run / "model")
    shutil.rmtree(run / "checkpoints")
    return {"model.init_from": run / "model", "model.set": ["rms_norm_eps=0.00001"], "train.out": run.parent / "new"}


def another_kind(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))


def another_size(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def a_missing_shard(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def half_a_shard(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


MISTAKES = {
    "heads": ({"parallel.tp": 2, "model.set": [x.replace("_heads=2", "_heads=1") for x in SIZES["model.set"]]},
              "num_key_value_heads (1) does not divide by tp (2)"),
    "mesh": ({"parallel.tp": 3}, "dp_replicate 1 x pp 1 x cp 1 x tp 3 = 3, which does not divide the 2 processes"),
    "halo": ({"parallel.cp": 2, "model.set": WIDE},
             "parallel.cp 2: rows of 32 tokens are shorter than the halo of 63 positions of simplicial_attention"),
    "resume, another run": (lambda run: {"model.arch": "llama"}, "another run: model.arch is sid there and llama"),
    "resume, another model": (other_past, "mlp.up_proj.weight is (48, 32) float32 in the checkpoint and (64, 32)"),
    "resume, nothing whole": (damage_all, "no checkpoint in"),
    "init_from, another kind": (lambda run: start_from(run, another_kind), "must be 'llama' or 'sid', got 'gpt2'"),
    "init_from, another size": (lambda run: start_from(run, another_size), "mlp.up_proj.weight has shape (48, 32)"),
    "init_from, a missing shard": (lambda run: start_from(run, a_missing_shard),
                                   "model-00002-of-00002.safetensors is missing, one of the 2 files"),
    "init_from, half a shard": (lambda run: start_from(run, half_a_shard), "not a whole safetensors file"),
}  # fmt: skip


def test_a_mistake_is_one_line_and_nothing_else(tmp_path, argv):
    change, message = MISTAKES["heads"]
    status, lines, said, out = launch(argv(tmp_path / "run", **SIZES | change), SID_LAUNCH)
    assert status == 2 and len(lines) == 1 and message in lines[0]
    assert said.splitlines() == lines and "Traceback" not in out


@pytest.mark.slow  # each launch costs what two starts of Python do
@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_of_the_first_process(tmp_path, trained, argv, name):
    change, message = MISTAKES[name]
    run = tmp_path / "run"
    if callable(change):
        shutil.copytree(trained, run)
        change = change(run)
    status, lines, said, _ = launch(argv(run, **SIZES | change))
    assert status == 1, said  # torchrun's own; of the processes it is 2
    errors = [line for line in lines if line.startswith("sid: error: ")]
    assert len(errors) == 1 and message in errors[0], said
    # what else is there is torchrun's: a warning before the line, its report behind it
    before, _, behind = said.partition(errors[0])
    assert "Traceback" not in before and behind.count("Traceback") <= 1 and "src/sidlm/" not in said, said


def test_a_damaged_checkpoint_is_passed_over_with_one_line(tmp_path, trained, argv):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    tensor_file(run / "checkpoints/step-00000004").unlink()
    status, lines, said, out = launch(argv(run, **SIZES | {"train.steps": 5, "parallel.tp": 2}))
    assert status == 0, said
    assert len(lines) == 1 and "skipping a damaged checkpoint" in lines[0] and "is missing" in lines[0]
    assert "from step 2" in out and "2 processes" in out
    assert (run / "checkpoints/step-00000005/state.json").is_file()
