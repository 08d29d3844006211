"""The tiny model and dialogues of examples/common.py."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location(
    "examples_common", Path(__file__).resolve().parents[2] / "examples" / "common.py"
)


@pytest.fixture(scope="session")
def common():
    module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(module)
    return module
