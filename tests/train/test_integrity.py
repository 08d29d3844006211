"""A bit flipped in one of four processes is found, and the process named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sidlm.errors import SidError
from sidlm.train import train_step
from sidlm.train.integrity import Integrity, minority, words
from sidlm.train.loop import train
from sidlm.train.processes import Processes

PROGRAM = Path(__file__).with_name("integrity_ranks.py")
RANK = "rank 2 (here)"
PAIR = "rank 0 (here) and rank 2 (here) differ and should be equal, in model.embed_tokens.weight"
EXPECTED = {
    "clean": None,
    "clean-tp": None,
    "clean-pp": None,
    "gradient": f"step 2: {RANK} got another gradient of model.embed_tokens.weight from the same rows",
    "gradient-pp": f"step 2: {RANK} got another gradient of model.embed_tokens.weight from the same rows",
    "gradient-between": f"found at step 2: {PAIR}.exp_avg",
    "parameter": f"found at step 2: {PAIR};",
    "majority": f"found at step 3: {RANK} differs from the other replicas, in model.embed_tokens.weight;",
    "own": f"step 2: {RANK} got another gradient of layers.1 from the same rows when they were computed again (before",
    "far": f"step 2: {RANK} got another gradient of layers.1 from the same rows when they were computed again (before",
    "infinite": f"step 2: {RANK} got a gradient that is not finite (before the reduction), and a finite one",
    "unseen": None,  # below the rounding of a norm: only train.verify_recompute_every sees it
    "noise": None,
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("integrity")
    done = subprocess.run([sys.executable, PROGRAM, folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", EXPECTED)
def test_a_flipped_bit_is_found_and_named(found, case):
    expected = EXPECTED[case]
    for ranks in found:  # all of them stop
        message, said = ranks[case]
        assert message == expected if expected is None else expected in message
        assert bool(said) == (case == "noise")


def test_kernels_that_are_not_deterministic_are_no_corruption(found):
    (line,) = found[0]["noise"][1]
    assert "other bits each time on rank 2: the kernels there are not deterministic" in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_bit_counts(dtype):
    x = torch.randn(7, 5, dtype=dtype)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    for bit in range(8 * x.element_size()):
        y = x.clone()
        word = y.view(whole)[3, 2]
        word ^= (1 << bit) if bit < 8 * x.element_size() - 1 else torch.iinfo(whole).min
        assert words(x) != words(y)
    assert words(x.T) == words(x) == words(x.clone())


def test_minority():
    assert minority([5, 5, 7, 5]) == [2]
    assert minority([5, 7]) == [0, 1]
    assert minority([5, 7, 7, 5]) == [0, 1, 2, 3]


def test_one_process_differs_from_itself(tmp_path, config, monkeypatch):
    """The run stops before the step, and its checkpoint is that of the step before."""
    cfg = config(tmp_path / "run", **{"train.verify_recompute_every": 2, "checkpoint.every": 1})
    compute, count = train_step.gradients, [0]

    def faulty(model, *rest):
        loss = compute(model, *rest)
        count[0] += 1
        if count[0] == 5:  # 1, 2, 2 again, 3, 4
            model.lm_head.weight.grad.view(torch.int32)[0, 0] ^= 1
        return loss

    monkeypatch.setattr(train_step, "gradients", faulty)
    with pytest.raises(SidError, match=r"at step 4: rank 0 .* another gradient of (lm_head|model.embed_tokens).weight"):
        train(cfg)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == "step-00000003"
    monkeypatch.setattr(train_step, "gradients", compute)
    assert train(cfg).step == 8


def test_off_costs_nothing():
    """Nothing is looked at: what would be computed again is not even there."""
    checks = Integrity(torch.nn.Linear(2, 2), [], Processes(), every=0, recompute_every=0, say=print)
    checks.begin(1)
    checks.gradients(1, lambda: pytest.fail("computed again"))
    checks.not_finite(1, lambda: pytest.fail("computed again"))
