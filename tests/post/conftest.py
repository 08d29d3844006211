"""A tokenizer of its own; the tiny model and dialogues of examples/common.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sidlm.data.tokenizer import Tokenizer, train_tokenizer

TEXT = (
    'system user assistant ipython {"type": "function", "name": "f", "parameters": {}} <function=f> '
    "brave_search.call(query= the cat sat on a mat; naïve café 数学 🎉 def f(x): return x + 1\n\n "
)
_spec = importlib.util.spec_from_file_location(
    "examples_common", Path(__file__).resolve().parents[2] / "examples" / "common.py"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 3], 400, num_special=16)


@pytest.fixture(scope="session")
def common():
    module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(module)
    return module
