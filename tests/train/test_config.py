import dataclasses

import pytest

from sidlm.errors import SidError
from sidlm.train.config import RunConfig, flatten, load_config, to_yaml


def load(tmp_path, text, *argv):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(path, list(argv))


def test_file_then_command_line(tmp_path):
    text = "optim: {lr: 1e-3, beta2: 0.9}\ntrain: {steps: 7}"
    cfg = load(tmp_path, text, "--optim.lr", "2e-4", "--train.batch-size=4")
    assert (cfg.optim.lr, cfg.optim.beta2, cfg.train.steps, cfg.train.batch_size) == (2e-4, 0.9, 7, 4)


def test_model_settings_add_up(tmp_path):
    cfg = load(tmp_path, "model: {overrides: {a: 1, b: [1, 2]}}", "--model.set", "b=[3]", "c=null", "d=x")
    assert cfg.model.overrides == {"a": 1, "b": [3], "c": None, "d": "x"}


@pytest.mark.parametrize("prompts", [["- a", "--b", "", "x=y", "it's ü"], []])
def test_yaml_round_trip(tmp_path, prompts):
    cfg = RunConfig()
    cfg = dataclasses.replace(
        cfg,
        samples=dataclasses.replace(cfg.samples, prompts=tuple(prompts)),
        model=dataclasses.replace(cfg.model, overrides={"simplicial_window": [8, 4], "mlp_sparsity": None}),
        data=dataclasses.replace(cfg.data, skip_corrupt=True, train=("a=1", "b=2")),
    )
    assert load(tmp_path, to_yaml(cfg)) == cfg


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("optim: {lrr: 1}", [], "run.yaml: unknown setting 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr: 1", [], "unknown setting 'lr'; did you mean 'optim.lr'?"),
        ("model: {overides: {}}", [], "did you mean 'model.overrides'?"),
        ("", ["--optim.rl", "1"], "unknown setting '--optim.rl'; did you mean '--optim.lr'?"),
        ("optim: {lr: abc}", [], "run.yaml: optim.lr: expected a number, got 'abc'"),
        ("optim: 3", [], "optim is a section"),
        ("train: {steps: {a: 1}}", [], "train.steps: expected a whole number, got a section"),
        ("- 1", [], "must be a mapping"),
        ("a: [", [], "not valid YAML"),
        ("", ["--train.steps", "1.5"], "train.steps: expected a whole number, got '1.5'"),
        ("", ["--train.steps"], "train.steps: expected a whole number, got 'nothing'"),
        ("", ["--train.compile", "maybe"], "train.compile: expected one of auto, on, off, got 'maybe'"),
        ("", ["--data.skip_corrupt", "perhaps"], "expected true or false"),
        ("", ["--data.train", "a", "b=2"], "'a' has no weight but others have"),
        ("", ["--model.set", "layers"], "model.set: expected NAME=VALUE ..., got 'layers'"),
        ("", ["--train.steps", "0"], "train.steps must be at least 1, got 0"),
        ("", ["--optim.lr", "nan"], "optim.lr must be above 0, got nan"),
        ("", ["--optim.embedding_lr_scale", "0"], "optim.embedding_lr_scale must be above 0, got 0.0"),
        ("", ["--optim.down_proj_lr_scale", "0"], "optim.down_proj_lr_scale must be above 0, got 0.0"),
        ("", ["--train.batch_size", "6", "--train.micro_batch_size", "4"], "multiple of train.micro_batch_size=4"),
        ("", ["--schedule.warmup_steps", "200"], "warmup_steps=200 leaves nothing of train.steps=200"),
        ("", ["oops"], "unexpected argument 'oops'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, text, argv, message):
    with pytest.raises(SidError) as caught:
        load(tmp_path, text, *argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file():
    with pytest.raises(SidError, match=r"nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(None, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in flatten(RunConfig()):
        assert f"--{key}" in text
    assert "--model.set NAME=VALUE" in text
