"""Launchers: their syntax, and that `sid train` and torchrun take what they are given. Nothing is started."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from sidlm.parallel.mesh import BACKENDS
from sidlm.train.config import load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = ("nodes.sh", "slurm.sbatch")
ARGUMENTS = ["configs/8b.yaml", "--data.train", "/shared/text", "--parallel.tp", "2"]


def command(name: str) -> list[str]:
    """The torchrun command of a file, as words; variables stand as they are."""
    if name == "kubernetes.yaml":
        (container,) = documents(name)[1]["spec"]["template"]["spec"]["containers"]
        return container["command"]
    text = documents(name)[0]["run"] if name == "skypilot.yaml" else (LAUNCH / name).read_text()
    lines = text.replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if "torchrun --" in line)
    words = shlex.split(line)
    return words[words.index("torchrun") :]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run(["bash", LAUNCH / name], capture_output=True, text=True)
    assert said.returncode == 2 and said.stderr.startswith("usage: ")


def test_the_command_of_skypilot_is_bash(tmp_path):
    for key in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=documents("skypilot.yaml")[0][key], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*SCRIPTS, "kubernetes.yaml", "skypilot.yaml"])
def test_torchrun_and_sid_train_take_the_arguments(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = command(name)
    assert words[0] == "torchrun"
    parsed = get_args_parser().parse_args(words[1:])
    assert parsed.module and parsed.training_script == "sidlm.cli.main" and parsed.rdzv_backend == "c10d"
    assert parsed.max_restarts == "3" or parsed.max_restarts == 3
    program, *settings = parsed.training_script_args
    assert program == "train"
    settings = ARGUMENTS if settings == ["$@"] else settings
    cfg = load_config(settings[0], settings[1:])
    assert cfg.model.preset == "8b" and cfg.data.train == ("/shared/text",)


def test_the_pods_find_each_other_and_agree():
    service, job = documents("kubernetes.yaml")
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    pod, words = job["spec"]["template"]["spec"], command("kubernetes.yaml")
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert (
        f"--nnodes={job['spec']['completions']}" in words and job["spec"]["parallelism"] == job["spec"]["completions"]
    )
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29500" in words
    (container,) = pod["containers"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in words
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_backend_goes_with_the_device():
    assert BACKENDS == {"cpu": "gloo", "cuda": "nccl"}
