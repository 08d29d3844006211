"""benchmarks/simplicial_numerics.py at sizes for a CPU, and its yardsticks against each other in float64."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/simplicial_numerics.py"
TENSORS = ("out", "lse", "dq", "dk", "dv", "dk2", "dv2")
FORMS = ("trilinear", "determinant")


@pytest.fixture
def script(monkeypatch):
    """The script's module, its yardsticks, and a function that runs its main() on the CPU with more arguments."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module, yardsticks = (importlib.import_module(x) for x in ("simplicial_numerics", "_simplicial_numerics_torch"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["simplicial_numerics.py", "--device", "cpu", *map(str, arguments)])
        module.main()

    yield module, yardsticks, run
    for name in ("simplicial_numerics", "_simplicial_numerics_torch"):
        sys.modules.pop(name, None)


def named(case, name):
    return next(row for row in case["rows"] if row["name"] == name)


def test_from_the_command_line(tmp_path):
    out, markdown = tmp_path / "results.json", tmp_path / "table.md"
    command = [sys.executable, SCRIPT, "--device", "cpu", "--impls", "triton", "--seed", "3", "--commit", "abc"]
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([*command, "--out", out, "--markdown", markdown], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(tmp_path.iterdir()) == {out, markdown}  # no temporary file left
    results = json.loads(out.read_text())
    facts = results["facts"]
    assert {"device", "torch", "triton", "driver", "date", "command"} <= set(facts)
    assert (facts["seed"], facts["git_revision"]) == (3, "abc") and str(tmp_path) not in facts["command"]
    found = results["cases"]
    low = {(c["dtype"], c["form"], c["kind"]) for c in found if c["dtype"] != "float32"}
    kinds = ("normal", "scaled", "concentrated", "upcycled")
    assert low == set(itertools.product(("bfloat16", "float16"), FORMS, kinds))
    for case in found:
        assert case["float64_disagreement"] < 1e-10
        assert named(case, "triton")["status"] == "skipped" and named(case, "triton")["reason"]
        eager, own, rounded = (named(case, name) for name in ("eager", "torch SDPA", "result rounded"))
        for row in (eager, own, rounded):
            assert row["status"] == "ok" and tuple(row["errors"]) == TENSORS, row
            assert all(math.isfinite(x) for error in row["errors"].values() for x in error.values())
            assert all(math.isfinite(x) and x > 0 for x in row["ratio_to_torch"].values())
        # nothing beats rounding the exact result, and it beats no half-precision computation by orders in easy cases
        for name in TENSORS[2:]:
            error, least = eager["errors"][name]["frobenius"], rounded["errors"][name]["frobenius"]
            assert error > 0.95 * least
            if case["kind"] == "normal" and case["dtype"] != "float32":
                assert error < 3 * least and own["errors"][name]["frobenius"] < 8 * least
        if case["kind"] == "concentrated":
            assert 0.7 < case["median_largest_weight"] < 0.99 and case["factor"] > 1
        expected = {"bfloat16": ["bfloat16", "float16"], "float16": ["float16"], "float32": []}[case["dtype"]]
        lines = [row for row in case["rows"] if row["name"].startswith("u in ")]
        assert [row["name"] for row in lines] == [f"u in {x}" for x in expected]
        assert all(set(row["errors"]) == {"out", "lse"} and row["overflows"] == 0 for row in lines)
    table = markdown.read_text()
    assert table in done.stdout and "- triton, bfloat16: needs a CUDA device" in table
    assert table.count("| torch SDPA |") == len(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [(12, 4), (5, 9)])
def test_yardsticks_agree_in_float64(script, form, window):
    module, yardsticks, _ = script
    case = module.Case("float64", form, "normal", B=2, T=23, H=4, G=2, D=8, window=window)
    xs, grad, settings, _ = module.make_inputs(case, torch.device("cpu"), seed=1)
    settings = settings._replace(k2_bias=0.3, v2_bias=-0.7)
    exact = module.run_implementation("eager", xs, settings, grad)
    virtual = yardsticks.by_virtual_queries(xs, settings, block=7)
    torch.testing.assert_close(virtual.out, exact["out"], rtol=0, atol=1e-10)
    torch.testing.assert_close(virtual.lse, exact["lse"], rtol=0, atol=1e-10)
    assert virtual.overflows == 0 and 0 < virtual.largest_weight.min() <= virtual.largest_weight.max() <= 1 + 1e-12
    own, _ = yardsticks.by_pair_keys(xs, settings, grad)
    assert tuple(own) == tuple(exact) == TENSORS
    for name in TENSORS:
        torch.testing.assert_close(own[name], exact[name], rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_rounding_of_u_shows_and_overflow_is_counted(script):
    module, yardsticks, _ = script
    case = module.Case("bfloat16", "trilinear", "normal", T=30, H=2, G=1, D=8, window=(9, 4))
    xs, _, settings, _ = module.make_inputs(case, torch.device("cpu"), seed=1)
    exact, bf16, fp16 = (yardsticks.by_virtual_queries(xs, settings, to) for to in (None, torch.bfloat16, torch.half))
    coarse, fine = ((x.out - exact.out).norm() / exact.out.norm() for x in (bf16, fp16))
    assert 1e-4 < coarse < 1e-2 and 4 < coarse / fine < 16  # three bits more
    xs[0] = xs[0] * 1e5
    assert yardsticks.by_virtual_queries(xs, settings, torch.half).overflows > 0


def test_a_failure_is_a_row_and_a_killed_run_leaves_what_it_had(script, tmp_path, monkeypatch):
    module, _, run = script
    out, markdown = tmp_path / "results.json", tmp_path / "table.md"
    works, calls = module.run_implementation, []

    def breaks(impl, xs, settings, grad):
        calls.append(impl)
        if len(calls) > 4:
            raise KeyboardInterrupt
        if impl == "reference":
            raise RuntimeError("as planned")
        results = works(impl, xs, settings, grad)
        if len(calls) == 3:
            results["dk"][0, 0, 0, 0] = torch.nan
        return results

    monkeypatch.setattr(module, "run_implementation", breaks)
    with pytest.raises(KeyboardInterrupt):
        run("--impls", "reference,eager", "--out", out, "--markdown", markdown)
    (case,) = json.loads(out.read_text())["cases"]
    assert named(case, "reference")["status"] == "error" and "as planned" in named(case, "reference")["reason"]
    eager = named(case, "eager")
    assert eager["errors"]["dk"] == {"nonfinite": 1} and eager["ratio_to_torch"]["dk"] is None
    assert (
        "not finite" in markdown.read_text()
        and "- reference, bfloat16: RuntimeError: as planned" in markdown.read_text()
    )


def test_budget_and_rendering_again(script, tmp_path, monkeypatch, capsys):
    module, _, run = script
    out, first, second = (tmp_path / name for name in ("results.json", "first.md", "second.md"))
    monkeypatch.setattr(module, "cases", lambda device, all=module.cases: [replace(x, T=9) for x in all(device)[:1]])
    run("--out", out, "--markdown", first)
    run("--render", out, "--markdown", second)
    assert first.read_text() == second.read_text()
    run("--render", out, "--measure", "row_median", "--markdown", second)
    assert "Median over the rows" in second.read_text()
    run("--out", out, "--budget-seconds", "0")
    (case,) = json.loads(out.read_text())["cases"]
    assert "--budget-seconds" in case["reason"] and "--budget-seconds" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_wrong_arguments_are_named(script, monkeypatch, capsys):
    module, _, run = script
    with pytest.raises(SystemExit):
        run("--impls", "eager,nothing")
    assert "--impls has nothing" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["simplicial_numerics.py"])
    with pytest.raises(SystemExit):
        module.main()
    assert "no CUDA device" in capsys.readouterr().err
