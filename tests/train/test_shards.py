"""Checkpoints and exports that four processes write, seen from one: whole, the same files, and known when damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sidlm.cli.convert import main as convert
from sidlm.errors import SidError
from sidlm.models import SidForCausalLM
from sidlm.models.convert.safetensors_writer import write_safetensors
from sidlm.train import checkpoint
from sidlm.train.config import OptimConfig
from sidlm.train.export import open_run_checkpoint
from sidlm.train.optim import make_optimizer

PROGRAM = Path(__file__).with_name("shard_ranks.py")
sys.path.append(str(PROGRAM.parent))
from shard_ranks import CASES, HARMS, config_of, state_of  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    done = subprocess.run([sys.executable, PROGRAM, folder], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def transformers_writes(case, place, folder, **settings):
    """What `save_pretrained` of the whole model makes of the tensors as they were."""
    model = SidForCausalLM(config_of(case))
    tensors = load_file(place / case / "whole-2.safetensors")
    model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
    model.save_pretrained(folder, **settings)


def assert_same_weights(found, expected):
    """Names, dtypes, shapes, bits and metadata."""
    with safe_open(found, "pt") as a, safe_open(expected, "pt") as b:
        assert set(a.keys()) == set(b.keys()) and a.metadata() == b.metadata() == {"format": "pt"}
    found, expected = load_file(found), load_file(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_what_transformers_writes(place, tmp_path, case):
    transformers_writes(case, place, tmp_path)
    found = place / case / "model"
    names = {path.name for path in found.iterdir()}
    assert names == {path.name for path in tmp_path.iterdir()} | {"tokenizer.json"}
    for name in ("config.json", "generation_config.json"):
        assert (found / name).read_bytes() == (tmp_path / name).read_bytes()
    assert_same_weights(found / "model.safetensors", tmp_path / "model.safetensors")
    assert not list((place / case).glob(".tmp*"))


def test_several_files_that_processes_share(place, tmp_path):
    """The index and every file are those of transformers, whoever has written which."""
    transformers_writes("fsdp2-tp2", place, tmp_path / "one", max_shard_size=6000)
    found = open_run_checkpoint(place / "fsdp2-tp2/checkpoints/step-00000002")
    (tmp_path / "two").mkdir()
    for index in (2, 0, 1):
        write_safetensors(tmp_path / "two", found.tensors, found.read, max_bytes=6000, share=(index, 3))
    index = "model.safetensors.index.json"
    assert (tmp_path / "two" / index).read_bytes() == (tmp_path / "one" / index).read_bytes()
    files = sorted(path.name for path in (tmp_path / "one").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
    for name in files:
        assert_same_weights(tmp_path / "two" / name, tmp_path / "one" / name)


@pytest.mark.parametrize("case", ["fsdp2-tp2", "pp2-fsdp2-tied", "ep2-fsdp2"])
def test_one_process_gets_every_state(place, case):
    """Weights, moments, counts of steps: bit for bit what each process had, by name."""
    model = SidForCausalLM(config_of(case))
    tensors = state_of(model, make_optimizer(model, OptimConfig(lr=0.01)))
    expected = load_file(place / case / "whole-2.safetensors")
    found = checkpoint.open_checkpoint(place / case / "checkpoints/step-00000002")
    assert found.step == 2 and found.state["tokens"] == 128
    checkpoint.load(found, tensors)
    assert tensors.keys() == expected.keys() and sum("exp_avg_sq" in name for name in tensors) > 10
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name


def test_a_checkpoint_of_a_mesh_is_converted(place, tmp_path, capsys):
    step = place / "pp2-fsdp2-tied/checkpoints/step-00000002"
    assert convert([str(step), str(tmp_path / "out")]) == 0
    assert_same_weights(tmp_path / "out/model.safetensors", place / "pp2-fsdp2-tied/model/model.safetensors")
    step = place / "hsdp-2x2/torn/step-00000002"
    with pytest.raises(SidError, match=r"step-00000002: tensors/__\d_0.distcp has [\d,]+ bytes instead of"):
        convert([str(step), str(tmp_path / "torn")])
    assert not (tmp_path / "torn").exists()


def test_an_export_that_fails_on_one_process_leaves_the_former_one(place):
    """All of them are told, and none waits for it. The tests above read the former export after that."""
    told = json.loads((place / "damage.json").read_text())["export"]
    assert len(told) == 4 and len(set(told)) == 1 and told[0].startswith("no disk space for model in ")
    assert not list((place / "fsdp4").glob(".tmp*"))
    assert {path.name for path in (place / "fsdp4/model").glob("*.safetensors")} == {"model.safetensors"}


@pytest.mark.parametrize("case", ["fsdp4", "hsdp-2x2"])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_used(place, case):
    found = json.loads((place / "damage.json").read_text())[case]
    assert set(found) == set(HARMS)
    words = {"torn": " bytes instead of ", "one bit": "another SHA-256", "missing": "is missing"}
    for kind, result in found.items():
        assert result["step"] == 1 and result["same"], kind
        assert len(result["said"]) == 1 and words[kind] in result["said"][0]
        assert f"step-00000002: tensors/{result['file']}" in result["said"][0]
