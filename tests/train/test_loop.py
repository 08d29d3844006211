"""The loop through the real command line: accumulation, resume, interruption, steps that are not finite, report."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.train import main
from sidlm.errors import SidError
from sidlm.train import checkpoint, folder, loop, train_step
from sidlm.train.metrics import JsonLines, read_json_lines

NUMBERS = ("step", "loss", "lr", "grad_norm", "tokens", "valid", "sparsity")


def weights(out):
    return load_file(out / "model/model.safetensors")


def numbers(out):
    """What metrics.jsonl says besides the clock."""
    return [{key: r.get(key) for key in NUMBERS} for r in read_json_lines(out / "metrics.jsonl")]


def all_tensors(out):
    """Model and optimizer tensors of the newest checkpoint."""
    found = checkpoint.newest_good(out / "checkpoints")
    stored = checkpoint.SafeReader(found.path / "tensors").read_metadata().state_dict_metadata
    into = {name: torch.zeros(m.size, dtype=m.properties.dtype) for name, m in stored.items()}
    checkpoint.load(found, into)
    return into


def assert_same_run(a, b):
    one, two = all_tensors(a), all_tensors(b)
    assert one.keys() == two.keys() and any(name.endswith("exp_avg_sq") for name in one)
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert numbers(a) == numbers(b)
    for name, value in weights(a).items():
        assert torch.equal(value, weights(b)[name]), name


def test_accumulation_changes_nothing(tmp_path, argv):
    """1 x 8 rows, 8 x 1 row and 4 x 2 rows: the same losses, norms and weights within fp32 rounding."""
    for rows in (8, 1, 2):
        changes = {"train.micro_batch_size": rows, "train.steps": 4, "schedule.warmup_steps": 0}
        assert main(argv(tmp_path / str(rows), **changes)) == 0
    whole = numbers(tmp_path / "8")
    for rows in (1, 2):
        for a, b in zip(whole, numbers(tmp_path / str(rows)), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-5)
        for name, value in weights(tmp_path / "8").items():
            torch.testing.assert_close(value, weights(tmp_path / str(rows))[name], rtol=1e-4, atol=2e-5)


def test_micro_batches_differ_in_labels(tmp_path, config):
    """Otherwise the test above would also pass with a mean of means."""
    from sidlm.train.build import open_text

    cfg = config(tmp_path)
    labels = open_text(cfg, resumed=False).loader.batch(0).labels
    assert len(set((labels != -100).sum(dim=1).tolist())) > 1


EXPERTS = {"model.set": ["hidden_size=32", "num_attention_heads=2", "num_key_value_heads=1", "head_dim=16",
                         "intermediate_size=16", "simplicial_window=[8,4]", "num_local_experts=4"]}  # fmt: skip
# dense up to step 3
SPARSE = {"model.set": [*EXPERTS["model.set"][:4], "intermediate_size=192", "simplicial_window=[8,4]",
                        "mlp_sparsity=2:4"], "sparsity.warmup_steps": 3, "train.log_every": 1, "train.steps": 6,
          "validation.documents": 4}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "death"),
    [({}, 5), (EXPERTS, 5), (SPARSE, 3), (SPARSE, 5)],
    ids=["dense", "experts", "sparse-before", "sparse-behind"],
)
def test_resume_is_bitwise(tmp_path, argv, changes, death):
    changes = changes | {"validation.every": 3}
    assert main(argv(tmp_path / "whole", **changes)) == 0
    with pytest.raises(KeyboardInterrupt):  # dies after an odd step; the newest checkpoint is of the one before
        loop.train(loop_config(argv(tmp_path / "cut", **changes)), on_step=die_at(death))
    assert len(numbers(tmp_path / "cut")) == death
    assert main(argv(tmp_path / "cut", **changes)) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert ("sparsity" in read_json_lines(tmp_path / "whole/metrics.jsonl")[-1]) is ("sparsity.warmup_steps" in changes)
    if changes.get("model.set") == EXPERTS["model.set"]:
        assert any(name.endswith("balance_bias") and t.any() for name, t in all_tensors(tmp_path / "cut").items())


def loop_config(argv):
    from sidlm.train.config import load_config

    return load_config(None, argv)


def die_at(step):
    def on_step(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_after_a_checkpoint(tmp_path, argv, capsys, monkeypatch, number, status):
    former = signal.getsignal(number)
    real = loop.train_step

    def step_and_signal(*args):
        found = real(*args)
        step_and_signal.calls += 1
        if step_and_signal.calls == 3:
            os.kill(os.getpid(), number)
        return found

    step_and_signal.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", step_and_signal)
        assert main(argv(tmp_path / "cut")) == status
    assert signal.getsignal(number) is former
    assert "after step 3; continue with: sid train --" in capsys.readouterr().err
    assert checkpoint.newest_good(tmp_path / "cut/checkpoints").step == 3
    assert main(argv(tmp_path / "cut")) == 0
    assert main(argv(tmp_path / "whole")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_damaged_newest_checkpoint_is_passed_over(tmp_path, argv, capsys):
    out = tmp_path / "run"
    assert main(argv(out)) == 0
    whole = tmp_path / "whole"
    shutil.copytree(out, whole)
    data = next((out / "checkpoints/step-00000008/tensors").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    assert main(argv(out)) == 0
    said = capsys.readouterr().err
    assert "step-00000008" in said and "bytes instead of" in said
    assert_same_run(whole, out)

    for path in (out / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    with pytest.raises(SidError, match=r"no checkpoint in .* is intact"):
        main(argv(out))
    assert len(numbers(out)) == 8


def test_finished_run_started_again_adds_nothing(tmp_path, argv):
    assert main(argv(tmp_path / "run")) == 0
    before = numbers(tmp_path / "run")
    samples = (tmp_path / "run/samples.jsonl").read_text()
    assert main(argv(tmp_path / "run")) == 0
    assert numbers(tmp_path / "run") == before
    assert (tmp_path / "run/samples.jsonl").read_text() == samples
    assert main(argv(tmp_path / "run", **{"train.steps": 10})) == 0  # more steps are welcome
    assert [r["step"] for r in numbers(tmp_path / "run")] == list(range(1, 11))


def test_another_run_in_the_folder_is_refused(tmp_path, argv):
    assert main(argv(tmp_path / "run", **{"train.steps": 2})) == 0
    listing = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for changes, message in (
        ({"train.seed": 5}, "train.seed is 0 there and 5 here"),
        ({"data.seq_len": 16}, "data.seq_len is 32 there and 16 here"),
        ({"model.set": ["hidden_size=48"]}, "model.overrides.hidden_size is 32 there and 48 here"),
        ({"model.preset": "micro"}, "model.preset is nano there and micro here"),
        ({"train.resume": "never"}, "already holds a run"),
        ({"train.steps": 1}, r"is beyond train\.steps=1"),
    ):
        with pytest.raises(SidError, match=message):
            main(argv(tmp_path / "run", **changes))
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == listing


def test_checkpoint_of_another_shape(tmp_path, argv):
    assert main(argv(tmp_path / "run", **{"train.steps": 2})) == 0
    (tmp_path / "run/config.yaml").unlink()
    wider = [*argv(tmp_path)[1:8], "intermediate_size=64"]
    with pytest.raises(SidError, match=r"model\.\S+ is \(\d+, \d+\) float32 in the checkpoint and \(\d+, \d+\)"):
        main(argv(tmp_path / "run", **{"train.steps": 4, "model.set": wider}))


def test_other_text_under_the_same_name_is_refused(tmp_path, argv, corpus):
    text = tmp_path / "text.jsonl"
    shutil.copy(corpus, text)
    assert main(argv(tmp_path / "run", **{"data.train": text, "train.steps": 2})) == 0
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:200]))
    with pytest.raises(SidError, match="was trained on other data"):
        main(argv(tmp_path / "run", **{"data.train": text, "train.steps": 4}))


def test_one_process_for_one_folder(tmp_path, argv):
    with folder.locked(tmp_path / "run"), pytest.raises(SidError, match=f"in use by process {os.getpid()}"):
        main(argv(tmp_path / "run"))


@pytest.fixture
def poison(monkeypatch):
    """poison({3}) makes the gradient of the third batch nan, whenever it is computed."""
    real = train_step.gradients

    def install(calls):
        seen = []

        def gradients(model, batch, *rest):
            loss = real(model, batch, *rest)
            if not seen or seen[-1] is not batch:
                seen.append(batch)
            if len(seen) in calls:
                next(model.parameters()).grad[0, 0] = float("nan")
            return loss

        monkeypatch.setattr(train_step, "gradients", gradients)

    return install


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, argv, config, poison):
    poison({3})
    before_and_after = {}

    def look(record):
        before_and_after[record["step"]] = {n: t.clone() for n, t in live.items()}

    real = loop.make_optimizer
    live = {}

    def make(model, *more):
        live.update(model.state_dict())
        return real(model, *more)

    loop.make_optimizer = make
    try:
        result = loop.train(config(tmp_path / "run", **{"train.steps": 4}), on_step=look)
    finally:
        loop.make_optimizer = real
    for name, value in before_and_after[2].items():
        assert torch.equal(value, before_and_after[3][name]), name
    assert any(not torch.equal(v, before_and_after[4][n]) for n, v in before_and_after[3].items())
    records = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert ["skipped" in r for r in records] == [r["grad_norm"] is None for r in records] == [False, False, True, False]
    assert checkpoint.newest_good(tmp_path / "run/checkpoints").state["skipped"] == 1
    assert result.step == 4


@pytest.mark.parametrize(
    ("setting", "bad", "stopped"),
    [("train.max_skipped_in_a_row", {2, 4, 5, 6}, 6), ("train.max_skipped", {2, 4, 6}, 6)],
)
def test_too_many_such_steps_stop_the_run(tmp_path, argv, poison, setting, bad, stopped):
    poison(bad)
    with pytest.raises(SidError, match=rf"stopped at step {stopped}: .*{setting}=2"):
        main(argv(tmp_path / "run", **{setting: 2}))
    # the checkpoint of step 6 would have come after the verdict
    assert checkpoint.newest_good(tmp_path / "run/checkpoints").step == 4


def test_full_disk_keeps_what_was_there(tmp_path, argv, monkeypatch):
    real, out = shutil.disk_usage, tmp_path / "run"

    def usage(path):
        return real(path)._replace(free=10) if (out / "checkpoints/step-00000004").exists() else real(path)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(SidError, match=r"no disk space for step-00000006 in .*checkpoints: needs [\d,]+ bytes, 10 "):
        main(argv(out))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    monkeypatch.undo()
    assert main(argv(out)) == 0


@pytest.mark.parametrize("where", ["metrics", "export"])
def test_full_disk_elsewhere(tmp_path, argv, monkeypatch, where):
    """While a line of metrics or the exported model is written."""
    from sidlm.models.convert import safetensors_writer

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "run"
    assert main(argv(out, **{"train.steps": 2})) == 0
    with monkeypatch.context() as patch:
        if where == "metrics":
            patch.setattr(JsonLines, "write", full)
        else:
            patch.setattr(safetensors_writer, "_write_file", full)
        with pytest.raises(SidError, match=r"no disk space (in the run folder|for model in) "):
            main(argv(out, **{"train.steps": 4}))
    assert "model.safetensors" in {p.name for p in (out / "model").iterdir()}
    assert not list(out.glob(".tmp*"))
    assert main(argv(out, **{"train.steps": 4})) == 0


def test_it_learns_and_reports(tmp_path, argv):
    """Loss falls well below a guess among the words; the folder has everything; the report escapes what it shows."""
    out = tmp_path / "run"
    changes = {"train.steps": 40, "optim.lr": 1e-2, "validation.every": 20, "samples.every": 20, "checkpoint.every": 0,
               "train.out": out, "samples.prompts": ["<script>alert(2)</script>", "$x_1$"]}  # fmt: skip
    assert main(argv(out, **changes)) == 0
    records = read_json_lines(out / "metrics.jsonl")
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    valid = [r["valid"] for r in records if "valid" in r]
    assert len(valid) == 2 and set(valid[0]) == {"plain", "<script>alert(1)</script>", "all"}
    assert valid[1]["all"]["loss"] < valid[0]["all"]["loss"]
    assert records[-1]["tokens"] == 40 * 8 * 32
    for name in ("config.yaml", "command.txt", "environment.json", "loss.png", "tensorboard",
                 "tokenizer/tokenizer.json", "model/config.json", "model/tokenizer.json", "samples.jsonl"):  # fmt: skip
        assert (out / name).exists(), name
    assert json.loads((out / "environment.json").read_text())["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [r["step"] for r in read_json_lines(out / "samples.jsonl")] == [20, 20, 40, 40]
    page = (out / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "&lt;script&gt;alert(2)" in page
    assert page.count("<svg") == 4 and "http-equiv" not in page
    assert "src=" not in page and "<link" not in page


def test_exported_model_is_the_trained_one(tmp_path, argv):
    import transformers

    assert main(argv(tmp_path / "run", **{"checkpoint.export_every": 4})) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    tensors = all_tensors(tmp_path / "run")
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[f"model.{name}"]), name
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_unknown_model_setting(tmp_path, argv):
    with pytest.raises(SidError, match=r"num_hiden_layers.*num_hidden_layers"):
        main(argv(tmp_path / "run", **{"model.set": "num_hiden_layers=2"}))
