"""benchmarks/sparse24.py as a script, at sizes for a CPU: its numbers mean nothing here, its rows and its file do."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/sparse24.py"
PARTS = ("data", "dense", "report", "rows", "timing", "variants")


@pytest.fixture
def script(monkeypatch):
    """The script's module, and a function that runs its main() on the CPU with more arguments."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("sparse24")

    def run(*arguments):
        command = ["sparse24.py", "--device", "cpu", "--suite", "smoke", "--milliseconds", "2", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()

    yield module, run
    for name in ("sparse24", *(f"_sparse24_{part}" for part in PARTS)):
        sys.modules.pop(name, None)


def test_smoke_suite_from_the_command_line(tmp_path):
    out, plot, tables = tmp_path / "results.json", tmp_path / "plot.png", tmp_path / "tables.md"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--suite", "smoke", "--milliseconds", "2", "--seed", "3"]
    command += ["--out", out, "--plot", plot, "--markdown", tables]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(tmp_path.iterdir()) == {out, plot, tables}  # no temporary file left
    results = json.loads(out.read_text())
    (facts,) = results["runs"]
    assert {"device", "torch", "triton", "driver", "cusparselt", "git_revision", "date", "copy_gb_s"} <= set(facts)
    assert facts["seed"] == 3 and facts["command"].startswith("python benchmarks/sparse24.py --device cpu")
    assert str(tmp_path) not in facts["command"]
    rows = results["rows"]
    assert rows and all(row["status"] == "ok" for row in rows), [row for row in rows if row["status"] != "ok"]
    for row in rows:
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["repeats"] >= 3
        assert 0.8 < row["zeros"] < 1 and row["dropped"] < 0.05
        if row["kind"] == "pack":
            assert row["gb_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        else:
            flops = 2 * row["T"] * row["d"] * row["F"] * {"gemm": 1, "forward": 2, "step": 6}[row["kind"]]
            assert row["tflops"] == pytest.approx(flops / row["ms"] / 1e9)
    ours = [row for row in rows if row["variant"] == "sidlm 2:4" and row["kind"] in ("forward", "step")]
    assert {(row["kind"], row["precision"], row["T"]) for row in ours} == {
        (kind, precision, tokens)
        for kind in ("forward", "step")
        for precision in ("bf16", "fp8")
        for tokens in (48, 64)
    }
    dense = {(r["kind"], r["precision"], r["T"]): r["ms"] for r in rows if r["variant"] == "dense sidlm"}
    for row in ours:
        assert row["speedup"] == pytest.approx(dense[row["kind"], row["precision"], row["T"]] / row["ms"])
    kinds = {(row["kind"], row["what"]) for row in rows}
    assert {("gemm", "d_w_up"), ("gemm", "up"), ("pack", "activation"), ("pack", "transposed gradient")} <= kinds
    text = tables.read_text()
    assert all(title in text for title in ("Layer, forward and backward", "Products", "Packing", "Fewest tokens"))
    assert sum(line.count("|") > 3 for line in text.splitlines()) > len(rows)


def rows_of(module, speedups, **more):
    about = {"kind": "step", "status": "ok", "variant": "sidlm 2:4", "precision": "fp8", "model": "7B", "density": 0.1}
    about |= {"d": 4096, "F": 16384, "ms": 1.0} | more
    return [about | {"T": tokens, "speedup": speedup} for tokens, speedup in speedups.items()]


def test_crossover_is_where_all_larger_sizes_are_faster(script):
    module, _ = script
    rows = rows_of(module, {512: 1.1, 1024: 0.9, 2048: 1.01, 8192: 1.3})
    rows += rows_of(module, {512: 0.5, 8192: 0.99}, precision="bf16")
    for variant, times in {
        "sidlm 2:4 packed": {512: 1.5, 1024: 1.2, 2048: 1.0, 8192: 1.0},
        "sidlm 2:4 weights dense": {512: 1.1, 1024: 0.9, 2048: 0.95, 8192: 1.1},
        "sidlm 2:4 unpacked": {512: 1.0, 1024: 1.0, 2048: 1.0, 8192: 1.2},
    }.items():
        for tokens, ms in times.items():
            rows += rows_of(module, {tokens: 1.0}, variant=variant, ms=ms)
            rows += rows_of(module, {tokens: 1.0}, variant=variant, ms=1.0, precision="bf16")
    rows += rows_of(module, {4096: 1.2, 1024: 0.8}, kind="forward")
    for variant, times in {
        "sidlm 2:4 packed": {256: 0.995, 512: 0.98, 1024: 0.9},
        "sidlm 2:4 unpacked": {256: 1.0, 512: 1.0, 1024: 1.0},
    }.items():
        for tokens, ms in times.items():
            rows += rows_of(module, {tokens: 1.0}, kind="forward", variant=variant, ms=ms)
            rows += rows_of(module, {tokens: 1.0}, kind="forward", variant=variant, ms=1.0, precision="bf16")
    rows += rows_of(module, {16384: 0.1}, density=0.16) + rows_of(module, {16384: 0.1}, status="error")
    results = {"rows": rows, "runs": [{"device": "NVIDIA H200"}]}
    results["crossovers"] = found = module.crossovers(results)
    by = {row["precision"]: row for row in found}
    assert by["fp8"]["step"] == 2048 and by["fp8"]["forward"] == 4096
    assert by["bf16"]["step"] is None and "forward" not in by["bf16"]
    assert [by["fp8"][name] for name in ("inference", "tokens", "weights")] == [512, 1024, 8192]
    assert by["bf16"]["inference"] is by["bf16"]["tokens"] is by["bf16"]["weights"] is None
    from sidlm.ops.sparse24.crossover import NEVER, Crossover

    lines = [
        eval(line.strip().rstrip(","), {"Crossover": Crossover, "NEVER": NEVER}) for line in module.entries(results)
    ]
    assert set(lines) == {
        Crossover("NVIDIA H200", True, 16384, 4096, 512, 1024, 8192),
        Crossover("NVIDIA H200", False, 16384, 4096, NEVER, NEVER, NEVER),
    }  # fmt: skip


def test_the_librarys_crossovers_are_those_of_the_measured_rows(script, monkeypatch, capsys):
    from sidlm.ops.sparse24.crossover import TABLE, Crossover

    module, _ = script
    measured = SCRIPT.parent / "results/sparse24_h200_layers.json"
    monkeypatch.setattr(module, "publish", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["sparse24.py", "--replot", str(measured)])
    module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [eval(line.strip().rstrip(","), {"Crossover": Crossover}) for line in lines] == list(TABLE)


@pytest.mark.parametrize("density", [0.03, 0.1, 0.16])
def test_activations_are_sparse_in_the_way_of_trained_ones(script, density):
    data = importlib.import_module("_sparse24_data")
    layer = data.layer(1024, 192, 768, density, 0, torch.device("cpu"), torch.float32)
    assert [tuple(t.shape) for t in layer[:4]] == [(1024, 192), (1024, 192), (768, 192), (192, 768)]
    found = data.look(layer)
    assert found.zeros == pytest.approx(1 - density, abs=0.02)
    assert 0.01 < found.dense_features < 0.1  # some features are active most of the time
    assert found.recurring > 2 * density  # in runs
    shares = ((layer.x @ layer.w_in.T) > 0).float().mean(0)
    assert shares.quantile(0.9) > 2.5 * shares.quantile(0.1)
    other = data.swiglu(layer, 0)
    assert other.w_in.numel() + other.w_down.numel() == pytest.approx(layer.w_in.numel() * 2, rel=0.01)


def test_a_failing_row_stops_nothing_and_resume_runs_it_again(script, tmp_path, monkeypatch):
    _, run = script
    out = tmp_path / "results.json"
    variants = importlib.import_module("_sparse24_variants")
    works = variants.squared_relu_ffn

    def breaks(*xs, sparsity, precision):
        if sparsity and precision == "fp8":
            raise RuntimeError("as planned")
        return works(*xs, sparsity=sparsity, precision=precision)

    monkeypatch.setattr(variants, "squared_relu_ffn", breaks)
    run("--only", "layer", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    failed = [row for row in rows if row["status"] == "error"]
    assert len(rows) == 24 and len(failed) == 8 and all(row["error"] == "RuntimeError: as planned" for row in failed)
    monkeypatch.setattr(variants, "squared_relu_ffn", works)
    run("--only", "layer", "--out", out, "--resume")
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 2 and len(results["rows"]) == 24
    assert all(row["status"] == "ok" and row["run"] == (row["precision"] == "fp8") for row in results["rows"])


def test_budget_leaves_the_rest_out(script, tmp_path, capsys):
    _, run = script
    out = tmp_path / "results.json"
    run("--budget-seconds", "-1", "--out", out)
    assert "--resume goes on" in capsys.readouterr().out and not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_so(script, monkeypatch, capsys):
    module, _ = script
    monkeypatch.setattr(sys, "argv", ["sparse24.py"])
    with pytest.raises(SystemExit):
        module.main()
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--device cpu --suite smoke" in message


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_suites_can_be_listed_anywhere(script, suite, monkeypatch, capsys):
    module, _ = script
    monkeypatch.setattr(sys, "argv", ["sparse24.py", "--list", "--suite", suite])
    module.main()
    assert "tasks" in capsys.readouterr().out.splitlines()[-1]
    tasks = module.SUITES[suite]()
    assert len(tasks) == len(set(tasks)), "a task is in the suite twice"
    assert len({module.identity(module.described(task)) for task in tasks}) == len(tasks)
