"""Probe tasks: answers by brute force from the row alone, the split, and the command."""

import itertools
import json

import numpy as np
import pytest
import torch

from sidlm.cli.main import main
from sidlm.scaling.probes import tasks
from sidlm.scaling.probes.curves import VARIANTS, Probe, config, run_probe

ALL = list(tasks.TASKS)


def rows(task, count=60, seed=0, test=False):
    chosen = tasks.problems(task, count, test=test, seed=seed)
    return tasks.batch(task, chosen, np.random.default_rng(seed))


def scored(tokens, labels):
    return [(list(map(int, t)), i, int(x)) for t, row in zip(tokens, labels, strict=True)
            for i, x in enumerate(row) if x != tasks.IGNORE]  # fmt: skip


def test_match3_by_brute_force():
    m, n = 61, 10
    for row, at, label in scored(*rows(tasks.match3())):
        assert at >= n and m <= row[at] < 2 * m
        found = any((row[at] - m + a + b) % m == 0 for a, b in itertools.product(row[:n], repeat=2))
        assert label == 2 * m + found


def test_function_composition_by_brute_force():
    size = 6
    for row, at, label in scored(*rows(tasks.function_composition())):
        facts = dict(zip(row[0 : 4 * size : 2], row[1 : 4 * size : 2], strict=True))
        middle = facts[row[at] - 2 * size] - 3 * size
        assert label == facts[size + middle]


def test_relation_composition_by_brute_force():
    size, pairs = 6, 7
    for row, at, label in scored(*rows(tasks.relation_composition())):
        facts = list(zip(row[0 : 4 * pairs : 2], row[1 : 4 * pairs : 2], strict=True))
        r = {(a, b - size) for a, b in facts if a < size}
        s = {(a - 2 * size, b - 3 * size) for a, b in facts if a >= size}
        assert len(r) == len(s) == pairs
        x, z = row[at - 1] - 4 * size, row[at] - 5 * size
        assert label == 6 * size + any((x, y) in r and (y, z) in s for y in range(size))


def test_k_hop_by_brute_force():
    task = tasks.k_hop()
    for row, at, label in scored(*rows(task)):
        for _ in range(2):
            at = max(j + 1 for j in range(at) if row[j] == row[at])
        assert label == row[at]


def test_modular_sum_and_brackets_by_brute_force():
    for row, at, label in scored(*rows(tasks.modular_sum())):
        assert at == 3 and label == sum(row[:3]) % 31
    names = {**{i: str(i) for i in range(5)}, 5: "+", 6: "*", 7: "(", 8: ")", 9: ""}
    for row, at, label in scored(*rows(tasks.brackets())):
        assert at == len(row) - 1 and label == eval("".join(names[x] for x in row)) % 5


@pytest.mark.parametrize("name", ALL)
def test_split_is_of_problems_and_a_seed_repeats_them(name):
    task = tasks.TASKS[name]()
    sides = {
        test: {task.canonical(p) for seed in (0, 1) for p in tasks.problems(task, 150, test=test, seed=seed)}
        for test in (False, True)
    }
    assert not sides[False] & sides[True]
    assert min(map(len, sides.values())) >= 150
    for a, b in zip(rows(task, 20), rows(task, 20), strict=True):
        assert (a == b).all()
    assert (rows(task, 20)[0] != rows(task, 20, seed=1)[0]).any()


@pytest.mark.parametrize("name", ALL)
def test_rows_fit_and_answers_are_balanced(name):
    task = tasks.TASKS[name]()
    tokens, labels = rows(task, 600)
    assert tokens.shape == labels.shape == (600, task.length)
    assert tokens.min() >= 0 and max(tokens.max(), labels.max()) < task.vocab
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    answers = round(1 / task.chance)
    assert len(values) == answers
    # a constant answer is right no more often than chance, but for what 600 rows leave to luck
    spread = 5 * (task.chance * (1 - task.chance) / 600) ** 0.5
    assert counts.max() / counts.sum() <= task.chance + (0 if answers == 2 else spread)


def test_orders_that_commute_are_one_problem():
    brackets = tasks.brackets().canonical
    assert brackets((0, (1, 2, 3), 4)) == brackets((0, 4, (1, 3, 2))) != brackets((1, 4, (1, 3, 2)))
    for task in (tasks.modular_sum(), tasks.match3()):
        assert task.canonical((3, 1, 2)) == task.canonical((1, 2, 3))
    word = tasks.k_hop().canonical
    assert word((3, 1, 3, 0)) == word((5, 2, 5, 4)) != word((5, 2, 4, 4))


def test_too_many_examples_are_refused():
    with pytest.raises(ValueError, match=r"only \d+ of 200 different training problems"):
        tasks.problems(tasks.modular_sum(7), 200, test=False, seed=0)


def test_variants_and_their_costs():
    task = tasks.match3()
    made = {v: config(Probe(task="match3", variant=v, examples=1, seed=0), task) for v in VARIANTS}
    assert made["sliding"].layer_types == ["full_attention", "sliding_attention"]
    assert made["deeper"].num_hidden_layers > made["trilinear"].num_hidden_layers
    assert made["determinant"].simplicial_position == "rotation"


def test_a_model_learns_and_the_command_goes_on(tmp_path, capsys):
    row = run_probe(
        Probe(task="modular-sum", variant="full", examples=8, seed=0, steps=60, batch=32, width=32, layers=1, lr=1e-2),
        device=torch.device("cpu"),
    )
    assert row["curve"][-1]["train"] > 0.8 > row["curve"][0]["train"]  # eight sums by heart
    path = tmp_path / "probes.jsonl"
    words = ["scaling", "probe", "--tasks", "match3", "--variants", "trilinear", "--examples", "8", "--steps", "2"]
    words += ["--width", "16", "--batch", "4", "--device", "cpu", "--json", str(path)]
    assert main(words) == 0 and main(words) == 0
    assert len(path.read_text().splitlines()) == 1 and json.loads(path.read_text())["chance"] == 0.5
    assert "match3 (0.500)" in capsys.readouterr().out
    assert main([*words, "--part", "2/2"]) != 0
