"""2:4 sparsity in the loop: switched by the step, measured at log steps, indifferent to how a run is cut."""

import subprocess
import sys

import pytest
import torch

from sidlm.cli.train import main
from sidlm.errors import SidError
from sidlm.nn import SquaredReLUFeedForward
from sidlm.train import loop
from sidlm.train.config import SparsityConfig, load_config
from sidlm.train.metrics import _scalars, read_json_lines
from sidlm.train.processes import Processes
from sidlm.train.sparsity import STATISTICS, measured, sparse_layers, switch

SIZES = ["hidden_size=32", "num_attention_heads=2", "num_key_value_heads=1", "head_dim=16", "num_hidden_layers=4",
         "intermediate_size=192", "simplicial_window=[8,4]"]  # fmt: skip
SPARSE = {"model.set": [*SIZES, "mlp_sparsity=2:4"], "sparsity.warmup_steps": 3, "train.steps": 6, "train.log_every": 2}


def records(out):
    return read_json_lines(out / "metrics.jsonl")


@pytest.fixture
def states(monkeypatch):
    """[("train" or "validate" or "sample", whether each layer is sparse), ...] in the order of the run."""
    seen = []

    def watch(name, what, position):
        real = getattr(loop, name)

        def watched(*args):
            layers = [m for m in args[position].model.modules() if getattr(m, "sparsity", None)]
            seen.append((what, {layer.enabled.item() for layer in layers}))
            return real(*args)

        monkeypatch.setattr(loop, name, watched)

    watch("train_step", "train", 0)
    watch("validate", "validate", 0)
    watch("write_samples", "sample", 1)
    return seen


def test_it_is_switched_by_the_step(tmp_path, argv, states, capsys):
    changes = {"validation.every": 3, "validation.documents": 4, "samples.every": 3}
    assert main(argv(tmp_path / "run", **SPARSE | changes)) == 0
    warm, sparse = {False}, {True}
    assert states == [
        *[("train", warm)] * 3, ("validate", warm), ("sample", warm),
        *[("train", sparse)] * 3, ("validate", sparse), ("sample", sparse),
    ]  # fmt: skip
    assert "2:4 sparsity in 4 layers from step 4 on" in capsys.readouterr().out

    dense = SPARSE | changes | {"model.set": SIZES}
    assert main(argv(tmp_path / "dense", **dense)) == 0
    assert "2:4" not in capsys.readouterr().out
    a, b = ([r["loss"] for r in records(tmp_path / name)] for name in ("run", "dense"))
    assert a[:3] == pytest.approx(b[:3], rel=1e-6)
    assert all(abs(x - y) > 1e-6 for x, y in zip(a[3:], b[3:], strict=True))
    assert not any("sparsity" in r for r in records(tmp_path / "dense"))


def test_log_steps_say_what_is_dropped(tmp_path, argv):
    assert main(argv(tmp_path / "run", **SPARSE | {"train.steps": 7})) == 0
    found = {r["step"]: r["sparsity"] for r in records(tmp_path / "run") if "sparsity" in r}
    assert list(found) == [2, 4, 6, 7]
    for step, statistics in found.items():
        assert tuple(statistics) == STATISTICS and all(len(layers) == 4 for layers in statistics.values())
        if step <= 3:
            continue
        for name in STATISTICS:
            assert all(0 < value < 1 for value in statistics[name]), name
        assert all(0.3 < value < 0.7 for value in statistics["zeros"])  # about half of all at first
    scalars = dict(_scalars(records(tmp_path / "run")[-1]))
    assert scalars["sparsity_dropped/layer_3"] == found[7]["dropped"][3]
    page = (tmp_path / "run/report.html").read_text()
    assert "Sparsity of activations" in page and page.count("<svg") == 6


def test_sparse_from_the_start_and_never(tmp_path, argv, states, capsys):
    assert main(argv(tmp_path / "start", **SPARSE | {"sparsity.warmup_steps": 0, "train.steps": 2})) == 0
    assert [state for what, state in states if what == "train"] == [{True}] * 2
    states.clear()
    assert main(argv(tmp_path / "never", **SPARSE | {"sparsity.warmup_steps": 2, "train.steps": 2})) == 0
    assert [state for what, state in states if what == "train"] == [{False}] * 2
    said = capsys.readouterr().out
    assert "from step 1 on" in said and "never starts: sparsity.warmup_steps=2, train.steps=2" in said
    assert "Sparsity of activations" in (tmp_path / "never/report.html").read_text()


def test_accumulation(tmp_path, argv):
    """8 x 1 row against 1 x 8: forward passes agree; gradients do where no neighbouring tokens are compared."""
    exact = {"model.set": [*SPARSE["model.set"], "mlp_dense_features=1.0"], "sparsity.warmup_steps": 1}
    for name, changes in (("recipe", {}), ("exact", exact)):
        runs = []
        for rows in (8, 1):
            out = tmp_path / f"{name}{rows}"
            settings = {"train.micro_batch_size": rows, "train.steps": 2, "schedule.warmup_steps": 0}
            assert main(argv(out, **SPARSE | {"sparsity.warmup_steps": 0} | changes | settings)) == 0
            runs.append(records(out))
        for step, (a, b) in enumerate(zip(*runs, strict=True)):
            if name == "exact" or step == 0:
                assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            if name == "exact":
                assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        if name == "recipe":
            assert runs[0][0]["grad_norm"] != pytest.approx(runs[1][0]["grad_norm"], rel=1e-5)


def test_settings(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {overrides: {mlp_sparsity: 2:4}}\nsparsity: {warmup_steps: 7}\n")
    cfg = load_config(tmp_path / "run.yaml")
    assert cfg.model.overrides == {"mlp_sparsity": "2:4"} and cfg.sparsity.warmup_steps == 7
    assert load_config(None, ["--model.set", "mlp_sparsity=2:4"]).model.overrides == {"mlp_sparsity": "2:4"}
    assert load_config(None).sparsity.warmup_steps == 1000
    with pytest.raises(SidError, match=r"sparsity\.warmup_steps must be at least 0, got -1"):
        load_config(None, ["--sparsity.warmup_steps", "-1"])


def test_layers_are_measured_and_switched_in_place():
    mlps = [SquaredReLUFeedForward(8, 16, sparsity=sparsity) for sparsity in ("2:4", None, "2:4")]
    layers = sparse_layers(torch.nn.Sequential(*mlps))
    assert layers == [mlps[0], mlps[2]] and mlps[1].statistics is None
    switches = [layer.enabled for layer in layers]
    for step, sparse in enumerate((False, False, True, True)):
        switch(layers, step, SparsityConfig(warmup_steps=2))
        assert [layer.enabled.item() for layer in layers] == [sparse] * 2
    assert all(layer.enabled is one for layer, one in zip(layers, switches, strict=True)) and mlps[1].enabled.item()
    mlps[0].statistics.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0, float("nan")]))
    mlps[2].statistics.copy_(torch.tensor([6.0, 7.0, 8.0, 9.0, 10.0]))
    assert measured(None, layers, Processes()) == {
        "zeros": [1, 6], "dropped": [2, 7], "dropped_act_t": [3, 8], "dropped_dact_t": [4, 9], "threshold": [None, 10],
    }  # fmt: skip


def test_a_mistake_in_the_model_is_one_line(tmp_path, argv):
    with pytest.raises(SidError, match=r"model: mlp_sparsity '2:4' needs mlp_type 'squared_relu', got 'swiglu'"):
        main(argv(tmp_path / "run", **SPARSE | {"model.arch": "llama"}))


COMPILED = """
import torch
from sidlm.models import SidForCausalLM, preset
from sidlm.train import sparsity
from sidlm.train.config import SparsityConfig
from sidlm.train.processes import Processes

def run(compiled):
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=192)
    model = SidForCausalLM(preset("nano", mlp_sparsity="2:4", **sizes)).train()
    layers = sparsity.sparse_layers(model)
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    tokens = torch.randint(0, 97, (2, 24))
    found = []
    for step in range(4):
        sparsity.switch(layers, step, SparsityConfig(warmup_steps=2))
        model.zero_grad()
        model(tokens, shift_labels=tokens).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        found.append(sparsity.measured(model, layers, Processes()))
        if compiled:
            torch._dynamo.config.error_on_recompile = True
    return found

for plain, compiled in zip(run(False), run(True)):
    if isinstance(plain, dict):
        assert plain == compiled, (plain, compiled)
        print(plain["dropped"], plain["dropped_dact_t"])
    else:
        for a, b in zip(plain, compiled):
            torch.testing.assert_close(a, b)
"""


def test_compiled_blocks_are_not_compiled_anew_at_the_switch():
    # a process of its own: the shape checkers of these tests do not trace
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and "None" not in lines[2] + lines[3], done.stdout
