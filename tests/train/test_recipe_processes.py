"""Muon, float8, averaging, the spike guard and context extension in four processes, against one process."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.extend import main as extend
from sidlm.cli.train import main
from sidlm.errors import SidError
from sidlm.train.metrics import read_json_lines

HERE = Path(__file__).parent
SIZES = {"data.vocab_size": 521, "samples.prompts": [], "model.set": [
    "hidden_size=32", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=16", "num_hidden_layers=4",
    "intermediate_size=64", "simplicial_window=[8,4]",
]}  # fmt: skip
MUON = {"optim.name": "muon", "train.steps": 4, "schedule.warmup_steps": 0}
GUARDED = {
    "train.steps": 12, "recipe.batch": ["512:4x64"], "schedule.warmup_steps": 0, "schedule.anneal_tokens": 1024,
    "schedule.average_every": 2, "spikes.threshold": 1, "spikes.window": 4, "spikes.max_in_a_row": 2,
}  # fmt: skip
FLOAT8 = {"train.steps": 2, "train.micro_batch_size": 2, "schedule.warmup_steps": 0}
ROWWISE, TENSORWISE = (FLOAT8 | {"train.float8": recipe} for recipe in ("rowwise", "tensorwise"))
EXTEND = {"extend.stages": ["384:4x96"], "extend.attempts": 2, "extend.depths": 2, "validation.documents": 4}
RUNS = {
    "muon-fsdp4": MUON,
    "muon-resumed-on-pp2-tp2": MUON | {"parallel.pp": 2, "parallel.tp": 2},
    "guarded-fsdp4": GUARDED,
    "guarded-pp2": GUARDED | {"parallel.pp": 2, "train.micro_batch_size": 2},
    "rowwise-fsdp4": ROWWISE,
    "tensorwise-tp2": TENSORWISE | {"parallel.tp": 2},
}
ONE = {"muon": MUON, "guarded": GUARDED, "rowwise": ROWWISE, "tensorwise": TENSORWISE, "plain": FLOAT8}


def stop_at(run, copy, step):
    """A copy of a run that was ended after a step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, argv):
    """Folder of all runs; each is named by its settings and its mesh."""
    pytest.importorskip("torchao.float8")
    place = tmp_path_factory.mktemp("runs")

    def line(name, changes):
        return argv(place / name, **SIZES | changes)

    for name, changes in ONE.items():
        assert main(line(f"{name}-one", changes)) == 0
    stop_at(place / "muon-one", place / "muon-resumed-on-pp2-tp2", 2)
    longer = line("longer", EXTEND | {"model.init_from": place / "plain-one", "parallel.tp": 2})
    commands = [(name, ["train", *line(name, changes)]) for name, changes in RUNS.items()]
    commands.append(("longer", ["extend", *longer]))
    program = [sys.executable, HERE / "process_runs.py", place]
    done = subprocess.run(program, input=json.dumps(commands), text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    statuses = json.loads((place / "statuses.json").read_text())
    for name in RUNS:
        assert statuses[name] == [0] * 4, (place / f"{name}.0.err").read_text()
    stop_at(place / "muon-fsdp4", place / "muon-resumed-on-one", 2)
    assert main(line("muon-resumed-on-one", MUON)) == 0
    return place


def losses(runs, name):
    return read_json_lines(runs / name / "metrics.jsonl")


def weights(runs, name):
    return load_file(runs / name / "model/model.safetensors")


@pytest.mark.parametrize("cases", [[], pytest.param(["more"], marks=pytest.mark.slow)])
def test_muon_of_split_matrices_is_that_of_whole_ones(tmp_path, cases):
    """In float64, with uneven parts, several meshes, tied weights and a stage without matrices."""
    program = [sys.executable, HERE / "optimizer_ranks.py", tmp_path, *cases]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = json.loads((tmp_path / "results.json").read_text())
    assert len(ranks) == 4 and all(len(found) == (5 if cases else 4) for found in ranks)
    for found in ranks:
        for case, errors in found.items():
            assert errors and max(errors.values()) < 1e-12, (case, max(errors, key=errors.__getitem__))


@pytest.mark.parametrize("name", ["muon-fsdp4", "muon-resumed-on-pp2-tp2", "muon-resumed-on-one"])
def test_a_muon_run_is_that_of_one_process(runs, name):
    """Also when it goes on on another mesh with its momentum. Newton-Schulz is in bf16: where a sum in another order
    rounds to the other side, one element of a step moves by 2^-8 of it."""
    expected, found = losses(runs, "muon-one"), losses(runs, name)
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5) and b["grad_norm"] == pytest.approx(
            a["grad_norm"], rel=1e-4
        )
    for key, value in weights(runs, "muon-one").items():
        moved = (weights(runs, name)[key] - value).norm() / value.norm()
        assert moved < 1e-4, key


@pytest.mark.parametrize("name", ["guarded-fsdp4", "guarded-pp2"])
def test_the_same_steps_are_left_out_and_the_mean_is_the_same(runs, name):
    """Rows become longer and fewer on the way, also in a pipeline."""
    expected, found = losses(runs, "guarded-one"), losses(runs, name)
    skipped = [[r["step"] for r in part if "skipped" in r] for part in (expected, found)]
    assert skipped[0] == skipped[1] and skipped[0]
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    for key, value in weights(runs, "guarded-one").items():
        torch.testing.assert_close(weights(runs, name)[key], value, rtol=1e-4, atol=2e-5)


def test_float8_of_processes_that_split_rows_is_that_of_micro_batches(runs):
    """The same scales, so the same losses but for the order of sums."""
    for a, b in zip(losses(runs, "rowwise-one"), losses(runs, "rowwise-fsdp4"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)


def test_float8_of_split_features_is_as_near_to_fp32(runs):
    """A process scales its own features, so the numbers are others, not worse ones."""
    exact, one, split = (losses(runs, name) for name in ("plain-one", "tensorwise-one", "tensorwise-tp2"))
    for a, b, c in zip(exact, one, split, strict=True):
        error = max(abs(b["loss"] - a["loss"]), 1e-4 * a["loss"])
        assert abs(c["loss"] - a["loss"]) < 3 * error
    assert [r["loss"] for r in split] != [r["loss"] for r in exact]


def test_an_extension_is_that_of_one_process(runs, argv):
    """Two rounds of a stage, the second one going on from the first, and the gate after each."""
    with pytest.raises(SidError, match=r"after 2 attempts and 768 tokens: .*0% of the needles"):
        extend(argv(runs / "longer-one", **SIZES | EXTEND | {"model.init_from": runs / "plain-one"}))
    statuses = json.loads((runs / "statuses.json").read_text())["longer"]
    said = "".join((runs / f"longer.{rank}.err").read_text() for rank in range(4))
    assert all(statuses) and len(re.findall(r"sid: error: .*stage 1 \(96 tokens\) has not passed", said)) == 1
    expected, found = (json.loads((runs / name / "extend.json").read_text()) for name in ("longer-one", "longer"))
    assert found["before"] == pytest.approx(expected["before"], rel=1e-5)
    pairs = zip(expected["stages"][0]["gates"], found["stages"][0]["gates"], strict=True)
    for a, b in pairs:
        assert b["tokens"] == a["tokens"] and b["needles"] == a["needles"]
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
