"""Batch and mix by tokens, annealing with averaging, spikes, Muon: numbers, and that a run cut anywhere is the same."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sidlm.cli.train import main
from sidlm.data.phases import Phase, last_steps, phase_at, plan_phases, tokens_before
from sidlm.errors import SidError
from sidlm.train import checkpoint, loop, train_step
from sidlm.train.config import load_config
from sidlm.train.metrics import read_json_lines
from sidlm.train.optim import make_optimizer, set_learning_rate
from sidlm.train.schedule import ScheduleConfig, learning_rate
from sidlm.train.spikes import SpikeConfig, SpikeGuard

LLAMA3 = [(252_000_000, {"batch_size": 1024, "seq_len": 8192}), (2_870_000_000_000, {"batch_size": 2048})]


def test_llama_3_phases():
    first = Phase(first_step=0, tokens=0, batch_size=1024, seq_len=4096)
    phases = plan_phases(first, LLAMA3)
    assert [p.step_tokens for p in phases] == [2**22, 2**23, 2**24]
    assert phases[1].first_step == math.ceil(252e6 / 2**22) == 61
    for phase, tokens in zip(phases[1:], (252_000_000, 2_870_000_000_000), strict=True):
        assert tokens <= phase.tokens < tokens + 2**23
    walked, step = 0, 0
    while step < 70:
        assert tokens_before(phases, step) == walked
        walked, step = walked + phase_at(phases, step).step_tokens, step + 1
    total = phases[2].first_step + 100
    assert last_steps(phases, total, 2**24 * 10) == 10 and last_steps(phases, total, 2**24 * 10 + 1) == 11
    assert last_steps(phases, total, 10**20) == total


def test_annealing_falls_to_zero():
    cfg = ScheduleConfig(warmup_steps=2, floor=0.1)
    rates = [learning_rate(s, cfg, peak=1.0, total_steps=20, anneal_steps=5) for s in range(20)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[15] == pytest.approx(0.1)
    assert rates[15:] == pytest.approx([0.1 * (5 - i) / 5 for i in range(5)])
    assert all(a >= b for a, b in itertools.pairwise(rates[2:]))
    long = ScheduleConfig(warmup_steps=0, floor=0.01, cosine_steps=100)
    assert learning_rate(50, long, peak=1.0, total_steps=60) == pytest.approx(0.01 + 0.99 / 2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sources whose words tell them apart."""
    place = tmp_path_factory.mktemp("sources")
    for name in "ab":
        (place / name).mkdir()
        for i in range(40):
            words = (f"{name}{(i * 7 + j * 3) % 50}" for j in range(20 + i))
            (place / name / f"{i}.txt").write_text(" ".join(words))
    return [f"{place}/a=3", f"{place}/b=0"]


def tensors(out):
    found = checkpoint.newest_good(out / "checkpoints")
    stored = checkpoint.SafeReader(found.path / "tensors").read_metadata().state_dict_metadata
    into = {name: torch.zeros(m.size, dtype=m.properties.dtype) for name, m in stored.items()}
    checkpoint.load(found, into)
    return into


def die_at(step):
    def on_step(record):
        if record["step"] == step:
            raise KeyboardInterrupt

    return on_step


def changes(sources, **more):
    return {"data.train": sources, "train.batch_size": 4, "data.seq_len": 16, "train.steps": 9,
            "recipe.batch": ["128:4x32", "384:8x32"], "recipe.mix": ["256:1,1", "700:0,1"],
            "schedule.anneal_tokens": 700, "schedule.average_every": 2, "checkpoint.every": 1, "samples.prompts": [],
            "spikes.threshold": 8, "spikes.window": 4} | more  # fmt: skip


def test_no_text_is_read_twice_or_left_out(tmp_path, argv, sources):
    """Over all phases each source's rows are one unbroken line, in the order in which the run reads them."""
    from sidlm.train.build import open_text

    cfg = load_config(None, argv(tmp_path, **changes(sources)))
    loader = open_text(cfg, resumed=False).loader
    dataset = loader.loaders[0].dataset
    shapes, read = [], {0: set(), 1: set()}
    for step in range(9):
        batch, phase = loader.batch(step), phase_at(loader.phases, step)
        shapes.append(tuple(batch.tokens.shape))
        part = loader.loaders[loader.phases.index(phase)]
        first = (step - phase.first_step) * phase.batch_size
        owners, rows = part.dataset.mixture.assign(np.arange(first, first + phase.batch_size), cfg.train.seed)
        for owner, row in zip(owners, rows, strict=True):
            start = part.dataset.offsets[owner] + row * phase.seq_len
            own = set(range(start, start + phase.seq_len))
            assert not own & read[owner]
            read[owner] |= own
    assert shapes == [(4, 16)] * 2 + [(4, 32)] * 2 + [(8, 32)] * 5
    assert len(dataset.streams) == 2 and all(read.values())
    for positions in read.values():
        # the samples of one step are shuffled among sources, but none has a gap at a change of phase
        assert len(positions) >= 0.9 * (max(positions) + 1)
    assert phase_at(loader.phases, 8).weights == (0.0, 1.0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, argv, sources):
    out = tmp_path_factory.mktemp("recipe") / "whole"
    assert main(argv(out, **changes(sources))) == 0
    return out


@pytest.mark.parametrize("death", [2, 4, 7, 8])
def test_resume_is_bitwise_across_every_change(tmp_path, argv, sources, whole, death):
    words = argv(tmp_path / "cut", **changes(sources, **{"checkpoint.every": 2}))
    with pytest.raises(KeyboardInterrupt):
        loop.train(load_config(None, words), on_step=die_at(death))
    assert main(words) == 0
    one, two = tensors(whole), tensors(tmp_path / "cut")
    assert one.keys() == two.keys() and any(name.startswith("average.") for name in one)
    assert all(torch.equal(one[name], two[name]) for name in one)
    exported = [load_file(out / "model/model.safetensors") for out in (whole, tmp_path / "cut")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_the_exported_model_is_the_mean(tmp_path, argv, sources, whole):
    """Of the weights after every second step of the annealing, sampled by hand."""
    live, seen = {}, {}
    real = loop.make_optimizer
    loop.make_optimizer = lambda model, *more: live.update(model.named_parameters()) or real(model, *more)
    try:
        loop.train(
            load_config(None, argv(tmp_path / "run", **changes(sources))),
            on_step=lambda r: seen.update({r["step"]: {n: p.detach().clone() for n, p in live.items()}}),
        )
    finally:
        loop.make_optimizer = real
    records = read_json_lines(tmp_path / "run/metrics.jsonl")
    assert [r["step_tokens"] for r in records] == [64] * 2 + [128] * 2 + [256] * 5
    first = 9 - 3  # 700 tokens need three steps of 256
    exported = load_file(tmp_path / "run/model/model.safetensors")
    assert set(tensors(tmp_path / "run")) >= {f"average.{name}" for name in live}
    for name, value in exported.items():
        mean = torch.stack([seen[step + 1][name].double() for step in range(first, 9, 2)]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(exported[name], seen[9][name]) for name in exported)


def test_micro_batches_change_nothing_in_any_phase(tmp_path, argv, sources, whole):
    assert main(argv(tmp_path / "run", **changes(sources, **{"train.micro_batch_size": 2}))) == 0
    for a, b in zip(*(read_json_lines(out / "metrics.jsonl") for out in (whole, tmp_path / "run")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=3e-6)


def test_the_past_is_fixed_and_the_future_is_not(tmp_path, argv, sources):
    words = changes(sources, **{"train.steps": 4, "schedule.anneal_tokens": 0, "schedule.average_every": 0})
    assert main(argv(tmp_path / "run", **words)) == 0
    assert main(argv(tmp_path / "run", **words | {"train.steps": 5, "recipe.mix": ["256:1,1", "800:0,1"]})) == 0
    with pytest.raises(SidError, match=r"is at step 5, and recipe\.batch and recipe\.mix say otherwise"):
        main(argv(tmp_path / "run", **words | {"train.steps": 6, "recipe.batch": ["128:8x16"]}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"recipe.batch": ["soon:4x8"]}, r"recipe.batch: 'soon:4x8' is not TOKENS:ROWSxLENGTH"),
        ({"recipe.batch": ["1K:0x8"]}, "whole numbers above 0"),
        ({"recipe.mix": ["1K:1,2"]}, "has 2 numbers behind the colon, not 1"),
        ({"schedule.average_every": 1}, "needs schedule.anneal_tokens"),
        ({"spikes.window": 1}, "spikes.window must be at least 2"),
    ],
)
def test_mistakes(tmp_path, argv, setting, message):
    with pytest.raises(SidError, match=message):
        main(argv(tmp_path, **setting))


def test_a_spike_is_left_out(tmp_path, argv, monkeypatch):
    """A gradient of a thousand times the usual size changes nothing, is logged, and the run goes on."""
    real, calls = train_step.clip_gradients, iter(range(1, 1000))

    def clip(parameters, max_norm, *more):
        parameters = list(parameters)
        if next(calls) in (20, 22):
            for p in parameters:
                p.grad *= 1000
        return real(parameters, max_norm, *more)

    monkeypatch.setattr(train_step, "clip_gradients", clip)
    assert main(argv(tmp_path, **{"train.steps": 24, "spikes.threshold": 10, "checkpoint.every": 0})) == 0
    skipped = {r["step"]: r["skipped"] for r in read_json_lines(tmp_path / "metrics.jsonl") if "skipped" in r}
    assert set(skipped) == {20, 22} and "spike: the gradient norm is" in skipped[20]
    state = checkpoint.newest_good(tmp_path / "checkpoints").state["spikes"]
    assert state["total"] == 2 and len(state["recent"]) == 22


def test_the_guard_follows_a_new_level_and_is_bounded():
    guard = SpikeGuard(SpikeConfig(threshold=5, window=32, max_in_a_row=3, max_total=4))
    rng = np.random.default_rng(0)
    assert not any(guard.judge(3 + 0.05 * float(rng.normal()), 1.0) for _ in range(40))
    assert [bool(guard.judge(6.0, 1.0)) for _ in range(6)] == [True] * 3 + [False] * 3
    assert guard.state["total"] == 4
    assert not any(guard.judge(6.0, 1.0) for _ in range(40)) and guard.judge(60.0, 1.0) is None
    assert SpikeGuard(SpikeConfig()).judge(1e9, 1e9) is None


def test_muon_is_the_formula(config, tmp_path):
    """Three steps against Newton-Schulz in plain torch for matrices and AdamW for the rest."""
    from sidlm.models import SidForCausalLM, preset

    torch.manual_seed(0)
    model = SidForCausalLM(preset("nano", vocab_size=64, hidden_size=32, head_dim=16, num_attention_heads=2))
    cfg = config(tmp_path, **{"optim.name": "muon", "optim.down_proj_lr_scale": 0.5}).optim
    optimizer = make_optimizer(model, cfg)
    mine = {name: p.detach().clone() for name, p in model.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in mine.items()}
    matrices = {n for n, p in mine.items() if p.ndim == 2 and ".layers." in n}
    set_learning_rate(optimizer, cfg.lr)
    other = torch.nn.ParameterDict({n.replace(".", "/"): p.clone() for n, p in mine.items() if n not in matrices})
    adamw = torch.optim.AdamW([
        {"params": [p for p in other.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in other.values() if p.ndim < 2], "weight_decay": 0.0},
    ], lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)  # fmt: skip
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if name not in matrices:
                other[name.replace(".", "/")].grad = p.grad.clone()
                continue
            buffer = momentum[name].lerp_(p.grad, 1 - cfg.muon_momentum)
            x = p.grad.lerp(buffer, cfg.muon_momentum).bfloat16()
            tall = x.shape[0] > x.shape[1]
            x = x.T if tall else x
            x = x / x.norm().clamp(min=1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
            x = x.T if tall else x
            lr = cfg.lr * (0.5 if ".down_proj" in name else 1.0)
            mine[name].mul_(1 - lr * cfg.weight_decay).sub_(lr * 0.2 * max(p.shape) ** 0.5 * x.float())
        optimizer.step()
        adamw.step()
    for name, p in model.named_parameters():
        if name in matrices:  # bf16 products in another order
            torch.testing.assert_close(p.detach(), mine[name], rtol=0, atol=0.1 * cfg.lr * 0.2 * max(p.shape) ** 0.5)
        else:
            torch.testing.assert_close(p.detach(), other[name.replace(".", "/")].detach(), rtol=1e-5, atol=1e-7)


def test_muon_through_the_command_line(tmp_path, argv):
    """It learns, and a run that was cut goes on with its momentum, bit for bit."""
    words = {"optim.name": "muon", "train.steps": 6}
    assert main(argv(tmp_path / "whole", **words)) == 0
    with pytest.raises(KeyboardInterrupt):
        loop.train(load_config(None, argv(tmp_path / "cut", **words)), on_step=die_at(3))
    assert main(argv(tmp_path / "cut", **words)) == 0
    one, two = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert any(name.endswith("momentum_buffer") for name in one) and any(name.endswith("exp_avg") for name in one)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    losses = [r["loss"] for r in read_json_lines(tmp_path / "whole/metrics.jsonl")]
    assert losses[-1] < losses[0]
