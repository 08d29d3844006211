import json
import random

import pytest

from sidlm.train import hardware
from sidlm.train.config import load_config
from sidlm.train.hardware import Peak

WORDS = ["sid", "trains", "small", "models", "on", "a", "cpu", "with", "pairs", "of", "keys", "and", "windows"]
# labels differ in number between rows and micro-batches: documents end inside rows
TINY = {
    "model.set": ["hidden_size=32", "num_attention_heads=2", "num_key_value_heads=1", "head_dim=16",
                  "num_hidden_layers=4", "intermediate_size=48", "simplicial_window=[8,4]"],
    "data.vocab_size": ["520"], "data.seq_len": ["32"], "data.valid_fraction": ["0.1"],
    "train.batch_size": ["8"], "train.steps": ["8"], "train.device": ["cpu"], "train.precision": ["fp32"],
    "checkpoint.every": ["2"], "validation.every": ["0"], "samples.max_new_tokens": ["4"], "samples.prompts": ["sid"],
}  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """300 documents of 3 to 60 words in two domains, one of them with a name that wants to be markup."""
    rng = random.Random(20)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    domains = ("plain", "<script>alert(1)</script>")
    with path.open("w") as file:
        for i in range(300):
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(3, 60)))
            file.write(json.dumps({"text": text + ".", "domain": domains[i % 2]}) + "\n")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def argv(corpus, cache):
    """argv(out, **{"train.steps": 4}) -> the command line of a tiny run."""

    def make(out, **changes):
        settings = TINY | {"data.train": [str(corpus)], "data.cache_dir": [str(cache)], "train.out": [str(out)]}
        settings |= {key: value if isinstance(value, list) else [value] for key, value in changes.items()}
        return [str(word) for key, values in settings.items() for word in (f"--{key}", *values)]

    return make


@pytest.fixture
def config(argv):
    """config(out, **changes) -> RunConfig of a tiny run."""
    return lambda out, **changes: load_config(None, argv(out, **changes))


@pytest.fixture(autouse=True)
def no_probe(monkeypatch):
    """The matmul probe takes 0.3 s; its own test calls it."""
    monkeypatch.setattr(hardware, "peak_flops", lambda device, precision: Peak(1e11, "for the tests"))
