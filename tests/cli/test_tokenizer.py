import json
import subprocess
import sys

import pytest

from sidlm.cli.tokenizer import main
from sidlm.errors import SidError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("tokenizer")
    (tmp / "text.jsonl").write_text("".join(json.dumps({"body": f"hello world {i} 🎉"}) + "\n" for i in range(50)))
    arguments = [
        "train",
        str(tmp / "text.jsonl"),
        "--out",
        str(tmp / "tok"),
        "--vocab-size",
        "290",
        "--num-special",
        "16",
    ]
    assert main([*arguments, "--text-key", "body", "--cache-dir", str(tmp / "cache")]) == 0
    return tmp / "tok"


def test_encode_and_decode(folder, capsys, tmp_path):
    for text in ("hello world", "a<|eot_id|>b 🎉\n"):
        (tmp_path / "x.txt").write_text(text)
        assert main(["encode", str(folder), "--file", str(tmp_path / "x.txt")]) == 0
        ids = capsys.readouterr().out.split()
        assert main(["encode", str(folder), text]) == 0
        assert capsys.readouterr().out.split() == ids
        assert main(["decode", str(folder), *ids]) == 0
        assert capsys.readouterr().out == text + "\n"
    assert main(["encode", str(folder), "hello hello", "--pieces"]) == 0
    assert "".join(json.loads(capsys.readouterr().out)) == "hello hello"


def test_info(folder, capsys, tmp_path):
    (tmp_path / "x.txt").write_text("hello world")
    assert main(["info", str(folder), "--file", str(tmp_path / "x.txt")]) == 0
    out = capsys.readouterr().out
    assert "vocabulary    2" in out
    assert "<|begin_of_text|>" in out and "16: " in out and "bytes per token (11 bytes" in out


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["encode", "-h"], ["decode", "-h"], ["info", "-h"]]
)
def test_help(arguments, capsys):
    try:
        assert main(arguments) == 0
    except SystemExit as stop:
        assert stop.code == 0
    assert "sid tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "unknown command 'trian'"),
        (["train", "x", "--out", "y", "--vocab", "9"], "did you mean --vocab-size"),
        (["train", "x"], "--out"),
        (["train", "missing.txt", "--out", "y"], "'missing.txt' does not exist"),
        (["decode", "y", "1", "two"], "'two' is not a token id"),
    ],
)
def test_mistakes(arguments, words, monkeypatch, tmp_path):
    monkeypatch.setenv("SID_CACHE", str(tmp_path))
    with pytest.raises(SidError, match=words):
        main(arguments)


def test_help_imports_nothing_heavy():
    code = """import sys; from sidlm.cli.tokenizer import main; main(["--help"])
assert not {"torch", "numpy", "tokenizers"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
