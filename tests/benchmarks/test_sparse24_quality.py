"""benchmarks/sparse24_quality.py: equal arms, a real run of two steps, and going on where it was cut."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from sidlm.cli.main import main as sid
from sidlm.models import num_parameters, preset

SCRIPT = Path(__file__).parents[2] / "benchmarks/sparse24_quality.py"
NANO = SCRIPT.parents[1] / "configs/nano.yaml"


@pytest.fixture
def script(monkeypatch):
    """The script's module, and a function that runs its main()."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    module = importlib.import_module("sparse24_quality")

    def run(*arguments):
        command = ["sparse24_quality.py", "--jobs", "1", "--device", "cpu", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        module.main()

    yield module, run
    for name in ("sparse24_quality", "_corpus"):
        sys.modules.pop(name, None)


@pytest.fixture
def files(tmp_path, monkeypatch, capsys):
    """--train, --valid, --tokenizer and the other paths, of a tiny corpus."""
    monkeypatch.setenv("SID_CACHE", str(tmp_path / "cache"))
    rng, words = random.Random(0), ["sid", "trains", "small", "sparse", "models", "on", "text"]
    for name, count in (("train", 100), ("valid", 8)):
        lines = ({"text": " ".join(rng.choice(words) for _ in range(60)), "domain": name} for _ in range(count))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = ["tokenizer", "train", str(tmp_path / "train.jsonl"), "--out", str(tmp_path / "tok")]
    assert sid([*tokenizer, "--vocab-size", "520"]) == 0
    capsys.readouterr()
    return [
        "--train", tmp_path / "train.jsonl", "--valid", tmp_path / "valid.jsonl", "--tokenizer", tmp_path / "tok",
        "--out", tmp_path / "runs", "--json", tmp_path / "results.json",
    ]  # fmt: skip


SHORT = ["--settings", "--train.steps", "2", "--schedule.warmup_steps", "1", "--data.seq_len", "32"]


@pytest.mark.parametrize("name", ["nano", "micro", "small"])
def test_arms_have_as_many_parameters(script, monkeypatch, name):
    module, _ = script
    words = ["x", "--json", "x", "--replot", "--config", str(NANO), "--preset", name]
    monkeypatch.setattr(sys, "argv", words)
    args = module.arguments()
    configs = {arm: preset(name, arch="sid", **module.model_fields(args, arm)) for arm in module.ARMS}
    counts = [num_parameters(config) for config in configs.values()]
    assert len(set(counts)) == 1
    assert all(set(config.layer_types) == {"full_attention"} for config in configs.values())
    assert {arm for arm, config in configs.items() if config.mlp_sparsity} == set(module.ARMS) - {"swiglu", "dense"}
    assert configs["dense"].intermediate_size == 1.5 * configs["swiglu"].intermediate_size


def test_arms_of_one_seed_come_last(script, files, monkeypatch):
    module, run = script
    order = []
    monkeypatch.setattr(module, "run", lambda args, arm, seed, *_: order.append((arm, seed)))
    run("--config", NANO, "--arms", "recipe", "dense", "--once", "naive", "--seeds", "3", "4", *files)
    assert order == [("recipe", 3), ("dense", 3), ("recipe", 4), ("dense", 4), ("naive", 3)]


def test_a_run_of_two_steps_and_its_table(script, files, tmp_path, capsys):
    _, run = script
    run("--config", NANO, "--arms", "recipe", "--seeds", "3", "--warmup", "1", "--plot", tmp_path / "plot.png", *files,
        *SHORT)  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    (row,) = results["runs"]
    assert (row["arm"], row["seed"], row["steps"]) == ("recipe", 3, 2) and len(row["commit"]) == 40
    assert row["sparsity"][-1]["step"] == 2 and all(0 < v < 1 for v in row["sparsity"][-1]["dropped_act_t"])
    assert row["config"]["mlp_sparsity"] == "2:4" and row["valid"][-1]["loss"] > 0
    assert str(tmp_path) not in json.dumps(results) and {"device", "git_revision", "command"} <= set(results["facts"])
    assert "| 2:4, the full recipe | " in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def arguments(module, monkeypatch, *words):
    given = ["--json", "x", "--config", str(NANO), "--train", "t", "--valid", "v", "--tokenizer", "t"]
    monkeypatch.setattr(sys, "argv", ["x", *given, *map(str, words), "--settings", "--optim.lr", "1"])
    return module.arguments()


def test_an_arm_may_have_learning_rates_of_its_own(script, monkeypatch):
    module, _ = script
    args = arguments(module, monkeypatch, "--arms", "swiglu", "dense@0.5", "recipe@0.5,0.1")
    optim = [module.load_config(args.config, module.train_words(args, arm, 0)[0][1:]).optim for arm in args.arms]
    assert [(x.lr, x.down_proj_lr_scale) for x in optim] == [(1, 1), (0.5, 1), (0.5, 0.1)]
    fields = [module.model_fields(args, arm) for arm in ("recipe", "recipe@0.5,0.1")]
    assert fields[0] == fields[1]
    for wrong in ("denser", "dense@x", "dense@1,2,3", "dense@-1"):
        with pytest.raises(SystemExit):
            arguments(module, monkeypatch, "--arms", wrong)


def test_rates_are_chosen_from_other_runs_by_family(script, monkeypatch, tmp_path, capsys):
    module, _ = script
    losses = {"swiglu": 3.0, "swiglu@2e-3": 2.9, "dense": 4.0, "dense@4e-3,0.1": 3.1, "recipe@2e-3,0.1": 3.2}
    runs = [
        {"arm": arm, "seed": 0, "valid": [{"step": 2, "loss": loss, "bits_per_byte": 1.0}], "sparsity": []}
        for arm, loss in losses.items()
    ]
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({"facts": {}, "runs": runs}))
    args = arguments(module, monkeypatch, "--arms", "swiglu", "dense", "recipe", "--best-of", file)
    assert args.arms == ["swiglu@2e-3", "dense@4e-3,0.1", "recipe@4e-3,0.1"]
    lines = module.table(runs).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == [
        "SwiGLU, dense", "SwiGLU, dense, 2e-3", "squared ReLU, dense", "squared ReLU, dense, 4e-3 x 0.1",
        "2:4, the full recipe, 2e-3 x 0.1",
    ]  # fmt: skip
    # squared ReLU beside the dense one of its own rates, and the others beside the best
    assert [line.split("|")[3].split("(")[0].strip() for line in lines] == [
        "-0.1000",
        "-0.2000",
        "+0.0000",
        "+0.0000",
        "+0.1000",
    ]


def test_it_goes_on_where_it_was_cut(script, files, tmp_path, monkeypatch, capsys):
    module, run = script
    done = []

    def trained(words, out, deadline):
        if len(done) == 3:
            raise SystemExit("cut")
        done.append(out.name)
        (out / "model").mkdir(parents=True)
        (out / "model/config.json").write_text(json.dumps(preset("nano").to_dict()))
        loss = {"all": {"loss": 2.0 + len(done), "bits_per_byte": 1.0}}
        headline = {"command": module.shlex.join(["sid", "train", *words]), "steps": 2, "loss": [3.0, 2.0]}
        return headline, [{"step": 2, "valid": loss}]

    monkeypatch.setattr(module, "trained", trained)
    command = ["--config", NANO, "--arms", "dense", "swiglu", "--seeds", "0", "1", *files]
    with pytest.raises(SystemExit, match="cut"):
        run(*command, *SHORT)
    assert done == ["dense-0", "swiglu-0", "dense-1"]
    done.clear()
    run(*command, *SHORT)
    assert done == ["swiglu-1"]
    table = capsys.readouterr().out
    assert "| squared ReLU, dense | 4.0000 (3.0000 to 5.0000) | +0.0000 (+0.0000, +0.0000) | +0.000 |" in table
    assert "| SwiGLU, dense | 3.5000 (3.0000 to 4.0000) | -0.5000 (+1.0000, -2.0000) | +0.003 |" in table
    with pytest.raises(SystemExit, match="has another run of dense, seed 0"):
        run(*command, *SHORT, "--optim.lr", "1")
    with pytest.raises(SystemExit):
        run(*command, "--settings", "--model.set", "a=1")
