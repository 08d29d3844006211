"""A tiny grid on generated text."""

from __future__ import annotations

import json
import random

import pytest

WORDS = ["the", "cat", "dog", "bird", "sees", "hears", "likes", "a", "small", "red", "house", "tree", "and", "then"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    with path.open("w") as file:
        for i in range(200):
            text = " ".join(rng.choices(WORDS, k=rng.randint(20, 60)))
            file.write(json.dumps({"text": text + ".", "domain": ("even", "odd")[i % 2]}) + "\n")
    return path


@pytest.fixture
def grid(tmp_path, corpus):
    """A grid file of four cells: two variants, two seeds, 5 steps each."""
    task = tmp_path / "task.jsonl"
    lines = [{"question": "the cat sees", "choices": ["a dog", "river and"], "answer": i % 2} for i in range(4)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "base.yaml").write_text(
        f"data: {{train: [{corpus}], vocab_size: 520, seq_len: 32, valid_fraction: 0.1}}\n"
        "train: {batch_size: 4, device: cpu, precision: fp32}\n"
        "samples: {prompts: []}\n"
    )
    path = tmp_path / "grid.yaml"
    path.write_text(
        f"""
base: base.yaml
settings:
  model.overrides: {{num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16}}
  checkpoint.every: 1
  data.cache_dir: {tmp_path / "cache"}
variants:
  sid: {{model.overrides: {{layer_types: [full_attention, simplicial_attention], simplicial_window: [8, 4]}}}}
  deep:
    model.arch: llama
    sizes: {{s: {{model.overrides.num_hidden_layers: 3}}}}
sizes:
  s: {{model.overrides: {{hidden_size: 32, intermediate_size: 64}}}}
tokens: [640]
seeds: [0, 1]
tasks: {{toy: {task}}}
"""
    )
    return path
