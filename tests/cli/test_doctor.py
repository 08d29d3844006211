from __future__ import annotations

import importlib.util
import json
import os

import pytest
import torch

from sidlm import ops
from sidlm.cli import doctor

INTERPRET = os.environ.get("TRITON_INTERPRET", "0")


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    """As on a user's machine: in Triton's interpreter, which other tests have, a check takes a quarter of a minute."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def test_every_op_of_the_table_is_checked_and_right(sid):
    status, out, err = sid("doctor", "--json", "--device", "cpu")
    assert status == 0 and not err
    report = json.loads(out)
    assert report["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "transformers", "triton", "threads", "memory_bytes", "disk_free_bytes"} <= set(report["machine"])
    rows = report["operations"]
    assert {(row["op"], row["impl"]) for row in rows} == {
        (op, impl) for op, impls in ops.IMPLEMENTATIONS.items() for impl in impls
    }
    for row in rows:
        assert row["ok"] is (True if row["usable"] else None), row
        if row["usable"]:
            assert 0 <= row["error"] <= row["tolerance"] < 1e-4
        else:
            assert row["reason"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_implementations_of_simplicial_say_why(dtype):
    """The kernels come with the reason that they do not run on a CPU, the others with what they are used for."""
    rows = [row for row in doctor.check_ops(torch.device("cpu"), dtype) if row["op"] == "simplicial"]
    reasons = {row["impl"]: (row["usable"], row["reason"]) for row in rows}
    assert reasons.pop("eager") == (True, "default") and reasons.pop("reference") == (True, "on request")
    if importlib.util.find_spec("triton") is None:
        cuda = compute = "triton is not installed"
    else:
        cuda = "needs a CUDA device, not cpu (or triton's interpreter, TRITON_INTERPRET=1)"
        compute = "needs a GPU of compute capability 9.0"
        if dtype == torch.float32:
            compute = "the kernels take bfloat16 and float16, not torch.float32"
    assert reasons == {"triton": (False, cuda), "hopper": (False, compute)}


def test_tables_for_people(sid):
    status, out, _ = sid("doctor", "--device", "cpu")
    assert status == 0 and "all checks passed" in out
    for word in ("simplicial", "attention", "reference", "default", "torch", "memory", "disk"):
        assert word in out


def test_wrong_numbers_are_found(sid, monkeypatch):
    """An implementation that is off by one part in a thousand fails, and so does the command."""
    impls = ops.IMPLEMENTATIONS["attention"]
    right = impls["sdpa"]
    monkeypatch.setitem(impls, "sdpa", right._replace(run=lambda *args, **kw: right.run(*args, **kw) * 1.001))
    status, out, _ = sid("doctor", "--json", "--device", "cpu")
    assert status == 1
    wrong = [row for row in json.loads(out)["operations"] if row["ok"] is False]
    assert [(row["op"], row["impl"]) for row in wrong] == [("attention", "sdpa")]
    assert "attention=sdpa" in sid("doctor", "--device", "cpu")[1]


def test_an_implementation_that_crashes_is_a_finding(sid, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    impls = ops.IMPLEMENTATIONS["simplicial"]
    monkeypatch.setitem(impls, "eager", impls["eager"]._replace(run=crash))
    status, out, _ = sid("doctor", "--json", "--device", "cpu")
    (row,) = [row for row in json.loads(out)["operations"] if row["ok"] is False]
    assert status == 1 and row["impl"] == "eager" and row["reason"] == "RuntimeError: no kernel image"


def test_checks_cover_every_op():
    named = [name.partition("=") for name in doctor.CHECKS]
    assert {op for op, _, impl in named if not impl} == set(ops.IMPLEMENTATIONS)
    assert all(impl in ops.IMPLEMENTATIONS[op] for op, _, impl in named if impl)


def test_the_check_of_hopper_is_of_its_own_kernels(monkeypatch):
    """Not of the portable ones, which get what it does not take: as they get the check of the others."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)  # kernels must be imported under the setting that triton was
    from sidlm.ops.simplicial import hopper

    asked, run = [], ops.two_simplicial_attention

    def seen(*xs, window, v2_bias, impl, doc_ids=None):
        problem = hopper._problem(*xs, *window, "trilinear", 0.0, v2_bias)
        asked.append((impl, hopper.takes(problem, xs[0].shape[-1] ** -0.5, doc_ids)))
        return run(*xs, window=window, doc_ids=doc_ids, v2_bias=v2_bias, impl="eager")

    monkeypatch.setattr(ops, "two_simplicial_attention", seen)
    impls = ops.IMPLEMENTATIONS["simplicial"]
    for name in ("hopper", "triton"):
        monkeypatch.setitem(impls, name, impls[name]._replace(why_not=lambda device, dtype: None))
    rows = [row for row in doctor.check_ops(torch.device("cpu"), torch.float32) if row["op"] == "simplicial"]
    assert [row["impl"] for row in rows if row["ok"]] == list(impls)
    runs = [(impl, taken) for impl, taken in asked if impl != "reference"]
    assert runs == [("hopper", True), ("triton", False), ("eager", False)]


def test_unknown_device(fails):
    assert "--device 'nonsense'" in fails("doctor", "--device", "nonsense")


def test_what_sid_impl_names_is_shown_or_refused(sid, fails, monkeypatch):
    monkeypatch.setenv("SID_IMPL", "simplicial=reference")
    rows = json.loads(sid("doctor", "--json")[1])["operations"]
    why = {row["impl"]: row["reason"] for row in rows if row["op"] == "simplicial"}
    assert (why["reference"], why["eager"]) == ("named by SID_IMPL", "on request")
    monkeypatch.setenv("SID_IMPL", "simplical=reference")
    assert "SID_IMPL names 'simplical'; the operations are" in fails("doctor")
