"""The ledger of time, slow processes, statistics of layers, profiles, Weights & Biases, the log of all ranks."""

import json
import math
import sys
import types

import pytest
import torch

from sidlm.errors import SidError
from sidlm.models import SidForCausalLM, preset
from sidlm.train import folder, ledger, sparsity, stragglers
from sidlm.train.health import files
from sidlm.train.layers import LayerStatistics, sums
from sidlm.train.ledger import Ledger, summary
from sidlm.train.loop import train
from sidlm.train.metrics import read_json_lines
from sidlm.train.processes import Processes
from sidlm.train.ranklog import RankLog, folded, spans
from sidlm.train.stragglers import Pace

SIZES = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=64)


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds) lets time pass for the ledger."""
    now = [1000.0]
    monkeypatch.setattr(ledger.time, "time", lambda: now[0])

    def go(seconds):
        now[0] += seconds

    return go


def one_start(out, clock, step, until, *, step_seconds=2.0):
    book = Ledger(out, step)
    clock(10)
    for number in range(step + 1, until + 1):
        book.at("data")
        clock(0.5)
        book.at("step", number)
        clock(8 if number == step + 1 else step_seconds)
    return book


def test_ledger_over_a_kill_and_a_corruption(tmp_path, clock):
    """What a killed start did again is no progress, and every second is somewhere."""
    book = one_start(tmp_path, clock, 0, 5)  # killed: no end, and nothing of what came after the last line
    book.at("data")
    clock(0.2)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "sp')  # half written
    clock(30)
    files.health_folder(tmp_path).mkdir()
    files.add_history(tmp_path, {"kind": "killed", "time": 1040.0, "line": "rank 2 was killed", "start": 1})
    with pytest.raises(SidError), one_start(tmp_path, clock, 2, 6) as book:
        raise SidError("silent corruption at step 6: rank 1")
    clock(5)
    with one_start(tmp_path, clock, 4, 8) as book:
        book.at("checkpoint")
        clock(3)
    found = summary(tmp_path)
    assert found.elapsed == pytest.approx(ledger.time.time() - 1000)
    # steps 2-5 of the first start; 6 of the second; 7, 8 of the third. 3 and 5 came first after a start
    assert found.seconds["step"] == pytest.approx(2.0 * 7)
    assert found.seconds["repeated"] == pytest.approx(2.0 * 3)  # 4, 5; 6
    assert found.seconds["first step"] == 24 and found.seconds["checkpoint"] == 3
    assert found.seconds["restart"] == pytest.approx(30.2 + 5)
    assert found.causes() == {"killed": (1, pytest.approx(30.2 + 10 + 8 + 4)), "silent corruption": (1, 5 + 10 + 8 + 2)}
    assert "2 interruptions: 1 killed (52 s), 1 silent corruption (25 s)" in found.line()
    assert math.isclose(found.effective, 14 / found.elapsed)
    assert [line["event"] for line in ledger.read(tmp_path)].count("start") == 3


def test_a_run_that_gets_more_steps_was_not_interrupted(tmp_path, clock):
    for first, last in ((0, 2), (2, 4)):
        with one_start(tmp_path, clock, first, last):
            pass
        clock(86400)
    assert not summary(tmp_path).interruptions and summary(tmp_path).seconds["restart"] == 0


def test_a_run_keeps_all_of_it(tmp_path, config, capsys):
    out = tmp_path / "run"
    changes = {"train.layer_stats_every": 3, "train.profile.start": 2, "train.profile.steps": 2}
    changes |= {"train.memory_snapshot.start": 2, "train.memory_snapshot.steps": 1}
    train(config(out, **changes))
    said, log = capsys.readouterr().out, (out / "log.txt").read_text()
    line = "train.memory_snapshot needs CUDA: the memory of cpu has no history"
    assert line in said and f" rank 0 INFO {line}" in log
    assert said.splitlines()[-1].startswith("effective training time ")
    assert log.splitlines()[-1].endswith(" ".join(said.splitlines()[-1].split()))
    assert "Effective training time" in (out / "report.html").read_text()
    trace = json.loads((out / "profile/rank-0.json").read_text())
    assert any("aten::mm" in event.get("name", "") for event in trace["traceEvents"])
    records = read_json_lines(out / "metrics.jsonl")
    assert [record["step"] for record in records if "layers" in record] == [3, 6, 8]
    assert len(records[2]["layers"]["output"]["rms"]) == 4
    assert all(value > 0 for value in records[2]["layers"]["gradient"]["max"].values())


def test_statistics_of_layers_are_those_of_the_tensors():
    torch.manual_seed(0)
    model = SidForCausalLM(preset("nano", **SIZES)).train()
    watch, kept = LayerStatistics(model, Processes()), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: kept.append(out.detach()))
    tokens = torch.randint(0, 97, (2, 24))
    watch.begin(True)
    model(tokens, shift_labels=tokens).loss.backward()
    model.lm_head.weight.grad[3] = torch.nan
    watch.gradients()
    found = watch.result()
    assert found["output"]["rms"] == pytest.approx([x.square().mean().sqrt().item() for x in kept])
    assert found["output"]["max"] == pytest.approx([x.abs().max().item() for x in kept])
    head = next(name for name, p in model.named_parameters() if p is model.lm_head.weight)
    assert found["gradient"]["nonfinite"][head] == pytest.approx(1 / 97)
    down = model.model.layers[0].mlp.down_proj.weight.grad
    name = "model.layers.0.mlp.down_proj.weight"
    assert found["gradient"]["rms"][name] == pytest.approx(down.square().mean().sqrt().item())
    watch.begin(False)
    model(tokens, shift_labels=tokens)
    assert not watch.outputs


def test_sums_of_what_is_not_finite():
    x = torch.tensor([3.0, 0.0, torch.inf, -4.0, torch.nan], dtype=torch.bfloat16)
    assert sums(x).tolist() == [25.0, 5.0, 1.0, 2.0, 4.0]
    assert sums(torch.empty(0, 3)).tolist() == [0.0] * 5


def test_sparsity_of_all_stages():
    """Two stages that interleave: layers 0 and 2 here, 1 and 3 there."""
    model = SidForCausalLM(preset("nano", mlp_sparsity="2:4", **SIZES | {"num_hidden_layers": 4}))
    layers = sparsity.sparse_layers(model)
    for index, layer in enumerate(layers):
        layer.statistics = torch.full((5,), float(index))
    for index in (1, 3):
        model.model.layers[index] = torch.nn.Identity()
    own, others = [layers[0], layers[2]], [(1, [1.0] * 5), (3, [3.0] * 5)]
    stages = types.SimpleNamespace(size=lambda: 2)
    group = types.SimpleNamespace(mesh={"pp": stages}, everyone=lambda rows: [rows, others])
    assert sparsity.measured(model, own, group)["zeros"] == [0.0, 1.0, 2.0, 3.0]


class Four:
    """Four processes, seen from one."""

    count, rank, mesh = 4, 2, None

    def __init__(self, local):
        self.local = local

    def numbers(self, values):
        return [[seconds, *values[1:]] for seconds in self.local]

    def everyone(self, value):
        hosts = ["here", "there", "elsewhere", "nowhere"]
        return hosts if isinstance(value, str) else [(host, *value[1:]) for host in hosts]


def test_a_slow_process_is_named_once():
    group = Four([1.0, 1.0, 1.0, 1.0])
    pace, said = Pace(torch.nn.Identity(), group, torch.device("cpu")), []
    pace.step_done(9.0, 1, 0.0)  # the first one compiles
    slow, well = [1.0, 1.1, 1.8, 0.9], [1.0, 1.1, 1.2, 0.9]
    for local in (well, slow, slow, slow, well, slow, well):
        group.local = local
        for _ in range(5):
            pace.step_done(2.0, 80, 0.25)
        numbers, line, rank = pace.report()
        said.append((line, rank))
    assert numbers["tokens_per_second"] == [10.0] * 4 and numbers["mfu"] == [0.25] * 4
    line = (
        "rank 2 (elsewhere) is slow: 1.8x the median of its peers over the last 10 steps, 800 ms of a step of 2000 ms"
    )
    nothing = (None, -1)
    assert said == [nothing, nothing, (line, 2), (None, 2), ("rank 2 is no longer slow", -1), nothing, nothing]


@pytest.fixture
def pace(monkeypatch):
    """pace(seconds by itself, seconds of the step): rank 2's, after five steps of 0.1 of 0.5 s."""
    recorded = [{"name": "all_reduce", "number": i, "group": "dp_shard", "time": 100.0 + t}
                for i, t in enumerate([0.1, 0.2, 3.2, 3.3])]  # fmt: skip
    monkeypatch.setattr(stragglers.dump, "collectives", lambda last: recorded)
    monkeypatch.setattr(stragglers.time, "time", lambda: 103.4)
    one = Pace(torch.nn.Identity(), Four([0.1, 0.1, 3.0, 0.1]), torch.device("cpu"))

    def step(own, seconds):
        one.seconds = own
        one.step_done(seconds, 80, 0.25)

    for own in (9.0, 0.1, 0.1, 0.1, 0.1, 0.1):
        step(own, 0.5)
    assert not one.held_up
    return one, step


def test_who_holds_up_a_single_step_is_named_at_once(pace):
    one, step = pace
    step(3.0, 3.4)
    assert one.held_up
    assert one.judge_step(57) == (
        "rank 2 (elsewhere) is slow: it took 3.00 s by itself in step 57, the median of its peers is 0.10 s, and came "
        "late to all_reduce #2 (dp_shard)", 2
    )  # fmt: skip
    one.group.local = [3.0, 2.9, 3.0, 3.1]  # all of them were slow
    assert one.judge_step(57) == (None, -1)
    step(0.1, 0.5)
    assert not one.held_up


@pytest.mark.parametrize(("own", "seconds"), [(0.9, 1.3), (0.1, 5.0)])
def test_a_step_that_a_process_does_not_hold_up(pace, own, seconds):
    """A hiccup of less than a second; a step in which it waited for others."""
    one, step = pace
    step(own, seconds)
    assert not one.held_up


def test_steps_as_long_as_usual_hold_nobody_up(pace):
    one, step = pace
    for _ in range(64):
        step(2.0, 4.0)
    step(3.9, 6.0)
    assert not one.held_up
    step(4.1, 6.0)
    assert one.held_up
    one.named = 2  # it is known to be slow
    step(4.1, 6.0)
    assert not one.held_up


def test_lines_of_many_ranks_are_one(tmp_path):
    with RankLog(tmp_path, 3) as third, RankLog(tmp_path, 0) as first:
        for log in (third, first):
            log.note("hello\n  all")
        first.note("hello all")
        third.note("only me", "WARNING")
    lines = [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines[0] == "ranks 0,3 INFO hello all"
    assert sorted(lines[1:]) == ["rank 0 INFO hello all", "rank 3 WARNING only me"]
    with RankLog(tmp_path, 0) as again:
        again.note("later")
    assert (tmp_path / "log.txt").read_text().count("hello") == 2
    assert spans([5, 0, 1, 2, 9, 8]) == "0-2,5,8-9"
    assert folded([(1, "2026-01-01 00:00:01.000 INFO b"), (0, "2026-01-01 00:00:00.999 INFO a")])[0].endswith("a")


def test_weights_and_biases(tmp_path, config, monkeypatch):
    from sidlm.train import config as settings

    with pytest.raises(SidError, match=r"train.wandb=sid: wandb is not installed here; pip install 'sidlm\[wandb\]'"):
        monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
        config(tmp_path / "run", **{"train.wandb": "sid"})
    logged, begun = [], []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda exit_code: logged.append(exit_code)
    )
    fake = types.SimpleNamespace(init=lambda **how: begun.append(how) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: fake)
    for steps in (2, 3):
        train(config(tmp_path / "run", **{"train.wandb": "sid", "train.steps": steps, "checkpoint.every": 1}))
    assert [entry if isinstance(entry, int) else entry[0] for entry in logged] == [1, 2, 0, 3, 0]
    assert "loss/train" in logged[0][1] and begun[0]["config"]["train"]["steps"] == 2
    assert begun[0]["id"] == begun[1]["id"] and begun[1]["resume"] == "allow" and begun[0]["project"] == "sid"
    assert not (tmp_path / "run/wandb").exists() and folder.find_resume(config(tmp_path / "run")).step == 3
