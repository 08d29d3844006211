"""What `sid train` says about mistakes; training itself is tested beside the loop."""

from __future__ import annotations

import pytest


@pytest.fixture
def base(tmp_path, corpus):
    out = ("--train.out", tmp_path / "run", "--train.device", "cpu", "--train.steps", "1")
    return ("train", *out, "--data.train", corpus, "--data.vocab_size", "600", "--data.seq_len", "16")


def test_unknown_keys_name_the_nearest(fails, base, tmp_path):
    message = fails(*base, "--optim.learning_rat", "1")
    assert "optim.learning_rat" in message
    assert "did you mean '--train.steps'" in fails(*base, "--train.stepps", "1")
    config = tmp_path / "c.yaml"
    config.write_text("optim: {lrr: 1}\n")
    message = fails("train", config)
    assert str(config) in message and "did you mean 'optim.lr'" in message
    assert "did you mean 'hidden_size'" in fails(*base, "--model.set", "hiden_size=3")
    assert "did you mean 'nano'" in fails(*base, "--model.preset", "nanno")


def test_values_that_cannot_be(fails, base, tmp_path):
    assert "optim.lr" in fails(*base, "--optim.lr", "fast")
    assert "train.steps" in fails(*base, "--train.steps", "0")
    window = fails(*base, "--model.set", "simplicial_window=[0,8]")
    assert "simplicial_window" in window and "[0, 8]" in window
    assert "absent.yaml" in fails("train", tmp_path / "absent.yaml")


def test_data_that_is_missing_empty_or_damaged(fails, base, tmp_path):
    assert "nowhere" in fails(*base, "--data.train", tmp_path / "nowhere")
    (tmp_path / "empty.txt").write_text("")
    assert "empty.txt" in fails(*base, "--data.train", tmp_path / "empty.txt")
    broken = tmp_path / "broken.jsonl.zst"
    broken.write_bytes(b"\x28\xb5\x2f\xfd not zstd after the magic")
    assert str(broken) in fails(*base, "--data.train", broken)


def test_a_folder_that_holds_another_run(fails, demo_run):
    message = fails("train", "--train.out", demo_run, "--train.device", "cpu")
    assert str(demo_run) in message and "another run" in message and "data.seq_len is 32 there and 512 here" in message
