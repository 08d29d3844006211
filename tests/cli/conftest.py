"""A tiny run, trained once through the real command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sidlm.cli.main import main

WORDS = "the cat dog bird sees hears likes a small old red blue house tree river and then says: naïve café 数学 😀"


def sentences(seed: int, count: int) -> str:
    rng = random.Random(seed)
    words = (rng.choices(WORDS.split(), k=rng.randint(4, 12)) for _ in range(count))
    return "".join(" ".join(sentence).capitalize() + ".\n" for sentence in words)


def write_corpus(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(12):
        (folder / f"{index:02d}.txt").write_text(sentences(index, 30), encoding="utf-8")
    return folder


TINY = (
    *("--model.set", "hidden_size=32", "intermediate_size=64", "num_hidden_layers=2", "num_attention_heads=4"),
    *("num_key_value_heads=2", "head_dim=8", "max_position_embeddings=256", "simplicial_window=[8,4]"),
    "layer_types=[full_attention,simplicial_attention]",
    *("--data.vocab_size", "600", "--data.seq_len", "32", "--data.valid_fraction", "0.2"),
    *("--train.batch_size", "4", "--train.device", "cpu", "--validation.documents", "4"),
    *("--samples.prompts", "The", "--samples.max_new_tokens", "4"),
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SID_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory, corpus, cache):
    """Run folder of a tiny trained model. Do not change it: copy it first."""
    out = tmp_path_factory.mktemp("run") / "demo"
    settings = ["--data.train", str(corpus), "--train.out", str(out), "--train.steps", "20", "--optim.lr", "1e-2"]
    assert main(["train", *TINY, *settings]) == 0
    return out


@pytest.fixture
def sid(capsys):
    """Runs a command: status, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(word) for word in argv])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def fails(sid):
    """Runs a command that must fail with exactly one line on stderr and status 2; gives what follows "sid: error: "."""

    def run(*argv: object) -> str:
        status, _, err = sid(*argv)
        assert status == 2, err
        assert err.startswith("sid: error: ") and err.count("\n") == 1 and err.endswith("\n"), repr(err)
        return err.removeprefix("sid: error: ").strip()

    return run
