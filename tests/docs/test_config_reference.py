from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("config_reference", ROOT / "tools" / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_up_to_date(tool, capsys):
    assert tool.main(["--check"]) == 0, capsys.readouterr().err


def test_check_sees_a_changed_page(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "TARGET", tmp_path / "page.md")
    assert tool.main(["--check"]) == 1
    assert tool.main([]) == 0 and tool.main(["--check"]) == 0
    tool.TARGET.write_text(tool.TARGET.read_text().replace("learning rate", "learning crate", 1))
    assert tool.main(["--check"]) == 1
    assert "is not up to date" in capsys.readouterr().err


def test_every_setting_is_in_it(tool):
    from sidlm.train.config import RunConfig, flatten

    text = tool.render()
    assert [key for key in flatten(RunConfig()) if f"`{key}`" not in text] == []
