"""The scripts of examples/, imported as their own folder's modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import tyro

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """(name, command-line words) -> what the script's main returns; the script itself as ``example.module(name)``."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run(name: str, *words: object):
        module = importlib.import_module(name)
        return module.main(tyro.cli(module.Settings, args=[str(word) for word in words]))

    run.module = importlib.import_module
    yield run
    for name in {path.stem for path in EXAMPLES.glob("*.py")} & (set(sys.modules) - before):
        del sys.modules[name]
