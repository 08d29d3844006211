from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sidlm.cli.main import main
from sidlm.cli.plan import job_of
from sidlm.train.config import load_config
from sidlm.train.recipe import phases

ROOT = Path(__file__).resolve().parents[2]
LARGE = ("8b", "70b", "405b")


def plan(capsys, *words: str) -> tuple[int, str, str]:
    status = main(["plan", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_405b_on_16384_gpus(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    status, out, err = plan(capsys, str(ROOT / "configs/405b.yaml"), "--gpus", "16384")
    assert (status, err) == (0, "")
    for words in (
        "405.85B parameters", "TP 8 CP 1 PP 16 DP 128", "optimizer, two moments", "gradients", "activations",
        "built on meta: the same", "all-gather", "reduce-scatter", "p2p", "pipeline bubble", "bubble 11.7%",
        "MFU 40.7%", "PFLOPs a GPU",
        "why not", "pipeline.virtual_stages 8", "TP 8 CP 1 PP 8 DP 256", "fits only with whole blocks",
    ):  # fmt: skip
        assert words in out, words


def test_a_mesh_by_hand_as_json(capsys):
    words = (str(ROOT / "configs/405b.yaml"), "--gpus", "16384", "--mesh", "tp=8,cp=1,pp=16,dp=128", "--json")
    status, out, _ = plan(capsys, *words)
    found = json.loads(out)
    assert status == 0 and found["plan"]["mesh"] == {"tp": 8, "cp": 1, "pp": 16, "dp": 128}
    assert found["parameter_bytes"]["planned"] == found["parameter_bytes"]["built"]
    assert found["plan"]["fits"] and found["others"] == []
    kept = [found["recomputation"][how]["activations"] for how in ("none", "cheap", "blocks")]
    assert kept == sorted(kept, reverse=True) and kept[1] == found["plan"]["memory_bytes"]["activations"]


def test_a_dry_run_of_the_config_as_it_is(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    words = ["--gpus", "256", "--mesh", "config", "--json", "--data.train", str(tmp_path), "--parallel.tp", "2"]
    words += ["--parallel.pp", "4", "--parallel.pipeline.virtual_stages", "2", "--train.micro_batch_size", "2"]
    words += ["--train.recompute", "blocks", "--train.steps", "9000", "--recipe.batch", "1B:256x8192"]
    status, out, _ = plan(capsys, str(ROOT / "configs/8b.yaml"), *words)
    found = json.loads(out)
    assert status == 0 and found["plan"]["mesh"] == {"tp": 2, "cp": 1, "pp": 4, "dp": 32}
    assert (found["plan"]["micro_batch"], found["plan"]["virtual_stages"]) == (
        1,
        2,
    )  # of rows twice as long as at first
    assert found["plan"]["recompute"] == "blocks" and found["meshes_searched"] == 1
    first = math.ceil(10**9 / (1024 * 4096))
    assert found["run"]["steps"] == 9000
    assert found["run"]["tokens"] == first * 1024 * 4096 + (9000 - first) * 256 * 8192
    assert found["data"] == {str(tmp_path): {"files": 1, "bytes": 1000}}


def test_a_sid_model_over_long_rows(capsys):
    words = ["--gpus", "64", "--hardware", "h200", "--model.arch", "sid", "--data.seq_len", "131072"]
    words += ["--train.batch_size", "128", "--mesh", "tp=2,cp=8,dp_shard=2,dp_replicate=2", "--json"]
    status, out, _ = plan(capsys, str(ROOT / "configs/8b.yaml"), *words)
    found = json.loads(out)["plan"]
    kinds = {(x["kind"], x["axis"]) for x in found["traffic"]}
    assert status == 0 and {("halo", "cp"), ("all-to-all", "cp"), ("all-reduce", "dp_replicate")} <= kinds
    assert found["mesh"]["dp_replicate"] == 2


def test_out_of_memory_is_one_line(capsys):
    status, out, err = plan(capsys, str(ROOT / "configs/8b.yaml"), "--gpus", "1")
    assert status == 2 and "MFU" in out
    assert err.count("\n") == 1 and "out of memory: 1 x H100 SXM 80 GB would need" in err and "85.0 GB" in err


def test_a_small_model_on_one_gpu_fits(capsys):
    status, out, _ = plan(capsys, str(ROOT / "configs/small.yaml"), "--gpus", "1", "--hardware", "h200", "--json")
    assert status == 0 and json.loads(out)["plan"]["traffic"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8", "--mesh", "tp=2,dp=2"], "tp 2 x cp 1 x pp 1 x dp 2 = 4, but --gpus is 8"),
        (["--gpus", "8", "--mesh", "tq=2"], "expected NAME=SIZE,... with names of tp, cp, pp, dp"),
        (["--gpus", "8", "--mesh", "tp=8"], "num_attention_heads (12) does not divide by tp (8)"),
        (["--gpus", "8", "--mesh", "config", "--parallel.tp", "3"], "tp 3 = 3, which does not divide the 8 processes"),
        (["--gpus", "8", "--mesh", "config", "--data.train", "nope"], "data source 'nope' does not exist"),
        (["--gpus", "17"], "no mesh of 17 GPUs divides a batch of 16 rows"),
        (["--gpus", "0"], "must be at least 1"),
        (["--gpus", "8", "--hardwar", "h100"], "did you mean --hardware?"),
        (["--gpus", "8", "--hardware", "h99"], "give one of b200, h100, h200"),
        (["--gpus", "8", "--model.preset", "9b"], "unknown preset '9b'; known: nano"),
        (["--gpus", "8", "--train.batchsize", "3"], "did you mean '--train.batch_size'?"),
    ],
)
def test_mistakes_are_one_line(capsys, words, message):
    status, _, err = plan(capsys, str(ROOT / "configs/small.yaml"), *words)
    assert status == 2 and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("name", LARGE)
def test_configs_of_llama_3(name):
    """Learning rates of table 3, warm-up, length and batch of section 3.4.1."""
    cfg = load_config(ROOT / "configs" / f"{name}.yaml")
    assert cfg.model.preset == name and cfg.model.arch == "llama"
    assert cfg.optim.lr == {"8b": 3e-4, "70b": 1.5e-4, "405b": 8e-5}[name]
    assert cfg.optim.lr * cfg.schedule.floor == pytest.approx({"8b": 3e-6, "70b": 1.5e-6, "405b": 8e-7}[name])
    assert cfg.schedule.warmup_steps == 8000 and cfg.train.steps == 1_200_000
    assert [(p.step_tokens, p.seq_len) for p in phases(cfg)] == [(2**22, 4096), (2**23, 8192), (2**24, 8192)]
    assert job_of(cfg, "bf16").tokens == 2**24
    assert cfg.data.train == ("embedded",) and not cfg.data.tokenizer  # no path of anybody's
