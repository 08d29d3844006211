"""The study's cells are pairs of equal parameters, and its statistics are right on numbers with known answers."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _token_cells as cells
import _token_statistics as statistics

from sidlm.models.flops import num_parameters, train_flops_per_token


def test_variants_of_a_size_have_equal_parameters():
    for size in ("xs", "s", "m", "l"):
        made = {
            v: cells.recipe(cells.Cell(group="", size=size, variant=v, seeds=(0,), lengths=(9,))).config
            for v in cells.VARIANTS
        }
        base = num_parameters(made["full"], non_embedding=True)
        for name, config in made.items():
            if name != "deeper":
                assert abs(num_parameters(config, non_embedding=True) / base - 1) < 0.01, (size, name)
        ratio = train_flops_per_token(made["deeper"], 1024) / train_flops_per_token(made["trilinear"], 1024)
        assert 0.9 < ratio < 1.1


def test_the_plan_has_each_cell_once_and_whole_seeds():
    plan = cells.plan()
    names = [cell.name for cell in plan]
    assert len(set(names)) == len(names)
    core = {(c.size, c.variant, c.seeds, c.lengths) for c in plan if c.group == "core"}
    lengths = tuple(128 * millions for millions in cells.LENGTHS)
    assert core >= {(s, v, (0, 1, 2, 3), lengths) for s in ("xs", "s", "m", "l") for v in cells.CORE}
    started = [c for c in plan if c.group in ("core", "search", "ablation", "cheap")]
    assert {tuple(sorted(c.seeds)) for c in started} == {(0, 1, 2, 3), (0,), (1,), (2,), (3,)}


def test_the_search_finds_what_is_best_at_equal_flops():
    def row(variant, tokens, loss, cost):
        place = {"size": "s", "lr": 1.0, "batch": 8, "repeat": 0, "seed": 0}
        return place | {"variant": variant, "tokens": tokens, "loss": loss, "flops": cost * tokens}

    found = [row("full", n, 9 * n**-0.1, 1.0) for n in (1_000, 2_000, 4_000)]
    assert cells.best(found, "s", 8) is None
    dear, cheap = cells.SEARCH[:2]
    for n, better in ((1_000, 1.3), (2_000, 1.2)):
        found += [row(dear, n, 9 * (better * n) ** -0.1, 1.25), row(cheap, n, 9 * (1.01 * n) ** -0.1, 1.0)]
    found.append(row(dear, 4_000, 1.0, 1.25))  # reached by one alone
    assert cells.best(found, "s", 8) == cheap and cells.best(found[:-1], "s", 4) is None


def rows(values):
    base = {"size": "s", "steps": 1, "batch": 16, "lr": 1.0, "repeat": 0}
    return [base | {"variant": v, "seed": s, "loss": x, "tokens": 1} for (v, s), x in values.items()]


def test_pairs_and_intervals():
    found = statistics.differences(
        rows({("full", 0): 3.0, ("full", 1): 4.0, ("full", 2): 9.0, ("a", 0): 2.9, ("a", 1): 3.7}), "a", "full"
    )
    assert found == pytest.approx([-0.1, -0.3])
    mean = statistics.mean(found)
    assert mean.value == pytest.approx(-0.2) and mean.half == pytest.approx(12.7062 * 0.1, rel=1e-4)
    groups = [[1.0, 3.0], [0.0, 2.0]]
    assert statistics.common_spread(groups) == (pytest.approx(math.sqrt(2)), 2)
    pooled = statistics.pooled(groups, math.sqrt(2), 2)
    assert pooled.value == 1.5 and pooled.half == pytest.approx(4.3027 * math.sqrt(2) / 2, rel=1e-4)


def test_tokens_saved_is_the_inverse_of_a_power_law():
    slope = statistics.Mean(-0.25, 0.0, 3)
    share, low, high = statistics.tokens_saved(statistics.Mean(0.25 * math.log(0.8), 0.01, 3), slope)
    assert share == pytest.approx(0.2) and low < share < high


def test_seeds_needed():
    assert statistics.seeds_needed(0.02, 0.02) == 7  # t(6) 2.447 / sqrt(7) is the first below 1


def test_the_next_cell_is_the_first_that_fits_in_the_time():
    import time
    from argparse import Namespace
    from collections import defaultdict

    import token_efficiency

    large, small = (cells.Cell(group="core", size=s, variant="full", seeds=(0,), lengths=(1000,)) for s in ("l", "xs"))
    pool = token_efficiency.Pool.__new__(token_efficiency.Pool)
    pool.args, pool.queue, pool.retries = Namespace(workers=1), [large, small], []
    pool.factors = defaultdict(list)
    pool.factors["l"] += [1000.0, 1000.0]
    pool.factors["xs"].append(1.0)
    pool.end = time.monotonic() + token_efficiency.OVERHEAD + 2 * cells.cost(small)
    assert pool.next() == (small, 0) and pool.next() is None and pool.queue == [large]
    pool.factors["l"] = [0.0]
    pool.retries, pool.queue = [(large, 1)], []
    assert pool.next() == (large, 1)


def test_seeds_together_are_what_training_computes_for_each(tmp_path):
    import torch
    from _token_seeds import SeedRun
    from safetensors.torch import load_file

    from sidlm.train.build import build_model, open_text
    from sidlm.train.config import load_config
    from sidlm.train.loop import train

    text = tmp_path / "text.txt"  # one document, so that no row holds two
    text.write_text(" ".join(f"{i * j % 97} is {j} of {i}." for i in range(12) for j in range(200)))
    fields = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "num_hidden_layers": 4}
    words = ["--model.preset", "nano", "--model.set", *(f"{k}={v}" for k, v in fields.items())]
    words += ["--data.train", str(text), "--data.vocab_size", "520", "--data.seq_len", "48"]
    words += ["--data.valid_fraction", "0", "--validation.every", "0"]
    words += ["--data.cache_dir", str(tmp_path / "cache"), "--train.batch_size", "2", "--train.device", "cpu"]
    words += ["--train.compile", "off", "--optim.name", "muon", "--optim.embedding_lr_scale", "10"]
    words += ["--optim.lr", "0.01", "--schedule.floor", "1", "--schedule.warmup_steps", "2", "--samples.prompts"]

    def config(seed, steps):
        length = ["--train.steps", str(steps), "--schedule.anneal_tokens", str(round(0.4 * steps) * 2 * 48)]
        out = ["--train.seed", str(seed), "--train.out", str(tmp_path / f"{seed}-{steps}")]
        return load_config(None, [*words, *length, *out])

    cfgs = [config(seed, 10) for seed in (3, 4)]
    texts = [open_text(cfg, resumed=False, log=None) for cfg in cfgs]
    models = []
    for cfg, one in zip(cfgs, texts, strict=True):
        torch.manual_seed(cfg.train.seed)
        models.append(build_model(cfg, one.tokenizer, None, torch.device("cpu"), "fp32")[0])

    def rows(step):
        batches = [one.loader.batch(step) for one in texts]
        assert not any(batch.packed for batch in batches)
        return torch.cat([batch.tokens for batch in batches]), torch.cat([batch.labels for batch in batches])

    run, found = SeedRun(models, cfgs[0], rows), {}
    for step, decayed in run.lengths((5, 10), 0.4):
        if decayed:
            for i, seed in enumerate((3, 4)):
                found[seed, step] = run.losses[-1][i].item(), run.model.lm_head.weight[i].detach().clone()
    assert sorted(found) == [(3, 5), (3, 10), (4, 5), (4, 10)]
    for (seed, steps), (loss, head) in found.items():
        result = train(config(seed, steps))
        assert loss == pytest.approx(result.loss, abs=1e-3), (seed, steps)
        trained = load_file(result.out / "model" / "model.safetensors")["lm_head.weight"]
        assert (head - trained).abs().max() < 1e-3 and (head - trained).abs().mean() < 1e-4, (seed, steps)


def test_scores_of_all_seeds_are_those_of_each_alone():
    import numpy as np
    import torch
    from _token_seeds import SeedRun, TextRows

    from sidlm.models import SidForCausalLM
    from sidlm.train.config import RunConfig

    config = cells.recipe(
        cells.Cell(group="", size="toy", variant="trilinear", seeds=(0,), lengths=(9,)), vocab=40
    ).config
    rows = {
        "tokens": np.array([[1, 2, 3, 4, 5], [6, 7, 8, -1, -1]]), "first": np.array([1, 2]), "bytes": np.array([9, 2]),
        "group": np.array([1, 0]), "groups": np.array(["a", "b"]),
    }  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(SidForCausalLM(config))
    text = TextRows(torch.arange(40).short(), (0, 1), 2, 6)
    inputs, labels = text(1)
    assert inputs.shape == (4, 6) and (labels == inputs + 1).all() and len(set(inputs[:2, 0].tolist())) == 2
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([[6, 7]])).logits[0, 1] for model in models]
    found = SeedRun(models, RunConfig(), text).score(rows, batch=1)
    for i in (0, 1):
        assert found[i]["a"]["nll"] == pytest.approx(-logits[i].log_softmax(0)[8].item(), rel=1e-4)
        assert found[i]["a"]["tokens"] == 1 and found[i]["b"]["tokens"] == 4 and found[i]["b"]["bytes"] == 9


def test_equal_flops_and_local_exponents_on_a_power_law():
    import _token_compare as compare

    def row(size, variant, seed, tokens, loss, cost):
        return {
            "size": size, "variant": variant, "seed": seed, "tokens": tokens, "loss": loss, "flops": cost * tokens,
            "params_non_embedding": {"m": 1e6, "l": 2e6}[size],
        }  # fmt: skip

    lengths = (1_000, 2_000, 4_000)
    rows = [row(s, "full", i, n, (9 + i) * n**-0.1, 1.0) for s in ("m", "l") for i in (0, 1) for n in lengths]
    # the variant costs 1.5 times as much and is as good as 1.2 times the tokens
    rows += [row("m", "a", i, n, (9 + i) * (1.2 * n) ** -0.1, 1.5) for i in (0, 1) for n in lengths]
    found = statistics.at_equal_flops(rows, "a", "full", "m", 2_000)
    truth = [(9 + i) * ((1.2 * 2_000) ** -0.1 - (1.5 * 2_000) ** -0.1) for i in (0, 1)]
    assert found == pytest.approx(truth)
    beyond = statistics.at_equal_flops(rows, "a", "full", "m", 4_000)
    assert beyond == pytest.approx([(9 + i) * ((1.2 * 4_000) ** -0.1 - (1.5 * 4_000) ** -0.1) for i in (0, 1)])
    slopes = compare.slopes(rows, "a", "D", "m", 1_000, 4_000, 0)
    assert slopes == {0: pytest.approx(0.1), 1: pytest.approx(0.1)}
    assert compare.slopes(rows, "full", "N", "m to l", 0, 0, 2_000) == {0: 0.0, 1: 0.0}


def fake_graphs(monkeypatch, works):
    """CUDA graphs on a CPU: a capture runs nothing, a replay calls the function on the captured inputs."""
    import contextlib

    import _token_graph
    import torch

    cuda = _token_graph.torch.cuda

    class Graph:
        def replay(self):
            self.run()

    @contextlib.contextmanager
    def graph(made, capture_error_mode):
        if not works:
            raise RuntimeError("operation not permitted when stream is capturing")
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "current_stream", Stream)
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph", graph)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    return _token_graph


@pytest.mark.parametrize("works", [True, False])
def test_a_step_that_is_captured_or_cannot_be_gives_the_same_numbers(monkeypatch, works):
    import torch

    captured = fake_graphs(monkeypatch, works).Captured
    state, forgotten = torch.zeros(2), []

    def step(x, y):
        state.add_(x * y)
        return state.sum() + 0

    run = captured(step, lambda: forgotten.append(True))
    found = []
    for i in range(1, 8):
        if run.calls == captured.__init__.__globals__["WARM"] and works:
            kept = state.clone()
            run._capture((torch.ones(2), torch.ones(2)))
            state.copy_(kept)  # a real capture runs nothing
            run.graph.run = lambda: run.result.copy_(step(*run.inputs))
        found.append(run(torch.full((2,), float(i)), torch.ones(2)))
    assert [x.item() for x in found] == [2.0 * sum(range(1, i + 1)) for i in range(1, 8)]
    assert (run.graph is not None) == works and bool(run.problem) == (not works) == bool(forgotten)


def test_the_step_of_several_seeds_waits_for_nothing_that_a_graph_would_not_see(monkeypatch):
    """Every number that changes from step to step lies in a tensor: a replay of one step is the next step."""
    import torch
    from _token_seeds import SeedRun, TextRows

    from sidlm.models import SidForCausalLM
    from sidlm.train.config import OptimConfig, RunConfig

    cell = cells.Cell(group="", size="toy", variant="determinant (32,4)", seeds=(0, 1), lengths=(9,))
    cfg = RunConfig(optim=OptimConfig(name="muon", embedding_lr_scale=10.0))

    def run():
        models = []
        for seed in cell.seeds:
            torch.manual_seed(seed)
            models.append(SidForCausalLM(cells.recipe(cell, vocab=40).config))
        return SeedRun(models, cfg, TextRows(torch.arange(40).short(), cell.seeds, 2, 6))

    plain, other = run(), run()
    reads = []
    monkeypatch.setattr(torch.Tensor, "item", lambda x: reads.append(x))
    for step, lr in enumerate((0.01, 0.02, 0.005)):
        plain.step(step, lr)
        other.optimizer.set_rate(lr)
        other.losses.append(other.update(*other.rows(step)))
    monkeypatch.undo()
    assert not reads
    for one, two in zip(plain.optimizer.tensors(), other.optimizer.tensors(), strict=True):
        assert torch.equal(one, two)
    first = run()
    for step, lr in enumerate((0.01, 0.02, 0.02)):
        first.step(step, lr)
    assert not torch.equal(first.model.lm_head.weight, plain.model.lm_head.weight)  # the rate is read every time


def test_a_variant_against_its_control_on_power_laws():
    import _token_search as search

    def row(variant, seed, tokens, better, cost):
        place = {"size": "m", "lr": 1, "batch": 8, "repeat": 0, "steps": tokens, "group": "cheap"}
        loss = (9 + seed) * (better * tokens) ** -0.1
        return place | {"variant": variant, "seed": seed, "tokens": tokens, "loss": loss, "flops": cost * tokens}

    kinds = {"full": (1.0, 1.0), "sliding 32": (1.1, 0.9), "determinant (32,4)": (1.2, 0.95)}
    rows = [row(v, seed, n, *kind) for v, kind in kinds.items() for seed in range(4) for n in (1_000, 2_000, 4_000)]
    same, equal = search.against(rows, "determinant (32,4)", "sliding 32", "m", 4_000)
    scale = (9 + 1.5) * 4_000**-0.1
    assert same.value == pytest.approx(scale * (1.2**-0.1 - 1.1**-0.1))
    assert equal.value == pytest.approx(scale * (1.2**-0.1 - (1.1 * 0.95 / 0.9) ** -0.1))
    assert search.against(rows, "full", "full", "m", 4_000) == (None, None)
    saved = search.saved_lines(rows, "determinant (32,4)", "full")
    assert [line[3] for line in saved] == ["0.0M"] * 3 and saved[-1][-2].startswith("+1")
