from __future__ import annotations

import json
import signal

import pytest

from sidlm.cli import demo


@pytest.fixture
def small(monkeypatch, corpus):
    """The demo on a tiny corpus and model, in a few steps; everything else is as users run it."""
    tiny = ("--data.train", str(corpus), "--data.vocab_size=600", "--data.seq_len=64", "--data.valid_fraction=0.2")
    sizes = ("hidden_size=32", "intermediate_size=64", "num_hidden_layers=4", "num_attention_heads=4", "head_dim=8")
    monkeypatch.setattr(demo, "SETTINGS", (*demo.SETTINGS, *tiny, "--model.set", *sizes, "--train.batch_size", "2"))
    monkeypatch.setattr(demo, "STEPS", 6)


def test_demo_trains_evaluates_writes_and_reports(sid, small, tmp_path):
    out = tmp_path / "demo"
    status, shown, _ = sid("demo", "--out", out, "--device", "cpu")
    assert status == 0
    for step in ("1/3 training: 6 steps", "2/3 evaluating", "3/3 writing", "report.html", "next "):
        assert step in shown
    assert (out / "report.html").is_file() and (out / "model" / "model.safetensors").is_file()
    result = json.loads((out / "evaluation.json").read_text())
    assert 0 < result["data"]["all"]["bits_per_byte"] < 10
    config = json.loads((out / "model" / "config.json").read_text())
    assert "simplicial_attention" in config["layer_types"]
    assert sid("demo", "--out", out, "--device", "cpu")[0] == 0  # nothing left to train


def test_interrupted_demo_goes_on_where_it_was(sid, small, tmp_path, monkeypatch):
    from sidlm.train import loop

    real = loop.train
    stop_at = 3

    def interrupted(cfg, **kwargs):
        return real(cfg, on_step=lambda record: record["step"] == stop_at and signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(loop, "train", interrupted)
    out = tmp_path / "demo"
    status, _, err = sid("demo", "--out", out, "--device", "cpu")
    assert status == 130 and "goes on" in err and "of 6" in err
    monkeypatch.setattr(loop, "train", real)
    assert sid("demo", "--out", out, "--device", "cpu", "--minutes", 5)[0] == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [step for step in steps if step > 0] == [1, 2, 3, 4, 5, 6]


def test_minutes_choose_the_steps_by_the_speed_here(small, monkeypatch, tmp_path):
    from sidlm.train import loop

    class Result:
        tokens, step, tokens_per_second, signal = 800, 8, 50.0, 0

    seen = []
    monkeypatch.setattr(loop, "train", lambda cfg: seen.append(cfg) or Result)
    assert demo.planned_steps(tmp_path / "new", 2.0, "cpu") == 60  # 120 s x 50 tokens/s / 100 tokens a step
    assert seen[0].train.steps == demo.PROBE_STEPS and not str(seen[0].train.out).startswith("runs")
    assert demo.planned_steps(tmp_path / "new", None, "cpu") == demo.STEPS
    monkeypatch.setattr(Result, "signal", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C while the speed is measured
        demo.planned_steps(tmp_path / "new", 2.0, "cpu")


def test_out_that_is_a_file(fails, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; it takes a folder" in fails("demo", "--out", tmp_path / "file")
