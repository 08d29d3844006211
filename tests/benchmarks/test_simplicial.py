"""benchmarks/simplicial.py as a script, at sizes for a CPU: its numbers mean nothing here, its rows and its file do."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/simplicial.py"
# what a CPU, or a machine without the package, cannot run
ALLOWED = ("flex", "simplicial-attention")


@pytest.fixture
def script(monkeypatch):
    """The script's module, and a function that runs its main() on the CPU with more arguments."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("simplicial")

    def run(*arguments):
        command = ["simplicial.py", "--device", "cpu", "--suite", "smoke", "--milliseconds", "5", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()

    yield module, run
    for name in ("simplicial", *(f"_simplicial_{part}" for part in ("baselines", "report", "rows", "timing"))):
        sys.modules.pop(name, None)


def test_smoke_suite_from_the_command_line(tmp_path):
    out, plot = tmp_path / "results.json", tmp_path / "plot.png"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--suite", "smoke", "--milliseconds", "5", "--seed", "3"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, "--out", out, "--plot", plot], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert plot.read_bytes().startswith(b"\x89PNG")
    results = json.loads(out.read_text())
    assert set(tmp_path.iterdir()) == {out, plot}  # no temporary file left
    (facts,) = results["runs"]
    assert {"device", "torch", "triton", "driver", "git_revision", "date", "command", "seed", "suite"} <= set(facts)
    assert facts["seed"] == 3 and facts["command"].startswith("python benchmarks/simplicial.py --device cpu")
    assert str(tmp_path) not in facts["command"]
    assert all(row["source"] and row["device"] and ("ms" in row or "tflops" in row) for row in results["published"])
    for row in results["rows"]:
        if row["status"] == "ok":
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["repeats"] >= 3
            assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
            assert row.get("difference", 0) < 1e-5
        else:
            assert row["status"] == "error" and row["error"]
            assert row["variant"] in ALLOWED, row
    kinds = {(row["section"], row["kind"]) for row in results["rows"] if row["status"] == "ok"}
    assert {
        ("ceiling", "matmul"),
        ("ceiling", "backward"),
        ("published step", "step"),
        ("documents", "step"),
        ("decode", "decode"),
    } <= kinds
    determinant = [row for row in results["rows"] if row["form"] == "determinant"]
    assert determinant and all(row["time_ratio_to"] == "sidlm" for row in determinant)


def test_flops_of_a_row_are_counted(script):
    module = importlib.import_module("_simplicial_rows")
    shape = module.Shape(2, 40, 4, 2, 16, (9, 3))
    pairs = sum(min(i + 1, 9) * min(i + 1, 3) for i in range(40))
    expected = {"forward": 4, "backward": 12, "step": 16}
    for kind, per_pair in expected.items():
        assert module.flops_of(module.Task("", kind, shape), module.OURS) == per_pair * 16 * 4 * 2 * pairs
    decode = module.Task("", "decode", module.Shape(3, 1, 4, 2, 16, (9, 3), past=5))
    assert module.flops_of(decode, module.OURS) == 4 * 16 * 4 * 3 * (6 * 3)
    documents = module.document_lengths(100_000, 7)
    assert sum(documents) == 100_000 and 600 < 100_000 / len(documents) < 1700


def test_a_failing_row_stops_nothing_and_resume_runs_it_again(script, tmp_path, monkeypatch):
    module, run = script
    out = tmp_path / "results.json"
    timing = importlib.import_module("_simplicial_timing")
    works = timing.two_simplicial_attention

    def breaks(*xs, form, **kwargs):
        if form == "determinant":
            raise RuntimeError("as planned")
        return works(*xs, form=form, **kwargs)

    monkeypatch.setattr(timing, "two_simplicial_attention", breaks)
    run("--sections", "forms,documents", "--out", out)
    status = [(row["form"], row["status"]) for row in json.loads(out.read_text())["rows"]]
    assert sorted(status) == sorted([("trilinear", "ok"), ("determinant", "error")] * 2 + [("trilinear", "ok")])
    monkeypatch.setattr(timing, "two_simplicial_attention", works)
    before = {module.identity(row): row for row in json.loads(out.read_text())["rows"]}
    run("--sections", "forms,documents", "--out", out, "--resume")
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 2 and len(results["rows"]) == 5
    assert all(row["status"] == "ok" for row in results["rows"])
    for row in results["rows"]:
        again = row["section"] == "forms"  # a task with a failure runs again whole, so that its ratio is of one run
        assert row["run"] == again and (row == before[module.identity(row)]) != again


def test_a_broken_device_is_left_for_a_new_process(tmp_path):
    out, runner = tmp_path / "results.json", tmp_path / "runner.py"
    runner.write_text(
        f"import os, sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport simplicial\n"
        "broken = 'SIMPLICIAL_BENCHMARK_CONTINUE' not in os.environ\n"
        "simplicial.is_usable = lambda device: not broken\n"
        "simplicial.main()\n"
    )
    command = [sys.executable, runner, "--device", "cpu", "--suite", "smoke", "--milliseconds", "5", "--out", out]
    done = subprocess.run([*command, "--sections", "forms,documents"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("going on in a new process") == 1 and "5 ok, 0 error" in done.stdout
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 1 and len(results["rows"]) == 5


def test_budget_skips_the_rest(script, tmp_path):
    _, run = script
    out = tmp_path / "results.json"
    run("--only", "backward", "--budget-seconds", "0", "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert rows and all(row["status"] == "skipped" and "--budget-seconds" in row["error"] for row in rows)
    assert {row["kind"] for row in rows} == {"backward", "step"}
    assert {row["section"] for row in rows}.isdisjoint({"ceiling", "decode"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_it_says_so(script, monkeypatch, capsys):
    module, _ = script
    monkeypatch.setattr(sys, "argv", ["simplicial.py"])
    with pytest.raises(SystemExit):
        module.main()
    message = capsys.readouterr().err
    assert "no CUDA device" in message and "--device cpu --suite smoke" in message


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_suites_can_be_listed_anywhere(script, suite, monkeypatch, capsys):
    module, _ = script
    monkeypatch.setattr(sys, "argv", ["simplicial.py", "--list", "--suite", suite])
    module.main()
    assert "rows" in capsys.readouterr().out.splitlines()[-1]
    tasks = module.SUITES[suite]()
    assert len(tasks) == len(set(tasks)), "a row is in the suite twice"
    assert all(task.selected(list(module.GROUPS)) for task in tasks)
