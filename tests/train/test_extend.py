"""Context extension: its gate, going on after a gate that is not passed, after a kill, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.extend import main
from sidlm.cli.train import main as train
from sidlm.errors import SidError
from sidlm.models import SidForCausalLM
from sidlm.train import extend as extension
from sidlm.train import loop
from sidlm.train.extend import Stage, load_extension, read_stages
from sidlm.train.metrics import read_json_lines

STAGES = ["384:4x96", "512:2x128@20000"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, argv):
    out = tmp_path_factory.mktemp("base") / "run"
    assert train(argv(out, **{"train.steps": 2, "samples.prompts": []})) == 0
    return out


@pytest.fixture
def words(base, argv):
    """words(out, **changes) -> the command line of an extension in two stages of one and two steps."""

    def make(out, **changes):
        settings = {"model.init_from": base, "model.set": ["simplicial_window=[8,4]"], "extend.stages": STAGES,
                    "extend.depths": 2, "extend.repeats": 1, "samples.prompts": []}  # fmt: skip
        found = argv(out, **settings | changes)
        at = found.index("--data.vocab_size")
        return found[:at] + found[at + 2 :]  # the tokenizer is the base's

    return make


@pytest.fixture
def gates(monkeypatch):
    """gates(loss, recall, loss, recall, ...): what is measured instead, before the extension and then by each gate."""

    def give(*numbers):
        left = list(zip(numbers[::2], numbers[1::2], strict=True))

        def measured(run, group, length=0, gate=None):
            loss, recall = left.pop(0)
            found = {"loss": loss, "bits_per_byte": loss}
            return found | ({"needles": {"recall": recall, "depth 0.50": recall}} if gate else {})

        monkeypatch.setattr(extension, "measured", measured)
        return left

    return give


def record(out):
    return json.loads((out / "extend.json").read_text())


def test_llama_3_in_six_stages():
    """The configs read, have six stages up to 128K, about 800B tokens, and steps of 16M tokens."""
    for name in ("8b", "70b", "405b"):
        cfg = load_extension(f"configs/extend-{name}.yaml")
        stages = read_stages(cfg)
        assert len(stages) == 6 and stages[-1].length == 131072 and cfg.data.seq_len == 8192
        assert sum(stage.tokens for stage in stages) == 800_000_000_000
        assert all(abs(stage.rows * stage.length / 2**24 - 1) < 0.02 for stage in stages)


def test_stages_are_read(base, words, tmp_path):
    cfg = load_extension(None, words(tmp_path))
    assert read_stages(cfg) == [Stage(STAGES[0], 384, 4, 96, None), Stage(STAGES[1], 512, 2, 128, 20000.0)]
    assert [stage.steps for stage in read_stages(cfg)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extend.stages": []}, "extend.stages is empty"),
        ({"extend.stages": ["1K:4x32"]}, "'1K:4x32' has rows of 32 tokens, no longer than 32 before it"),
        ({"extend.stages": ["1K:4x96", "1K:4x64"]}, "rows of 64 tokens, no longer than 96 before it"),
        ({"extend.stages": ["1K:0x96"]}, "whole numbers above 0"),
        ({"extend.stages": ["1K:4x96@big"]}, "'big' as RoPE's base, which is no number"),
        ({"extend.stages": ["1K-4x96"]}, r"is not TOKENS:ROWSxLENGTH\[@THETA\]"),
        ({"extend.attempts": 0}, "extend.attempts must be at least 1, got 0"),
        ({"recipe.batch": ["1K:4x96"]}, "recipe.batch and extend.stages both say"),
        ({"model.init_from": ""}, "model.init_from is empty"),
        ({"data.valid_fraction": 0}, "the gate needs held-out text"),
        ({"extend.stages": ["1K:4x40"]}, "a needle and its question need"),
    ],
)
def test_mistakes(words, tmp_path, change, message):
    with pytest.raises(SidError, match=message):
        main(words(tmp_path / "run", **change))


def test_a_gate_that_is_not_passed(words, tmp_path, gates, capsys):
    """Loss first, then needles: the stage has its tokens once more each time; in the end the model is the last one."""
    left = gates(3.0, 0, 3.02, 1, 3.005, 0.5, 3.01, 1, 2.0, 1)
    assert main(words(tmp_path / "run")) == 0 and not left
    found = record(tmp_path / "run")
    assert [len(stage["gates"]) for stage in found["stages"]] == [3, 1]
    assert [gate["tokens"] for gate in found["stages"][0]["gates"]] == [384, 768, 1152]
    assert [stage["passed"] for stage in found["stages"]] == [True, True]
    assert [r["tokens"] for r in read_json_lines(tmp_path / "run/stage-1/metrics.jsonl")] == [384, 768, 1152]
    said = capsys.readouterr().out
    assert "loss in rows of 32 tokens is 3.0200, which was 3.0000 before the extension and may be 3.0100" in said
    assert "50% of the needles are found (50% at depth 0.50)" in said and "done: 2 stages have passed" in said
    configs = [SidForCausalLM.from_pretrained(tmp_path / f"run/stage-{n}/model").config for n in (1, 2)]
    assert [c.rope_parameters["rope_theta"] for c in configs] != [20000.0] * 2
    assert configs[1].rope_parameters["rope_theta"] == 20000.0


def test_it_stops_in_the_end_and_goes_on_with_more_attempts(words, tmp_path, gates, capsys):
    gates(3.0, 0, 3.0, 0.5, 4.0, 0.5)
    command = words(tmp_path / "run", **{"extend.attempts": 2})
    message = r"stage 1 \(96 tokens\) has not passed its gate after 2 attempts and 768 tokens: the loss .* is 4.0000"
    with pytest.raises(SidError, match=message):
        main(command)
    gates()  # nothing is measured, nor trained
    with pytest.raises(SidError, match=message):
        main(command)
    left = gates(3.0, 1, 3.0, 1)
    assert main(words(tmp_path / "run", **{"extend.attempts": 3})) == 0 and not left
    assert [len(stage["gates"]) for stage in record(tmp_path / "run")["stages"]] == [3, 1]


def test_it_goes_on_bit_for_bit_wherever_it_ends(words, tmp_path, gates, monkeypatch):
    """In the middle of a stage, between a stage and its gate, and when all is done."""
    numbers = (3.0, 0, 3.0, 1, 3.0, 0.9, 3.0, 1)
    gates(*numbers)
    assert main(words(tmp_path / "whole")) == 0
    cut = words(tmp_path / "cut", **{"checkpoint.every": 1})
    left = gates(*numbers)
    real, count = loop.train_step, iter(range(100))

    def die(*args):
        if next(count) in (2, 4):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "train_step", die)
    gate_of = extension.gate_of
    ends = iter([True, False, True, False, False])

    def gate(*args):
        if next(ends):
            raise KeyboardInterrupt
        return gate_of(*args)

    monkeypatch.setattr(extension, "gate_of", gate)
    deaths = 0
    while left:
        try:
            assert main(cut) == 0
        except KeyboardInterrupt:
            deaths += 1
    assert deaths == 4
    assert record(tmp_path / "cut")["stages"] == record(tmp_path / "whole")["stages"]
    for number in (1, 2):
        models = [load_file(tmp_path / f"{name}/stage-{number}/model/model.safetensors") for name in ("whole", "cut")]
        assert all(torch.equal(models[0][key], value) for key, value in models[1].items())
    monkeypatch.setattr(loop, "train_in", None)
    assert main(cut) == 0  # nothing is left to do


def test_what_has_passed_is_fixed(words, tmp_path, gates):
    gates(3.0, 0, 3.0, 1, 3.0, 1)
    assert main(words(tmp_path / "run")) == 0
    with pytest.raises(SidError, match="stage 1, which has passed, is 384:4x96 there and 384:2x96 here"):
        main(words(tmp_path / "run", **{"extend.stages": ["384:2x96", STAGES[1]]}))
    with pytest.raises(SidError, match="stage 2, which has passed, is 512:2x128@20000 there and not there here"):
        main(words(tmp_path / "run", **{"extend.stages": STAGES[:1]}))
    with pytest.raises(SidError, match=r"validation\.documents is 64 there and 3 here"):
        main(words(tmp_path / "run", **{"validation.documents": 3}))
    gates(3.0, 1)
    assert main(words(tmp_path / "run", **{"extend.stages": [*STAGES, "1K:1x160"]})) == 0  # one more may follow


def test_the_gate_measures_what_evaluate_does(words, tmp_path, base, capsys):
    """The loss before is that of the model in short rows, and no needle is found by a model of two steps."""
    with pytest.raises(SidError, match="0% of the needles are found"):
        main(words(tmp_path / "run", **{"extend.attempts": 1, "extend.tolerance": 10, "extend.stages": ["384:4x96"]}))
    from sidlm.cli.evaluate import main as evaluate

    assert evaluate([str(base), "--json", str(tmp_path / "base.json")]) == 0
    assert evaluate([str(tmp_path / "run/stage-1"), "--needle", "96", "--json", str(tmp_path / "needle.json")]) == 0
    found, expected = record(tmp_path / "run"), json.loads((tmp_path / "base.json").read_text())
    assert found["before"]["loss"] == pytest.approx(expected["data"]["all"]["nll_per_token"], rel=1e-5)
    assert found["stages"][0]["gates"][0]["needles"]["recall"] == 0.0
    assert json.loads((tmp_path / "needle.json").read_text())["needle"]["96"]["recall"] == 0.0
