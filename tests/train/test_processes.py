"""`sid train` in four processes on several meshes: the same run as in one process, also when it goes on on another."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.extend import main as extend
from sidlm.cli.train import main
from sidlm.errors import SidError
from sidlm.train import loop, processes
from sidlm.train.metrics import read_json_lines

PROGRAM = Path(__file__).with_name("process_runs.py")
CHANGES = {"train.steps": 4, "schedule.warmup_steps": 0, "validation.every": 2, "validation.documents": 4,
           "train.layer_stats_every": 2, "train.verify_every": 1}  # fmt: skip
SIZES = {"data.vocab_size": 521, "model.set": [
    "hidden_size=32", "num_attention_heads=4", "num_key_value_heads=2", "head_dim=8", "num_hidden_layers=2",
    "intermediate_size=48", "simplicial_window=[8,4]", "layer_types=[full_attention,simplicial_attention]",
]}  # fmt: skip
MESHES = {
    "fsdp4": {"train.micro_batch_size": 1},
    "tp2-dp2": {"parallel.tp": 2},
    "cp2-dp2": {"parallel.cp": 2, "checkpoint.export_every": 2},
    "resumed-on-tp2-cp2": {"parallel.tp": 2, "parallel.cp": 2},
    "pp2-dp2": {"parallel.pp": 2, "train.micro_batch_size": 2},
    "experts-ep2-pp2": {"parallel.pp": 2, "parallel.ep": 2},
    "resumed-on-pp4": {"parallel.pp": 4, "parallel.pipeline.schedule": "gpipe"},
}
EXPERTS = {
    "model.set": [*SIZES["model.set"], "num_local_experts=4", "num_experts_per_tok=2", "moe_intermediate_size=32"]
}
RESUMED = {
    "tp2-dp2": "resumed-on-one",
    "pp2-dp2": "pp2-dp2-resumed-on-one",
    "experts-ep2-pp2": "experts-resumed-on-one",
}
"""From a run on a mesh to what goes on in one process, of a run that ended after step 2 or whose step 4 is damaged"""
MISTAKES = {
    "experts": ({"parallel.ep": 2}, "expert parallelism (ep 2) of a model without experts: num_local_experts is 0"),
    "ep": (
        {"parallel.ep": 3},
        "parallel.ep (3) does not divide dp_shard 4 x cp 1 = 4, the processes among which experts",
    ),
    "mesh": ({"parallel.tp": 3}, "dp_replicate 1 x pp 1 x cp 1 x tp 3 = 3, which does not divide the 4 processes"),
    "halo": (
        {"parallel.cp": 2, "model.set": [*SIZES["model.set"], "simplicial_window=[40,4]"]},
        "parallel.cp 2: rows of 32 tokens are shorter than the halo of 39 positions of simplicial_attention",
    ),
    "heads": ({"parallel.tp": 4}, "num_key_value_heads (2) does not divide by tp (4)"),
    "stages": (
        {"parallel.pp": 4, "parallel.pipeline.virtual_stages": 2},
        "8 pipeline stages are more than the 2 layers",
    ),
}


def stop_at(run: Path, copy: Path, step: int) -> None:
    """A copy of a run that was ended after a step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def disturbed(*arguments, step=loop.train_step):
    """A step before which random numbers were drawn: it looks at none, so there is no such state in a checkpoint."""
    torch.rand(7)
    return step(*arguments)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, argv):
    """Folder of all runs, and what each process came to."""
    place = tmp_path_factory.mktemp("runs")

    def line(name, **changes):
        return argv(place / name, **SIZES | CHANGES | (EXPERTS if name.startswith("experts-") else {}) | changes)

    def extension(name, **changes):
        """One stage from the run "one", whose gate no model of so few steps passes."""
        settings = {"model.init_from": place / "one", "model.set": ["simplicial_window=[8,4]"], "extend.attempts": 1,
                    "extend.stages": ["384:4x96"], "extend.tolerance": 10, "extend.repeats": 1}  # fmt: skip
        found = argv(place / name, **CHANGES | settings | changes)
        at = found.index("--data.vocab_size")
        return found[:at] + found[at + 2 :]  # the tokenizer is that of the run

    assert main(line("one")) == 0
    assert main(line("experts-one")) == 0
    for name in MESHES:
        if name.startswith("resumed"):
            stop_at(place / "one", place / name, 2)
    commands = [(name, ["train", *line(name, **changes)]) for name, changes in MESHES.items()]
    commands += [(name, ["train", *line(name, **changes)]) for name, (changes, _) in MISTAKES.items()]
    commands += [("extended", ["extend", *extension("extended", **{"parallel.pp": 2})])]
    commands += [("key", ["train", *line("key"), "--train.betch_size", "8"])]
    program = [sys.executable, PROGRAM, place]
    done = subprocess.run(program, input=json.dumps(commands), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    with pytest.raises(SidError, match="0% of the needles are found"):
        extend(extension("extended-one"))
    for source, name in RESUMED.items():
        if source == "experts-ep2-pp2":  # one bit of what the last process wrote
            shutil.copytree(place / source, place / name)
            flip(place / name / "checkpoints/step-00000004/tensors/__3_0.distcp")
        else:
            stop_at(place / source, place / name, 2)
        with mock.patch.object(loop, "train_step", disturbed):
            assert main(line(name)) == 0
    return place, json.loads((place / "statuses.json").read_text())


@pytest.mark.parametrize("name", [*MESHES, *RESUMED.values()])
def test_the_run_is_that_of_one_process(runs, name):
    place, _ = runs
    one = "experts-one" if name.startswith("experts-") else "one"
    expected, found = (read_json_lines(place / run / "metrics.jsonl") for run in (one, name))
    assert [r["tokens"] for r in found] == [r["tokens"] for r in expected] == [256, 512, 768, 1024]
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-6)
        assert ("valid" in a) == ("valid" in b)
        if "valid" in a:
            assert b["valid"]["all"] == pytest.approx(a["valid"]["all"], rel=1e-6)
    expected, found = (load_file(place / run / "model/model.safetensors") for run in (one, name))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", [*MESHES, *RESUMED.values()])
def test_statistics_of_layers_are_those_of_one_process(runs, name):
    place, _ = runs
    one = "experts-one" if name.startswith("experts-") else "one"
    expected, found = (read_json_lines(place / run / "metrics.jsonl")[-1]["layers"] for run in (one, name))
    for key, values in expected["output"].items():
        assert found["output"][key] == pytest.approx(values, rel=1e-4, abs=1e-6)
    for key, values in expected["gradient"].items():
        # where a number is all but zero, rounding decides
        assert found["gradient"][key] == pytest.approx(values, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["tp2-dp2", "resumed-on-one", "pp2-dp2-resumed-on-one", "resumed-on-tp2-cp2"])
def test_schedule_and_place_in_the_data_are_those_of_one_process(runs, name):
    place, _ = runs
    expected, found = (read_json_lines(place / run / "metrics.jsonl") for run in ("one", name))
    assert [(r["step"], r["lr"], r["tokens"]) for r in found] == [(r["step"], r["lr"], r["tokens"]) for r in expected]
    states = [json.loads((place / run / "checkpoints/step-00000004/state.json").read_text()) for run in ("one", name)]
    for key in ("step", "tokens", "skipped", "skipped_in_a_row", "data", "model"):
        assert states[0][key] == states[1][key], key


def test_a_gate_is_that_of_one_process(runs):
    """Nobody holds the model that is measured; before the extension and after a stage."""
    place, statuses = runs
    assert statuses["extended"][0] == 2 and all(statuses["extended"])
    assert "0% of the needles are found" in (place / "extended.0.err").read_text()
    found, expected = (json.loads((place / f"{name}/extend.json").read_text()) for name in ("extended", "extended-one"))
    assert found["before"] == pytest.approx(expected["before"], rel=1e-6)
    (gate,), (other,) = (record["stages"][0]["gates"] for record in (found, expected))
    assert gate["needles"] == other["needles"] and len(gate["needles"]) == 6
    assert gate["loss"] == pytest.approx(other["loss"], rel=1e-6) and gate["loss"] != found["before"]["loss"]


@pytest.mark.parametrize("name", MESHES)
def test_every_process_is_heard(runs, name):
    place, _ = runs
    ranks = read_json_lines(place / name / "metrics.jsonl")[-1]["ranks"]
    assert {key: len(values) for key, values in ranks.items()} == dict.fromkeys(ranks, 4)
    assert all(value > 0 for values in ranks.values() for value in values)
    log = (place / name / "log.txt").read_text()
    assert f" ranks 0-3 INFO {place / name}: " in log and " rank 0 INFO effective training time " in log


@pytest.mark.parametrize("name", MESHES)
def test_one_process_writes(runs, name):
    place, statuses = runs
    assert statuses[name] == [0] * 4, (place / f"{name}.0.err").read_text()
    assert "4 processes" in (place / f"{name}.0.out").read_text()
    for rank in range(1, 4):
        assert (place / f"{name}.{rank}.out").read_text() == ""
    assert "suboptimal" not in (place / f"{name}.1.err").read_text()
    facts = json.loads((place / name / "environment.json").read_text())
    assert facts["processes"] == 4 and facts["mesh"]["pp"] == MESHES[name].get("parallel.pp", 1)


@pytest.mark.parametrize("name", [*MISTAKES, "key"])
def test_a_mistake_is_one_line_of_the_first_process(runs, name):
    place, statuses = runs
    assert statuses[name][0] == 2 and all(statuses[name])
    said = [(place / f"{name}.{rank}.err").read_text() for rank in range(4)]
    message = MISTAKES[name][1] if name in MISTAKES else "unknown setting '--train.betch_size'"
    lines = [line for line in "".join(said).splitlines() if line.startswith("sid: error:")]
    assert len(lines) == 1 and lines[0] in said[0] and message in lines[0]
    assert not any("Traceback" in text for text in said)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.batch_size": 6}, "train.batch_size=6 does not divide by the 4 groups of processes that read rows"),
        ({"parallel.tp": 4, "data.seq_len": 30}, r"data.seq_len=30 does not divide by 4 \(tp 4\)"),
        ({"parallel.cp": 2, "parallel.tp": 2, "data.seq_len": 36}, r"data.seq_len=36 does not divide by 8 \(2 x cp 2"),
        (
            {"parallel.pp": 2, "train.micro_batch_size": 8},
            r"micro_batch_size=8 does not divide the 4 rows of a process \(train.batch_size 8 / 2\)",
        ),
    ],
)
def test_a_batch_that_cannot_be_spread(tmp_path, config, monkeypatch, changes, message):
    monkeypatch.setattr(processes.dist, "get_world_size", lambda: 4)
    with pytest.raises(SidError, match=message):
        processes.check_rows(config(tmp_path, **changes))


@pytest.mark.slow
def test_a_killed_process_costs_the_steps_since_the_checkpoint(tmp_path, argv):
    """torchrun starts all processes again, and the run ends bit for bit as an undisturbed one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    changes = SIZES | {"train.steps": 24, "checkpoint.every": 4, "validation.every": 0, "parallel.tp": 2}

    def start(name, *options):
        command = [*launcher, *options, "-m", "sidlm.cli.main", "train", *argv(tmp_path / name, **changes)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole").wait(300) == 0
    process, metrics = start("killed", "--max-restarts", "2"), tmp_path / "killed/metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 10):
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(300) == 0
    assert (tmp_path / "killed/command.txt").read_text().count("#") == 2  # it was started twice
    whole, killed = (read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed"))
    assert [(r["step"], r["loss"]) for r in killed] == [(r["step"], r["loss"]) for r in whole]
    whole, killed = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(killed[key], value) for key, value in whole.items())


def test_one_process_cannot_be_two(tmp_path, argv, capsys):
    from sidlm.cli.main import main as sid

    assert sid(["train", *argv(tmp_path / "run", **{"parallel.cp": 2})]) == 2
    assert "cp 2 x tp 1 = 2, which does not divide the 1 processes; start them with torchrun" in capsys.readouterr().err
